"""What `doctor` asks systemd about the service when no appliance answers: whether it failed, and with which words.

Knows the unit's name and systemctl; nothing where there is no systemd or it does not know the unit. Changes nothing.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator

import msgspec

from appliance.cli.findings import Finding, Patient
from appliance.config import CREDENTIAL

UNIT = "appliance.service"
ANSWER_S = 10.0
"""systemctl answers in milliseconds; it waits for ever for a manager that hangs."""
BETWEEN_S = 3.0
"""How long the reason of a service that starts again and again is waited for: it is shown in the pause between two starts."""
LOOK_S = 0.1
SAYS_MORE = "`systemctl status appliance` and `journalctl -u appliance` say more"


class State(msgspec.Struct, frozen=True, rename="pascal"):
    """Of `systemctl show`, under systemd's own names."""

    load_state: str = ""
    unit_file_state: str = ""
    active_state: str = ""
    sub_state: str = ""
    result: str = ""
    status_text: str = ""
    exec_main_status: str = ""
    n_restarts: str = "0"

    @property
    def again(self) -> bool:
        """It is started again by systemd, because it ended badly."""
        return self.active_state == "activating" and (self.sub_state == "auto-restart" or self.n_restarts != "0")

    @property
    def ending(self) -> str:
        """How it ended last, as far as that is known, and its own words."""
        how = f"exit status {self.exec_main_status}" if self.result == "exit-code" else self.result
        shown = f" ({how})" if how not in ("", "success") else ""
        return shown + (f": {self.status_text}" if self.status_text else "")


def ask() -> State | None:
    """What systemd says of the service; None if there is no systemd to ask."""
    names = [field.encode_name for field in msgspec.structs.fields(State)]
    command = ["systemctl", "show", f"--property={','.join(names)}", UNIT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    told = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    return msgspec.convert({name: told.get(name, "") for name in names}, State)


def service(patient: Patient, look: Callable[[], State | None] = ask) -> Iterator[Finding]:
    """The service, when no appliance answers."""
    state = look()
    deadline = time.monotonic() + BETWEEN_S
    while state is not None and state.again and not state.status_text and time.monotonic() < deadline:
        time.sleep(LOOK_S)
        state = look()
    if state is None or state.load_state in ("", "not-found"):
        return
    if state.load_state == "masked":
        yield Finding("service", "warning", "is masked: it cannot be started", "install the package again")
    elif state.active_state == "failed":
        fix = f"{SAYS_MORE}; then: systemctl start appliance"
        yield Finding("service", "error", f"has failed and is not started again{state.ending}", fix)
    elif state.again:
        times = f"; {state.n_restarts} times by now" if state.n_restarts not in ("", "0") else ""
        yield Finding("service", "error", f"ends and is started again{times}{state.ending}", SAYS_MORE)
    elif state.active_state == "active":
        yield from _silent(patient)
    elif state.active_state == "inactive":
        boot = (
            "starts at the next boot" if state.unit_file_state == "enabled" else "is not enabled, so no boot starts it"
        )
        yield Finding("service", "note", f"is stopped, and {boot}", "systemctl start appliance")
    else:
        text = f"is {state.active_state}" + (f": {state.status_text}" if state.status_text else "")
        yield Finding("service", "note", text, "wait, and look again")


def _silent(patient: Patient) -> Iterator[Finding]:
    http = patient.config.http
    if not http.enabled:
        yield Finding("service", "note", "runs; HTTP is off, so it cannot be asked")
    elif http.host.startswith(CREDENTIAL):
        text = "runs; http.host is a credential, so where it answers is not known"
        yield Finding("service", "note", text, "name its address with --url")
    else:
        yield Finding("service", "error", "runs, and does not answer", SAYS_MORE)
