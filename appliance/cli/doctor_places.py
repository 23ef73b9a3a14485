"""What `doctor` looks at where the appliance meets the system: folders, room on disks, and ports.

Checks as in `doctor`: from what is looked at to findings; none of them changes anything.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from appliance.cli.findings import Finding, Patient
from appliance.config import CREDENTIAL, recorder_path, resolve_runtime_dir
from appliance.lifecycle.compilation import engines_path

LOW_DISK_BYTES = 1 << 30
LOW_DISK_SHARE = 0.05
LOOPBACK = "127.0.0.1"
PRUNE = "appliance engines prune, or make room"


def permissions(patient: Patient) -> Iterator[Finding]:
    """Whether the models can be read, and whether what the appliance writes can be written."""
    yield from _models_folder(patient)
    yield from _written_folders(patient)


def _models_folder(patient: Patient) -> Iterator[Finding]:
    models = Path(patient.config.repository.path)
    if not models.is_dir():
        yield Finding("models folder", "error", f"{models} is no folder", "make it, or set repository.path")
        return
    if not os.access(models, os.R_OK | os.X_OK):
        yield Finding("models folder", "error", f"{models} cannot be read", f"chmod a+rX {models}")
        return
    unreadable = [file for file in models.rglob("*") if not os.access(file, os.R_OK)]
    if unreadable:
        text = f"{len(unreadable)} files cannot be read, {unreadable[0]} among them"
        yield Finding("models folder", "error", text, f"chmod -R a+rX {models}")
        return
    loose = [file for file in models.rglob("*.onnx") if file.stat().st_mode & 0o002]
    if loose:
        text = f"{loose[0]} can be changed by everybody"
        yield Finding("models folder", "warning", text, f"chmod -R o-w {models}")
        return
    yield Finding("models folder", "good", f"{models} can be read")


def _written_folders(patient: Patient) -> Iterator[Finding]:
    """Folders in which the appliance writes. One that is not there yet is made, so the nearest above it counts."""
    well = []
    for name, path in _written(patient).items():
        place = _existing(path)
        if os.access(place, os.R_OK | os.W_OK | os.X_OK):
            well.append(name)
        elif place.stat().st_uid != os.geteuid():
            owner = _owner(place)
            text = f"{place} ({name}) belongs to {owner}, and only that user can say whether it can be written"
            yield Finding("folders", "note", text, f"sudo -u {owner} appliance doctor")
        else:
            text = f"{place} ({name}) cannot be written"
            yield Finding("folders", "error", text, f"chmod u+rwx {place}")
    if well:
        yield Finding("folders", "good", f"{', '.join(well)}: can be written")


def _written(patient: Patient) -> dict[str, Path]:
    config = patient.config
    found = {"sockets": resolve_runtime_dir(config)}
    if config.engines.enabled:
        found["engines"] = engines_path(config)
    if config.recorder.enabled:
        found["recorder"] = recorder_path(config).parent
    return found


def _existing(path: Path) -> Path:
    return next((place for place in (path, *path.absolute().parents) if place.exists()), Path("/"))


def _owner(place: Path) -> str:
    try:
        return place.owner()
    except KeyError:
        return str(place.stat().st_uid)


def disk(patient: Patient) -> Iterator[Finding]:
    """Room where models are read and where we write much."""
    written = _written(patient)
    places = {
        "models": (Path(patient.config.repository.path), "make room"),
        "engines": (engines_path(patient.config), PRUNE),
    }
    if "recorder" in written:
        places["recorder"] = written["recorder"], "make room, or lower recorder.max_size_mb"
    for name, (path, fix) in places.items():
        usage = shutil.disk_usage(_existing(path))
        text = f"{name}: {_size(usage.free)} of {_size(usage.total)} free"
        low = usage.free < LOW_DISK_BYTES or usage.free < usage.total * LOW_DISK_SHARE
        yield Finding("disk", "warning" if low else "good", text, fix if low else "")


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 10**9 else f"{count / 1e6:.1f} MB"


def ports(patient: Patient) -> Iterator[Finding]:
    """Who listens where we would: ourselves, nobody, or somebody else; and whether others can come."""
    for setting in _credentials(patient):
        text = f"{setting} is a credential, which only the service can read: its address is not looked at"
        yield Finding("ports", "note", text, "ss -ltnp names who listens where")
    for setting, host, port in _listeners(patient):
        try:
            taken = _answers(host, port)
        except OSError as error:
            text = f"{host} is no address that can be listened on: {error.strerror or error}"
            yield Finding("ports", "error", text, f"mend {setting.replace('http.port', 'http.host')}")
            continue
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if taken and patient.status is None:
            text = f"another program listens on {where}"
            yield Finding("ports", "error", text, f"ss -ltnp 'sport = :{port}' names it; or set {setting}")
        else:
            yield Finding("ports", "good", f"{where} is {'ours' if taken else 'free'}")
        if host not in ("127.0.0.1", "::1", "localhost"):
            who = "HTTP" if setting == "http.port" else "ZeroMQ"
            text = f"{who} listens on {host}, and there is no authentication"
            fix = "put a proxy with authentication before it, or set http.host to 127.0.0.1"
            if who == "ZeroMQ":
                fix = f"let a firewall choose who comes, or set {setting} to tcp://127.0.0.1:{port}"
            yield Finding("ports", "warning", text, fix)


def _answers(host: str, port: int) -> bool:
    """Whether somebody listens there. OSError: there is no such place."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((LOOPBACK if host == "*" else host, port)) == 0


def _credentials(patient: Patient) -> Iterator[str]:
    http, zmq = patient.config.http, patient.config.zmq
    if http.enabled and http.host.startswith(CREDENTIAL):
        yield "http.host"
    for setting, endpoint in (("zmq.tcp", zmq.tcp), ("zmq.events_tcp", zmq.events_tcp)):
        if zmq.enabled and endpoint.startswith(CREDENTIAL):
            yield setting


def _listeners(patient: Patient) -> Iterator[tuple[str, str, int]]:
    """Setting, host and port of each socket that others may have; a port that is chosen at the start is nobody's yet."""
    http, zmq = patient.config.http, patient.config.zmq
    if http.enabled and http.port and not http.host.startswith(CREDENTIAL):
        yield "http.port", http.host, http.port
    for setting, endpoint in (("zmq.tcp", zmq.tcp), ("zmq.events_tcp", zmq.events_tcp)):
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        if zmq.enabled and port.isdecimal() and int(port) and not endpoint.startswith(CREDENTIAL):
            yield setting, host.strip("[]"), int(port)
