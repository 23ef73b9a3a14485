"""The template: a process that has imported everything and does nothing but fork workers.

Starting a worker this way takes milliseconds instead of the half second of imports. It holds no session, no CUDA and no
threads, so that a fork is safe. It reaps its children and tells the front how they ended; when the front goes, it goes, and the
kernel sends its children after it (PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import sys
import traceback

from appliance.engines.base import DeviceFaultError
from appliance.host import sandbox
from appliance.host.sandbox import Sandbox
from appliance.workers.main import Worker, become_child
from appliance.workers.messages import MAX_MESSAGE_BYTES, Exited, Forked, decode_to_template, encode

EXIT_BUG = 70
"""EX_SOFTWARE: an exception of ours ended the worker."""

EXIT_DEVICE_FAULT = 75
"""EX_TEMPFAIL: the device is lost to this process, and another one may have it again."""


class Template:
    """The loop: fork on request, report the dead."""

    def __init__(self, control: socket.socket, sandbox: Sandbox | None) -> None:
        self._control = control
        self._sandbox = sandbox
        self._children: dict[int, tuple[int, int]] = {}  # pidfd -> (worker, pid)
        self._poll = select.poll()
        self._poll.register(control.fileno(), select.POLLIN)

    def serve(self) -> None:
        """Until the front closes the socket; then every worker is ended."""
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor != self._control.fileno():
                    self._reap(descriptor)
                elif not self._fork():
                    self._end()
                    return

    def _fork(self) -> bool:
        data, descriptors, _, _ = socket.recv_fds(self._control, MAX_MESSAGE_BYTES, 1)
        if not data:
            return False
        request = decode_to_template(data)
        channel = socket.socket(fileno=descriptors[0])
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._child(parent, channel, request.title)
        channel.close()
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = (request.worker, pid)
        self._poll.register(pidfd, select.POLLIN)
        socket.send_fds(self._control, [encode(Forked(request.worker, pid))], [pidfd])
        return True

    def _child(self, parent: int, channel: socket.socket, title: str) -> None:
        """The worker's whole life. It never returns into the template's loop."""
        status = EXIT_BUG
        try:
            become_child(parent, title)
            self._control.close()
            for pidfd in self._children:
                os.close(pidfd)
            self._enter_sandbox()
            Worker(channel).serve()
            status = 0
        except DeviceFaultError:
            # no destructor may run: on a lost device they crash or wait for ever
            status = EXIT_DEVICE_FAULT
        except BrokenPipeError:
            status = 0  # the front is gone: nobody to answer
        except BaseException:  # a process boundary: whatever it was, it ends here, and loudly
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def _enter_sandbox(self) -> None:
        if self._sandbox is not None:
            try:
                self._sandbox.enter()
            except OSError as error:
                # models are served all the same: what the unit forbids is forbidden still
                sys.stderr.write(f"worker {os.getpid()} goes without a sandbox: {error.strerror}\n")

    def _reap(self, pidfd: int) -> None:
        worker, pid = self._children.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        # the front may be gone already; then nobody wants to know
        with contextlib.suppress(BrokenPipeError):
            self._control.send(encode(Exited(worker, pid, os.waitstatus_to_exitcode(status))))

    def _end(self) -> None:
        for pidfd in self._children:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        for _, pid in self._children.values():
            os.waitpid(pid, 0)


def main() -> None:
    """`python -m appliance.workers.template FD FRONT [sandbox]`: serve the front at the other end of that descriptor."""
    front = int(sys.argv[2])
    wanted = sys.argv[3:] == ["sandbox"]
    become_child(front, "appl-template")
    control = socket.socket(fileno=int(sys.argv[1]))
    from appliance.engines import registry

    registry.preload()
    if wanted:
        sandbox.make_nodes()
    # what is imported stays in pages shared by all workers, if the collector never writes to them
    gc.collect()
    gc.freeze()
    Template(control, Sandbox.of_this_kernel() if wanted else None).serve()


if __name__ == "__main__":
    main()
