"""The example model, from data to model folder: one module per stage, driven by `tools/train_digits.py`.

Only `network` and `export.from_keras` need Keras and torch, and only `dataset.read_bundled` needs scikit-learn; they import
them when called. Everything else runs, and is tested, with numpy, Pillow, onnx and onnxruntime.
"""

IMAGE_SIDE = 28
CLASS_COUNT = 10
INPUT_NAME = "image"
OUTPUT_NAME = "scores"
