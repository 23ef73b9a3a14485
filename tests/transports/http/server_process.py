"""The HTTP transport over the fake service in a process of its own, for clients that bring a loop or threads of their own.

Run as a program it prints its address and serves until its standard input ends, so it cannot outlive its test.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from types import TracebackType

import uvloop

from appliance.config import HttpConfig
from appliance.observability.metrics import Metrics
from appliance.transports.http import HttpTransport
from tests.fakes.service import FakeService


class FakeServer:
    """Starts on entry, ends on exit. `address` is host:port."""

    def __enter__(self) -> FakeServer:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()
        assert self.address, "the server did not start"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate(timeout=10)
        assert self._process.returncode == 0


async def serve() -> None:
    service = FakeService()
    transport = HttpTransport(service, HttpConfig(port=0), unix_socket=None, metrics=Metrics(service).render)
    await transport.start()
    print(transport.addresses[0].removeprefix("http://"), flush=True)  # noqa: T201 - read by the test
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await transport.drain()
    await transport.close()


if __name__ == "__main__":
    uvloop.run(serve())
