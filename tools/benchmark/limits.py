"""What cannot be beaten: the engine alone in a process, and a bare echo over each transport. Each runs as a process of its own.

The echoes answer with as many bytes as the model would, so that both ways carry what they carry in the cell beside them.

`python -m tools.benchmark.limits raw MODEL SECONDS | echo-http PORT REPLY_BYTES | echo-zmq ENDPOINT REPLY_BYTES`
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import appliance  # noqa: F401  switches telemetry off before the engine is imported

COPY_LIMIT_BYTES = 65_536


def raw(model: str, seconds: float) -> dict[str, object]:
    """Items per second of the engine alone: one and two threads, batch 1 to 32; seconds per run at batch 1."""
    import numpy as np
    import onnxruntime as ort

    types = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}
    best: dict[str, object] = {"batch_1_items_s": 0.0, "batch_1_p50_s": 0.0, "best_items_s": 0.0, "best": ""}
    source = np.random.default_rng(1)
    for threads in (1, 2):
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        [spec] = session.get_inputs()
        for batch in (1, 2, 4, 8, 16, 32):
            shape = [batch, *spec.shape[1:]]
            feed = {spec.name: (source.random(shape) * 255).astype(types[spec.type])}
            session.run(None, feed)
            samples = []
            begun = time.perf_counter()
            while time.perf_counter() - begun < seconds:
                started = time.perf_counter()
                session.run(None, feed)
                samples.append(time.perf_counter() - started)
            items = batch * len(samples) / (time.perf_counter() - begun)
            samples.sort()
            if batch == 1 and items > float(str(best["batch_1_items_s"])):
                best |= {"batch_1_items_s": items, "batch_1_p50_s": samples[len(samples) // 2]}
            if items > float(str(best["best_items_s"])):
                best |= {"best_items_s": items, "best": f"batch {batch}, {threads} thread{'s' if threads > 1 else ''}"}
    return best


async def echo_http(port: int, reply: int) -> None:
    """aiohttp's low-level server: reads the body, answers with `reply` bytes."""
    from aiohttp import web

    answer = bytes(reply)

    async def handler(request: web.BaseRequest) -> web.Response:
        await request.content.read()  # read() of the request itself stops at 1 MiB, which a camera frame exceeds
        return web.Response(body=answer)

    runner = web.ServerRunner(web.Server(handler, access_log=None))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


def echo_zmq(endpoint: str, reply: int) -> None:
    """A blocking ROUTER: the header comes back as it is, the payload as `reply` bytes."""
    import zmq

    router = zmq.Context().socket(zmq.ROUTER)
    router.bind(endpoint)
    answer = bytes(reply)
    copy = True
    while True:
        frames = router.recv_multipart(copy=copy)
        router.send_multipart([frames[0], frames[1], frames[2], answer])
        # receiving without a copy costs more than it saves where messages are small
        copy = len(frames[-1]) <= COPY_LIMIT_BYTES


def main() -> None:
    """One of the three."""
    match sys.argv[1:]:
        case ["raw", model, seconds]:
            print(json.dumps(raw(model, float(seconds))))
        case ["echo-http", port, reply]:
            import uvloop

            uvloop.run(echo_http(int(port), int(reply)))
        case ["echo-zmq", endpoint, reply]:
            echo_zmq(endpoint, int(reply))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
