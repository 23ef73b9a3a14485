"""From an ONNX file to what serves: inspection, conversion, compilation, verification."""
