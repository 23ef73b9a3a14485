"""The appliance: serves ONNX models on one box over ZeroMQ and HTTP.

Imported first by every process of ours, so this is where ONNX Runtime's telemetry is switched off: its Linux wheels report
home by default since 1.29, and the switch must be in the environment before the first `import onnxruntime`.
"""

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

__version__ = "0.1.0"
