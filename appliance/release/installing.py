"""Installing a release and going back: prepare, switch, wait until it is ready, and otherwise undo it all.

Nothing is changed before the whole bundle was read and found right. From then on the state file says what is being tried, so that
`roll_back` works after a crash or a power cut as well. How a release gets onto the box and how the service is restarted are the
caller's: see `Release` and `Service`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

import msgspec

from appliance.release import contents, versions
from appliance.release.archive import Reader
from appliance.release.box import Box, Installed, State, check_fit, read_state, this_box, write_state
from appliance.release.bundle import unpack
from appliance.release.errors import BundleError
from appliance.release.manifest import Manifest

POLL_S = 0.5


class Release(Protocol):
    """How releases are kept on a box: `slots.Slots`, `debian.Packages`."""

    restarts_by_itself: bool

    def current(self) -> str:
        """The release in place; empty if there is none."""

    def holds(self, version: str) -> bool:
        """Whether that release could be switched to."""

    def prepare(self, version: str, unpacked: Path) -> None:
        """Everything that can fail, without touching what runs."""

    def switch(self, version: str) -> None:
        """Put that release in place."""

    def forget(self, keep: Collection[str]) -> None:
        """Remove all others."""


class Service(Protocol):
    """What runs the release."""

    def restart(self) -> None:
        """Start it, or start it anew. Whether it comes up is seen by `ready`."""

    def start(self) -> None:
        """Start it if it does not run."""

    def enable(self) -> None:
        """Start it, now and with every boot."""

    def ready(self, version: str) -> bool:
        """Whether that release answers and says that it is ready."""


class RolledBackError(BundleError):
    """The new release did not become ready; the one before is in place again."""


class Installer:
    """One box, with its releases and its service."""

    def __init__(
        self,
        box: Box,
        release: Release,
        service: Service,
        *,
        ready_timeout_s: float,
        note: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._box = box
        self._release = release
        self._service = service
        self._ready_timeout_s = ready_timeout_s
        self._note = note
        self._clock = clock
        self._sleep = sleep

    def install(self, reader: Reader, *, allow_older: bool = False) -> Installed:
        """Install the bundle; RolledBackError if its release did not become ready, BundleError if it was refused."""
        manifest, state = reader.manifest, read_state(self._box)
        if state.pending is not None and state.pending.previous:
            raise BundleError(
                f"the installation of {state.pending.version} was cut off", "`appliance bundle rollback` takes it back"
            )
        # models have their own versions: a bundle of nothing else is never older than a release
        floor = "" if manifest.kind == "models" else state.floor
        check_fit(manifest, this_box(self._box.root), floor, allow_older=allow_older)
        contents.check(self._box, manifest)
        self._box.releases.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self._box.incoming, ignore_errors=True)
        try:
            unpack(reader, self._box.incoming)
            if state.pending is not None:
                # a first release that was cut off: there is nothing to go back to, so it is begun anew
                contents.take_away(self._box, state.pending.added)
            if manifest.kind != "models":
                self._release.prepare(manifest.version, self._box.incoming)
            return self._try(manifest, state)
        finally:
            shutil.rmtree(self._box.incoming, ignore_errors=True)

    def roll_back(self) -> str:
        """Go back to the release before, and take away what the present one added; the release that runs then."""
        state = read_state(self._box)
        undone = state.pending or state.current
        if undone is None or not undone.previous:
            raise BundleError("there is no release to go back to", "`appliance bundle status` says what is here")
        if not self._release.holds(undone.previous):
            raise BundleError(f"release {undone.previous} is not kept on this box", "install a bundle with it")
        self._undo(undone)
        before = state.current if state.pending is not None else Installed(undone.previous)
        write_state(self._box, State(state.floor, before))
        if not self._wait(undone.previous):
            raise BundleError(
                f"release {undone.previous} is in place, and is not ready", "`systemctl status appliance`"
            )
        return undone.previous

    def _try(self, manifest: Manifest, state: State) -> Installed:
        previous = self._release.current()
        # the same release again, for its models or after a cut: going back leads to where that one led
        again = manifest.kind != "models" and previous == manifest.version
        before = state.current if state.current is not None and state.current.version == manifest.version else None
        back = previous if not again else before.previous if before is not None else ""
        tried = Installed(manifest.version, back)

        def remember(done: Installed) -> None:
            nonlocal tried
            tried = msgspec.structs.replace(done, previous=back)
            write_state(self._box, State(state.floor, state.current, tried))

        remember(tried)
        wanted = previous if manifest.kind == "models" else manifest.version
        try:
            remember(contents.put(self._box, manifest, self._box.incoming, self._note, remember))
            if wanted != previous:
                self._release.switch(wanted)
            if wanted and (not previous or state.pending is not None):
                self._service.enable()
            elif self._release.restarts_by_itself and wanted != previous:
                self._service.start()
            else:
                self._service.restart()
            ready = self._wait(wanted)
            reason = f"release {wanted} was not ready within {self._ready_timeout_s:g} s"
        except (BundleError, OSError) as error:
            ready, reason = False, str(error)
        if not ready:
            self._fail(tried, state, reason)
        if manifest.kind == "models":
            write_state(self._box, State(state.floor, tried))
            return tried
        floor = manifest.version if not state.floor or versions.older(state.floor, manifest.version) else state.floor
        write_state(self._box, State(floor, tried))
        self._release.forget({wanted, back})
        return tried

    def _fail(self, tried: Installed, state: State, reason: str) -> None:
        if not tried.previous:
            contents.take_away(self._box, tried.added)
            write_state(self._box, State(state.floor, state.current))
            raise BundleError(
                f"{reason}, and there is none to go back to",
                "`journalctl -u appliance` says why; install another bundle",
            )
        self._note(f"{reason}: going back to {tried.previous}")
        self._undo(tried)
        write_state(self._box, State(state.floor, state.current))
        again = "answers again" if self._wait(tried.previous) else "is in place again, and is NOT ready"
        raise RolledBackError(
            f"{reason}; release {tried.previous} {again}", "`journalctl -u appliance` says why; nothing of it is left"
        )

    def _undo(self, tried: Installed) -> None:
        contents.take_away(self._box, tried.added)
        if self._release.current() != tried.previous:
            self._release.switch(tried.previous)
        self._service.restart()

    def _wait(self, version: str) -> bool:
        deadline = self._clock() + self._ready_timeout_s
        while not self._service.ready(version):
            if self._clock() >= deadline:
                return False
            self._sleep(POLL_S)
        return True
