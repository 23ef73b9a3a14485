"""Clients inside the box: ask one request after another until stdin ends, and count what was not answered as it should.

`http`: a new connection for each request. `keep`: one that is kept; a request that found it closed before any byte of an answer
goes out again on a new one, as every HTTP library does (RFC 9112, 9.3.1). `zmq`: the package's own client.
"""

from __future__ import annotations

import collections
import http.client
import json
import sys
import threading
import time
from collections.abc import Callable

BODY = json.dumps({"inputs": [{"name": "data", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.0]}]})
TIMEOUT_S = 30.0
CLOSED = (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError)


def http_client(model: str, *, keep: bool) -> Callable[[], None]:
    path = f"/v2/models/{model}/infer"
    kept: list[http.client.HTTPConnection] = []

    def ask() -> None:
        fresh = not kept
        connection = kept.pop() if kept else http.client.HTTPConnection("127.0.0.1", 8000, timeout=TIMEOUT_S)
        try:
            connection.request("POST", path, BODY)
            answer = connection.getresponse()
        except CLOSED:
            connection.close()
            if fresh:
                raise
            return ask()
        text = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{answer.status} {text.decode()[:200]}")
        if keep and not answer.will_close:
            kept.append(connection)
        else:
            connection.close()
        return None

    return ask


def zmq_client(model: str, endpoint: str) -> Callable[[], None]:
    import numpy as np

    from appliance.client import Client

    client = Client(endpoint, timeout_s=TIMEOUT_S)
    data = np.array([[1.0, 2.0]], np.float32)

    def ask() -> None:
        client.infer(model, {"data": data})

    return ask


def main() -> None:
    kind, clients, model = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    stop = threading.Event()
    errors: collections.Counter[str] = collections.Counter()
    times: list[float] = []

    def run() -> None:
        if kind == "zmq":
            ask = zmq_client(model, "tcp://127.0.0.1:5570")
        elif kind == "ipc":
            ask = zmq_client(model, "ipc:///run/appliance/infer.ipc")
        else:
            ask = http_client(model, keep=kind == "keep")
        while True:
            begun = time.monotonic()
            try:
                ask()
            except Exception as error:
                errors[f"{type(error).__name__}: {error}"] += 1
                time.sleep(0.01)
            times.append(time.monotonic() - begun)
            if stop.is_set():
                return
            time.sleep(0.002)  # two cores are shared with what is measured

    threads = [threading.Thread(target=run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    stop.set()
    for thread in threads:
        thread.join()
    result = {"requests": len(times), "failed": errors.total(), "worst_ms": round(max(times) * 1000), "errors": errors}
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main()
