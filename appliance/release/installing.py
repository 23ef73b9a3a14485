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
from appliance.release.box import (
    Box,
    Installed,
    State,
    check_fit,
    hold_releases,
    read_state,
    this_box,
    write_state,
)
from appliance.release.bundle import unpack
from appliance.release.errors import BundleError
from appliance.release.manifest import Manifest

POLL_S = 0.5
MAX_STEPS_BACK = 16
"""How many bundles of models can be taken away again, one after the other."""


class Release(Protocol):
    """How releases are kept on a box: `slots.Slots`, `debian.Packages`."""

    def current(self) -> str:
        """The release in place; empty if there is none."""

    def holds(self, version: str) -> bool:
        """Whether that release could be switched to."""

    def prepare(self, version: str, unpacked: Path) -> str:
        """Everything that can fail, without touching what runs; the digest to switch with, empty if that needs none."""

    def switch(self, version: str, sha256: str = "") -> None:
        """Put that release in place; BundleError if it has another digest than that."""

    def forget(self, keep: Collection[str]) -> None:
        """Remove all others."""


class Service(Protocol):
    """What runs the release."""

    def restart(self) -> None:
        """Start it, or start it anew, and wait for that at most as long as for `ready`, which says whether it came up."""

    def enable(self) -> None:
        """Start it, now and with every boot."""

    def ready(self, version: str) -> bool:
        """Whether that release answers and says that it is ready."""

    def trouble(self) -> str:
        """What it said of models that failed when it was last asked, to be put behind a sentence; empty if nothing."""


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
        with hold_releases(self._box):
            return self._install(reader, allow_older)

    def _install(self, reader: Reader, allow_older: bool) -> Installed:
        manifest, state = reader.manifest, read_state(self._box)
        if state.pending is not None and state.pending.previous:
            raise BundleError(
                f"the installation of {state.pending.version} was cut off", "`appliance bundle rollback` takes it back"
            )
        # models have their own versions: a bundle of nothing else is never older than a release
        runs = self._release.current()
        floor = "" if manifest.kind == "models" else _newer(state.floor, "" if runs == state.failed else runs)
        check_fit(manifest, this_box(self._box.root), floor, allow_older=allow_older)
        contents.check(self._box, manifest)
        shutil.rmtree(self._box.incoming, ignore_errors=True)
        try:
            unpack(reader, self._box.incoming)
            if state.pending is not None:
                # a first release that was cut off: there is nothing to go back to, so it is begun anew
                contents.take_away(self._box, state.pending.added)
            if manifest.kind != "models":
                digest = self._release.prepare(manifest.version, self._box.incoming)
                kept = {**state.kept, manifest.version: digest} if digest else state.kept
                state = msgspec.structs.replace(state, kept=kept)
            return self._try(manifest, state, floor)
        finally:
            shutil.rmtree(self._box.incoming, ignore_errors=True)

    def roll_back(self) -> str:
        """Go back to what was before the last bundle, and take away what that added; the release that runs then."""
        with hold_releases(self._box):
            return self._roll_back()

    def _roll_back(self) -> str:
        state = read_state(self._box)
        undone = state.pending or state.current
        runs = self._release.current()
        # models go, and the release stays, whichever somebody has put there since
        back = "" if undone is None else runs if undone.models_only else undone.previous
        if undone is None or not back:
            raise BundleError("there is no release to go back to", "`appliance bundle status` says what is here")
        if back != runs and not self._release.holds(back):
            raise BundleError(f"release {back} is not kept on this box", "install a bundle with it")
        if state.pending is None:
            # a power cut from here on leaves what the next boot can end
            write_state(self._box, msgspec.structs.replace(state, pending=undone))
        deadline = self._undo(undone, back, state)
        if undone != state.current:
            left = msgspec.structs.replace(state, pending=None)
        else:
            before = list(state.before)
            while before and before[-1].release != back:
                before.pop()
            current = before.pop() if before else Installed(back)
            left = msgspec.structs.replace(state, current=current, before=tuple(before), pending=None)
        write_state(self._box, left)
        if not self._wait(back, deadline):
            raise BundleError(f"release {back} is in place, and is not ready", "`systemctl status appliance`")
        return back

    def _try(self, manifest: Manifest, state: State, floor: str) -> Installed:
        runs = self._release.current()
        previous = "" if runs == state.failed else runs
        models_only = manifest.kind == "models"
        # the same release again, for its models or after a cut: going back leads to where that one led
        again = not models_only and previous == manifest.version
        back = previous if not again else _led(state, manifest.version)
        tried = Installed(manifest.version, back, models_only=models_only)

        def remember(done: Installed) -> None:
            nonlocal tried
            tried = msgspec.structs.replace(done, previous=back, models_only=models_only)
            write_state(self._box, msgspec.structs.replace(state, pending=tried))

        remember(tried)
        wanted = runs if models_only else manifest.version
        try:
            remember(contents.put(self._box, manifest, self._box.incoming, self._note, remember))
            if wanted != runs:
                self._release.switch(wanted, state.kept.get(wanted, ""))
            first = bool(wanted) and (not previous or state.pending is not None)
            deadline = self._started(self._service.enable if first else self._service.restart)
            ready = self._wait(wanted, deadline)
            what = f"the models of bundle {manifest.version} were" if models_only else f"release {wanted} was"
            reason = f"{what} not ready within {self._ready_timeout_s:g} s{self._service.trouble()}"
        except (BundleError, OSError) as error:
            ready, reason = False, str(error)
        if not ready:
            self._fail(tried, state, reason)
        before = _before(state, back, models_only=models_only)
        done = msgspec.structs.replace(state, current=tried, pending=None, before=before, failed="")
        if models_only:
            write_state(self._box, done)
            return tried
        keep = {wanted, back}
        kept = {version: digest for version, digest in state.kept.items() if version in keep}
        write_state(self._box, msgspec.structs.replace(done, floor=_newer(floor, manifest.version), kept=kept))
        self._release.forget(keep)
        return tried

    def _fail(self, tried: Installed, state: State, reason: str) -> None:
        left = msgspec.structs.replace(state, pending=None)
        if not tried.previous:
            contents.take_away(self._box, tried.added)
            write_state(self._box, msgspec.structs.replace(left, failed=self._release.current()))
            raise BundleError(
                f"{reason}, and there is none to go back to",
                "`journalctl -u appliance` says why; install another bundle",
            )
        back = "taking them away again" if tried.models_only else f"going back to {tried.previous}"
        self._note(f"{reason}: {back}")
        deadline = self._undo(tried, tried.previous, state)
        current = state.current or Installed(tried.previous)
        keep = {tried.previous, current.release, current.previous}
        self._release.forget(keep)
        kept = {version: digest for version, digest in state.kept.items() if version in keep}
        write_state(self._box, msgspec.structs.replace(left, kept=kept))
        again = "answers again" if self._wait(tried.previous, deadline) else "is in place again, and is NOT ready"
        raise RolledBackError(
            f"{reason}; release {tried.previous} {again}", "`journalctl -u appliance` says why; nothing of it is left"
        )

    def _undo(self, tried: Installed, back: str, state: State) -> float:
        """Take away what that brought, and put the release before in place; until when it has to be ready."""
        contents.take_away(self._box, tried.added)
        if self._release.current() != back:
            self._release.switch(back, state.kept.get(back, ""))
        return self._started(self._service.restart)

    def _started(self, start: Callable[[], None]) -> float:
        """Start it in that way; until when it has to be ready, counted from before, since the start itself may hang."""
        deadline = self._clock() + self._ready_timeout_s
        start()
        return deadline

    def _wait(self, version: str, deadline: float) -> bool:
        while not self._service.ready(version):
            if self._clock() >= deadline:
                return False
            self._sleep(POLL_S)
        return True


def _led(state: State, release: str) -> str:
    """The release that the installation of this one replaced; empty if it came by another way than a bundle."""
    known = (*state.before, *([state.current] if state.current else []))
    return next((done.previous for done in reversed(known) if not done.models_only and done.version == release), "")


def _before(state: State, back: str, *, models_only: bool) -> tuple[Installed, ...]:
    """What a new installation replaces, as far as there is a way back to it: the packages of older releases are gone."""
    known = [*state.before, *([state.current] if state.current else [])]
    if not models_only:
        return tuple(done for done in known if done.release == back)
    if len(known) > MAX_STEPS_BACK:
        known.remove(next(done for done in known if done.models_only))
    return tuple(known)


def _newer(one: str, other: str) -> str:
    """The newer of two releases, of which either may be empty, or no release of ours."""
    try:
        return other if not one or (other and versions.older(one, other)) else one
    except BundleError:
        return one
