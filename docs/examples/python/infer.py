"""One inference with the appliance's own client.

python infer.py tcp://127.0.0.1:5570 digits image 1,28,28,1 [FILE.npy]
"""

import sys

import numpy as np

from appliance.client import ApplianceError, Client

if len(sys.argv) < 5:
    sys.exit("usage: infer.py ENDPOINT MODEL TENSOR SHAPE [FILE.npy]")
endpoint, model, tensor, shape_text, *file = sys.argv[1:]
shape = tuple(int(size) for size in shape_text.split(","))
array = np.load(file[0]) if file else np.arange(np.prod(shape), dtype=np.float32).reshape(shape)

with Client(endpoint, timeout_s=2.0) as client:
    try:
        result = client.infer(model, {tensor: array})
    except ApplianceError as error:
        sys.exit(f"{error.code}: {error.message}")
print(f"{result.model} version {result.version}: {result.timing.compute_us} us in the engine")
for values in result.outputs.values():
    print(" ".join(f"{value:g}" for value in values.reshape(-1)))
