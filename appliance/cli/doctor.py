"""`doctor`: everything that can be wrong with a box, looked at one by one, each with what to do about it.

Works with and without a running appliance. Each check is a function from what it looks at to findings; none of them changes
anything, and one that fails is a finding itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from appliance.cli import book
from appliance.cli.connection import Appliance
from appliance.cli.findings import Check, Finding, Grade, Patient
from appliance.cli.options import JSON, URL, command, unreadable
from appliance.cli.output import CommandError, Exit, print_json
from appliance.config import ConfigError, UnreadableError, find, load
from appliance.host.sandbox import Sandbox

GOVERNOR_FIX = (
    "see to the cooling: fans, filters, the air around it; `appliance history gpu.0.temperature` shows since when"
)
MARKS: dict[Grade, str] = {"good": "✓", "note": "·", "warning": "!", "error": "✗"}

DISK = "models-on-a-disk-of-their-own"
"""The section of the book."""

PROBE_S = 60.0
DRIVER_PROBE_S = 20.0
"""NVML answers in a second or two when the driver has to be loaded first; later than that it hangs."""

STA_UNSYNC = 0x0040
"""adjtimex(2): the clock is not synchronized."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor")(doctor)


@command
def doctor(
    only: Annotated[
        list[str] | None, typer.Option(help="Only this check, and no other; may be repeated. A wrong name lists all.")
    ] = None,
    url: URL = None,
    as_json: JSON = False,
) -> None:
    """Look at everything that could be wrong here, and say what to do about it. Exit status 1 if something must be done."""
    findings, patient = _examine(url, _chosen(only or ()))
    if as_json:
        print_json(msgspec.to_builtins(findings))
    else:
        _show(findings, running=patient is not None and patient.status is not None)
    if any(finding.grade == "error" for finding in findings):
        raise typer.Exit(Exit.FAILED)


def _chosen(names: Sequence[str]) -> Sequence[Check]:
    checks = {check.__name__.strip("_"): check for check in CHECKS}
    if unknown := sorted(set(names) - set(checks)):
        raise CommandError(
            Exit.USAGE, "USAGE", f"there is no check {', '.join(unknown)}", f"there are {', '.join(checks)}"
        )
    return [check for name, check in checks.items() if not names or name in names]


def _examine(url: str | None, checks: Sequence[Check]) -> tuple[list[Finding], Patient | None]:
    path = find()
    try:
        config = load(path)
    except ConfigError as error:
        problems = "; ".join(str(problem) for problem in error.problems)
        fix = "mend it; `appliance config check` says more"
        return [_pointed(Finding("configuration", "error", problems, fix))], None
    except UnreadableError as error:
        told = unreadable(error)
        problems, fix = told.message, told.hint
        return [_pointed(Finding("configuration", "error", problems, fix))], None
    status, workers = None, []
    appliance = Appliance(url)
    with contextlib.suppress(CommandError):
        status, workers = appliance.get("/v2/appliance/status"), appliance.get("/v2/appliance/workers")
    patient = Patient(config, path, status, workers)
    findings = [Finding("configuration", "good", f"{path or 'defaults'}: no problem")]
    for check in checks:
        try:
            findings += check(patient)
        except Exception as error:  # one organ that cannot be looked at must not hide the others
            name = check.__name__.strip("_")
            findings.append(
                Finding(name, "warning", f"cannot be looked at: {type(error).__name__}: {error}", "report this")
            )
    return [_pointed(finding) for finding in findings], patient


def _pointed(finding: Finding) -> Finding:
    return msgspec.structs.replace(finding, see=finding.see or book.pointer(finding.check))


def _show(findings: list[Finding], *, running: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles: dict[Grade, str] = {"good": "green", "note": "dim", "warning": "yellow", "error": "bold red"}
    console = Console(highlight=False)
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        style = styles[finding.grade]
        table.add_row(Text(MARKS[finding.grade], style), Text(finding.check), Text(finding.text))
        if finding.grade in ("warning", "error"):
            says_more = f"see {finding.see}" if finding.see else ""
            table.add_row("", "", Text(f"→ {'; '.join(filter(None, (finding.fix, says_more)))}", style))
    console.print(table)
    errors, warnings = (sum(finding.grade == grade for finding in findings) for grade in ("error", "warning"))
    verdict = f"{errors} to mend, {warnings} to know about" if errors or warnings else "nothing to do"
    console.print(f"\n{verdict}{'' if running else '; no appliance answers'}")
    if errors or warnings:
        console.print(f"{book.BOOK} is {book.place()}", soft_wrap=True)


# --- the checks -----------------------------------------------------------------------------------------------------------


def _running(patient: Patient) -> Iterator[Finding]:
    if patient.status is None:
        from appliance.cli import doctor_unit

        yield Finding("appliance", "note", "none answers, so only the box was looked at", "appliance serve")
        yield from doctor_unit.service(patient)
        return
    status = patient.status["status"]
    if status["ready"]:
        yield Finding("appliance", "good", f"{status['version']}: {status['line']}")
    else:
        yield Finding("appliance", "error", f"not ready: {status['line']}", "appliance models list")
    for model in patient.status["models"]:
        if model["detail"] == "FAILED":
            # of a folder that is wrong as a whole there is no version
            name = f"{model['name']} version {model['version']}" if model["version"] else model["name"]
            text = f"{name} does not serve: {model['reason']}"
            fix = f"mend it, then: appliance models load {model['name']}"
            if model["reason"].startswith("waits for memory"):
                fix = "unload another model, or give the box more memory: it is loaded by itself when there is room"
            yield Finding("models", "error", text, fix)
    governor = patient.status.get("governor") or {"level": "NOMINAL"}
    if governor["level"] != "NOMINAL":
        level, text = governor["level"], f"{governor['level']}: {governor['reason']}"
        yield Finding("governor", "warning" if level == "WARM" else "error", text, GOVERNOR_FIX)
    for finding in patient.status.get("findings") or ():
        grade: Grade = "error" if finding["severity"] == "error" else "warning"
        see = book.pointer("hardware", finding.get("code", ""))
        yield Finding("hardware", grade, finding["text"], finding.get("fix", ""), see)


def _models(patient: Patient) -> Iterator[Finding]:
    """A folder without a model is most often the mount point of a disk that is not mounted: ready, and nothing serves."""
    from appliance.lifecycle.repository import Repository

    path = Path(patient.config.repository.path)
    try:
        found = Repository(path).scan()
    except OSError:
        return  # that is said of the models folder
    if not found:
        fix = f"findmnt --target {path} says which disk it is on; mount it, or put a model in, then: systemctl reload appliance"
        yield Finding("models", "warning", f"0 models in {path}: is its disk mounted?", fix, book.pointer("", DISK))


def _packages(_patient: Patient) -> Iterator[Finding]:
    found = {name: _version(name) for name in ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx")}
    if found["onnxruntime"] and found["onnxruntime-gpu"]:
        text = "both onnxruntime and onnxruntime-gpu are installed; they share one folder and the later one wins"
        yield Finding("packages", "error", text, "pip uninstall both, then install the one you want")
    elif not found["onnxruntime"] and not found["onnxruntime-gpu"]:
        yield Finding("packages", "error", "onnxruntime is not installed", "pip install 'appliance[cpu]'")
    else:
        yield Finding("packages", "good", ", ".join(f"{name} {version}" for name, version in found.items() if version))


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _telemetry(_patient: Patient) -> Iterator[Finding]:
    """ONNX Runtime's wheels report home by default since 1.29; what it would send lies in the user's cache."""
    left = Path.home() / ".cache" / "Microsoft" / "DeveloperTools" / ".onnxruntime"
    if os.environ.get("ORT_DISABLE_TELEMETRY") != "1":
        yield Finding(
            "telemetry", "error", "ORT_DISABLE_TELEMETRY is not 1", "unset whatever sets it to something else"
        )
    elif left.exists():
        text = f"off here, but another program's ONNX Runtime has left its records in {left}"
        yield Finding(
            "telemetry", "warning", text, f"rm -r {left}; and export ORT_DISABLE_TELEMETRY=1 for that program"
        )
    else:
        yield Finding("telemetry", "good", "off, and no record of it")


def _providers(patient: Patient) -> Iterator[Finding]:
    from appliance.cli import doctor_devices

    yield from doctor_devices.providers(patient)


def _devices(patient: Patient) -> Iterator[Finding]:
    from appliance.cli import doctor_devices

    yield from doctor_devices.devices(patient)


def _memory(patient: Patient) -> Iterator[Finding]:
    from appliance.cli import doctor_memory

    yield from doctor_memory.memory(patient)


GPU_SCRIPT = """
import json, pathlib, sys, time, pynvml
from appliance.sensors.nvml import NvmlSampler
part = NvmlSampler(root=pathlib.Path(sys.argv[1])).sample(time.monotonic())
found = {"gpus": [], "findings": [[one.code, one.severity, one.subject, one.message, one.action] for one in part.findings]}
for gpu in part.gpus:
    told = {"index": gpu.index, "name": gpu.name, "state": gpu.state, "throttled_s": {}, "integrated": gpu.integrated}
    told |= {"mig_mode": gpu.mig_mode, "mig": [one.total_bytes for one in gpu.mig]}
    for name, reading in part.readings.items():
        if name.startswith(f"gpu.{gpu.index}.throttled.") and reading.value:
            told["throttled_s"][name.rpartition(".")[2]] = reading.value
    try:
        told["persistent"] = bool(pynvml.nvmlDeviceGetPersistenceMode(pynvml.nvmlDeviceGetHandleByIndex(gpu.index)))
    except (pynvml.NVMLError, AttributeError):
        told["persistent"] = None
    found["gpus"].append(told)
print(json.dumps(found))
"""
THROTTLED_S = 60.0
"""Less than that since the driver was loaded is a moment, not a habit."""


def _gpus(patient: Patient) -> Iterator[Finding]:
    """NVIDIA's driver, asked in a process of its own, which may hang: library and module, persistence mode, throttling since
    the driver was loaded. What the running appliance has told already is not said twice.
    """
    told = {(one.get("code"), one.get("subject")) for one in (patient.status or {}).get("findings") or ()}
    if ("sensor-silent", "nvml") in told:
        yield Finding("GPU", "note", "not asked: the driver hangs, and who asks it hangs, too")
        return
    try:
        code, output, complaint = _ask_driver(patient.config.sensors.root)
    except subprocess.TimeoutExpired:
        text = f"NVIDIA's driver does not answer within {DRIVER_PROBE_S:g} s: it hangs"
        yield Finding("GPU", "error", text, "reboot the box")
        return
    if code:
        last = (complaint.strip().splitlines() or ["no word"])[-1]
        yield Finding("GPU", "warning", f"cannot be looked at: {last}", "report this")
        return
    found = json.loads(output)
    for code, severity, subject, message, action in found["findings"]:
        if (code, subject) not in told:
            grade: Grade = "error" if severity == "critical" else "warning" if severity == "warning" else "note"
            kind, _, index = subject.partition(".")
            name = f"GPU {index}" if kind == "gpu" else "GPU"
            yield Finding(name, grade, message, action, book.pointer(name, code))
    if not found["gpus"] and not found["findings"]:
        yield Finding("GPU", "note", "no NVIDIA GPU or driver on this box")
    for gpu in found["gpus"]:
        # one that answers again after it was lost is not believed before the next start
        if ("gpu-lost", f"gpu.{gpu['index']}") not in told:
            yield from _gpu(gpu)


def _ask_driver(root: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of the script. TimeoutExpired: it was left behind, since what hangs in the kernel cannot be
    ended, and waiting for its end would hang us.
    """
    asked = subprocess.Popen(  # noqa: S603  our own interpreter and words
        [sys.executable, "-c", GPU_SCRIPT, root], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        output, complaint = asked.communicate(timeout=DRIVER_PROBE_S)
    except subprocess.TimeoutExpired:
        asked.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            asked.communicate(timeout=1.0)
        raise
    return asked.returncode, output, complaint


def _gpu(gpu: dict[str, Any]) -> Iterator[Finding]:
    name = f"GPU {gpu['index']}"
    if gpu["state"] == "OK":
        yield Finding(name, "good", ", ".join([gpu["name"], *_kind(gpu)]))
    if gpu["persistent"] is False:
        text = (
            "persistence mode is off: the driver unloads when nobody uses the GPU, and the first request waits for it"
        )
        yield Finding(name, "warning", text, "systemctl enable --now nvidia-persistenced")
    worst = {kind: seconds for kind, seconds in gpu["throttled_s"].items() if seconds >= THROTTLED_S}
    if worst:
        told = ", ".join(f"{kind.replace('_', ' ')} {seconds:.0f} s" for kind, seconds in sorted(worst.items()))
        text = f"slowed since the driver was loaded: {told}"
        fix = "better cooling or a higher power limit; `appliance history` shows when"
        yield Finding(name, "warning", text, fix)


def _kind(gpu: dict[str, Any]) -> Iterator[str]:
    """What is unusual about its memory."""
    if gpu["integrated"]:
        yield "shares the host's memory"
    if gpu["mig_mode"]:
        sizes = " + ".join("?" if size is None else f"{size / 1e9:.1f} GB" for size in gpu["mig"])
        yield f"MIG: {len(gpu['mig'])} instances ({sizes}), of which a worker gets one" if gpu["mig"] else "MIG"


def _disk(patient: Patient) -> Iterator[Finding]:
    from appliance.cli import doctor_places

    yield from doctor_places.disk(patient)


def _recorder(patient: Patient) -> Iterator[Finding]:
    """Whether it records, and what was damaged and put away."""
    from appliance.cli.records import SETS_ASIDE
    from appliance.config import recorder_path
    from appliance.recording.file import ANOTHERS

    if not patient.config.recorder.enabled:
        yield Finding(
            "recorder", "note", "is off: nothing will tell afterwards what happened", "recorder.enabled = true"
        )
        return
    path = recorder_path(patient.config)
    aside = sorted(
        file.name for file in path.parent.glob(f"{path.name}.damaged-*") if not file.name.endswith(("-wal", "-shm"))
    )
    if aside:
        text = f"a damaged record was put away as {aside[-1]}, and a new one begun"
        fix = f"look at the disk (dmesg, smartctl -a); then rm {path.parent}/{path.name}.damaged-*"
        yield Finding("recorder", "warning", text, fix)
    state = (patient.status or {}).get("recorder") or {}
    if state.get("problem"):
        fix = f"make room at {path.parent}, or see to the disk; it goes on by itself"
        if state["problem"] == ANOTHERS:
            fix = "set it, or stop the other one: this one goes on by itself"
        yield Finding("recorder", "error", f"does not record: {state['problem']}", fix)
    elif patient.status is None and (damage := _damage(path)):
        fix = f"look at the disk (dmesg, smartctl -a); `appliance serve` {SETS_ASIDE}"
        yield Finding("recorder", "warning", f"{path}: {damage}", fix)
    elif state.get("dropped"):
        yield Finding("recorder", "note", f"records; {state['dropped']} records were lost since the start")
    elif not aside:
        yield Finding("recorder", "good", "records" if state else f"would record into {path}")


def _damage(path: Path) -> str:
    """How the record is damaged, as far as a look at its head tells; whether it can be read at all is told elsewhere."""
    from appliance.cli.records import is_damaged
    from appliance.core.errors import ApplianceError
    from appliance.recording.reader import RecordReader

    try:
        RecordReader(path).series()
    except ApplianceError as error:
        return error.message if is_damaged(error) else ""
    return ""


def _permissions(patient: Patient) -> Iterator[Finding]:
    from appliance.cli import doctor_places

    yield from doctor_places.permissions(patient)


def _engines(patient: Patient) -> Iterator[Finding]:
    from appliance.building.store import KEY_FILE, EngineStore
    from appliance.lifecycle.compilation import engines_path

    path = engines_path(patient.config)
    if not path.is_dir():
        yield Finding("engines", "note", "none was built here")
        return
    # without a key none is ours; the store would make one, and who looks must change nothing
    entries = EngineStore(path).entries() if (path / KEY_FILE).is_file() else []
    folders = [folder for model in path.iterdir() if model.is_dir() for folder in model.iterdir() if folder.is_dir()]
    damaged = len([folder for folder in folders if not folder.name.startswith(".")]) - len(entries)
    failed = [entry for entry in entries if entry.sidecar.verified == "failed"]
    if damaged > 0:
        text = f"{damaged} kept engines are damaged, altered or from another box; they are never loaded"
        yield Finding("engines", "warning", text, "appliance engines prune --max-size-mb 20480")
    for entry in failed:
        text = f"{entry.model} {entry.sidecar.label} failed its verification: {entry.sidecar.reason}"
        yield Finding("engines", "warning", text, f"appliance verify {entry.model}")
    if damaged <= 0 and not failed:
        yield Finding("engines", "good", f"{len(entries)} kept, all whole and sealed by this box")


def _ports(patient: Patient) -> Iterator[Finding]:
    from appliance.cli import doctor_places

    yield from doctor_places.ports(patient)


def _clock(_patient: Patient) -> Iterator[Finding]:
    """adjtimex(2) with nothing to set: TIME_ERROR, or STA_UNSYNC in the status, means that nobody keeps the clock."""
    buffer = (ctypes.c_char * 256)()
    state = ctypes.CDLL(None, use_errno=True).adjtimex(buffer)
    # struct timex: modes, then (aligned) offset, freq, maxerror, esterror as longs, then the status as an int
    flags = ctypes.c_int.from_buffer(buffer, 8 + 4 * ctypes.sizeof(ctypes.c_long)).value
    if state < 0:
        yield Finding("clock", "note", "the kernel does not say whether it is kept")
    elif state == 5 or flags & STA_UNSYNC:
        text = "nobody keeps the clock: records of different boxes cannot be compared"
        yield Finding(
            "clock", "warning", text, "systemctl enable --now systemd-timesyncd (or chrony), with a server on site"
        )
    else:
        yield Finding("clock", "good", "synchronized")


def _hardening(patient: Patient) -> Iterator[Finding]:
    """What the kernel itself says of the running front: new privileges forbidden, system calls filtered."""
    if not patient.workers:
        return
    try:
        # a worker is the template's child, and that the front's
        template = _process(patient.workers[0]["pid"])["PPid"]
        values = _process(_process(template)["PPid"])
    except OSError:
        yield Finding("hardening", "note", "the appliance's processes cannot be looked at from here")
        return
    missing = []
    if values.get("NoNewPrivs") != "1":
        missing.append("it may gain privileges")
    if values.get("Seccomp") == "0":
        missing.append("its system calls are not filtered")
    if values.get("Uid", "").split()[:1] == ["0"]:
        missing.append("it runs as root")
    if missing:
        yield Finding("hardening", "warning", "; ".join(missing), "run it by its systemd unit rather than by hand")
    else:
        yield Finding("hardening", "good", "an ordinary user without new privileges, system calls filtered")


def _process(pid: int | str) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _sandbox(patient: Patient) -> Iterator[Finding]:
    """What workers and builds give up by themselves, as far as this kernel offers it."""
    if not patient.config.workers.sandbox:
        text = "switched off: workers and builds can do what the front can"
        yield Finding("sandbox", "warning", text, "remove workers.sandbox from appliance.toml")
        return
    offered = Sandbox.of_this_kernel()
    if offered.limits:
        text = f"of workers and builds, {offered.description}: {'; '.join(offered.limits)}"
        yield Finding("sandbox", "note", text, "a newer kernel offers more")
    else:
        text = f"workers and builds reach neither the network nor files that are not theirs ({offered.description})"
        yield Finding("sandbox", "good", text)


CHECKS: tuple[Check, ...] = (
    _running,
    _packages,
    _telemetry,
    _providers,
    _devices,
    _gpus,
    _permissions,
    _models,
    _engines,
    _disk,
    _recorder,
    _memory,
    _ports,
    _clock,
    _hardening,
    _sandbox,
)
