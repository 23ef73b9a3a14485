"""The same with pyzmq alone: what a client in another language has to do.

python infer_raw.py tcp://127.0.0.1:5570 digits image 1,28,28,1
"""

import json
import math
import struct
import sys

import zmq

if len(sys.argv) < 5:
    sys.exit("usage: infer_raw.py ENDPOINT MODEL TENSOR SHAPE")
endpoint, model, tensor, shape_text = sys.argv[1:5]
shape = [int(size) for size in shape_text.split(",")]
count = math.prod(shape)
data = struct.pack(f"<{count}f", *range(count))

with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.IMMEDIATE, 1)  # no queueing for a daemon that is not there
    socket.setsockopt(zmq.SNDTIMEO, 2000)
    socket.setsockopt(zmq.RCVTIMEO, 2000)
    socket.connect(endpoint)
    header = {
        "op": "infer",
        "id": "1",
        "model": model,
        "ttl_ms": 2000,
        "inputs": [{"name": tensor, "datatype": "FP32", "shape": shape, "frame": 0}],
    }
    try:
        socket.send_multipart([b"AIP1", json.dumps(header).encode(), data])
        _, reply_header, *tensors = socket.recv_multipart()
    except zmq.Again:
        sys.exit(f"no answer from {endpoint} in time")

reply = json.loads(reply_header)
print(json.dumps(reply))
if not reply["ok"]:
    sys.exit(f"{reply['code']}: {reply['message']}")
for output in reply["outputs"]:
    if output["datatype"] == "FP32":
        frame = tensors[output["frame"]]
        print(" ".join(f"{value:g}" for value in struct.unpack(f"<{len(frame) // 4}f", frame)))
