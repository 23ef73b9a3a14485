"""What cannot be beaten: the engine alone in a process, and a bare echo over each transport. Each runs as a process of its own.

    python -m tools.benchmark.limits raw MODEL_FILE
    python -m tools.benchmark.limits echo-http PORT REPLY_BYTES
    python -m tools.benchmark.limits echo-zmq ENDPOINT REPLY_BYTES

`raw` reads a JSON list of [threads, batch, seconds] from each line of stdin, and answers with one line: how fast each is.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import appliance  # noqa: F401  switches telemetry off before the engine is imported

COPY_LIMIT_BYTES = 65_536
THREADS = (1, 2)
BATCHES = (1, 2, 4, 8, 16, 32)
MIN_RUNS = 3


class Raw:
    """The engine alone, with one session for each number of threads, in its default settings."""

    def __init__(self, model: str) -> None:
        import numpy as np
        import onnxruntime as ort

        types = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}
        self._sessions = {}
        for threads in THREADS:
            options = ort.SessionOptions()
            options.intra_op_num_threads = threads
            self._sessions[threads] = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        [spec] = self._sessions[1].get_inputs()
        source = np.random.default_rng(1)
        self._name = spec.name
        self._inputs: dict[int, Any] = {
            batch: (source.random([batch, *spec.shape[1:]]) * 255).astype(types[spec.type]) for batch in BATCHES
        }

    def measure(self, threads: int, batch: int, seconds: float) -> dict[str, Any]:
        """Items per second, and the median seconds of a run."""
        session, feed = self._sessions[threads], {self._name: self._inputs[batch]}
        session.run(None, feed)
        samples: list[float] = []
        begun = now = time.perf_counter()
        while now - begun < seconds or len(samples) < MIN_RUNS:
            session.run(None, feed)
            started, now = now, time.perf_counter()
            samples.append(now - started)
        samples.sort()
        items_s = batch * len(samples) / (now - begun)
        return {"threads": threads, "batch": batch, "items_s": items_s, "p50_s": samples[len(samples) // 2]}


def serve_raw(model: str) -> None:
    """Measure on demand, until stdin ends."""
    raw = Raw(model)
    for line in sys.stdin:
        print(json.dumps([raw.measure(*wanted) for wanted in json.loads(line)]), flush=True)


async def echo_http(port: int, reply: int) -> None:
    """aiohttp's low-level server: reads the body, answers with `reply` bytes."""
    from aiohttp import web

    answer = bytes(reply)

    async def handler(request: web.BaseRequest) -> web.Response:
        await request.content.read()  # request.read() would refuse more than 1 MiB
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
        router.send_multipart([frames[0], frames[1], frames[2], answer], copy=copy)
        # without a copy the bookkeeping costs more than it saves where messages are small
        copy = len(frames[-1]) <= COPY_LIMIT_BYTES


def main() -> None:
    """One of the three."""
    match sys.argv[1:]:
        case ["raw", model]:
            serve_raw(model)
        case ["echo-http", port, reply]:
            import uvloop

            uvloop.run(echo_http(int(port), int(reply)))
        case ["echo-zmq", endpoint, reply]:
            echo_zmq(endpoint, int(reply))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
