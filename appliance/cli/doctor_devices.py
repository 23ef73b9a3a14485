"""`doctor` on devices: whether the libraries of the wanted devices load, and whether each model runs where its manifest says.

The device in a manifest is a contract; a model that runs elsewhere is slower by a factor, or takes memory that others count on.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from appliance.cli.findings import Finding, Patient
from appliance.lifecycle.repository import Repository

PROBE_S = 60.0
SCRIPT = (
    "import sys\nfrom appliance.engines import providers\n"
    "for device in sys.argv[1:]: print(device + '\\t' + providers.missing(device))"
)


def full(device: str) -> str:
    """With its number: "cuda" is the first one."""
    return "cuda:0" if device == "cuda" else device


def devices(patient: Patient) -> Iterator[Finding]:
    """Each running model against its manifest."""
    versions: dict[tuple[str, str], list[dict[str, object]]] = {}
    for worker in patient.workers:
        versions.setdefault((str(worker["model"]), str(worker["version"])), []).append(worker)
    right = []
    for (model, version), workers in sorted(versions.items()):
        wrong = [worker for worker in workers if full(str(worker["configured_device"])) != worker["device"]]
        if not wrong:
            right.append(f"{model} on {workers[0]['device']} by {workers[0]['provider']}")
            continue
        asked, runs = full(str(wrong[0]["configured_device"])), f"{wrong[0]['device']} by {wrong[0]['provider']}"
        details = wrong[0].get("details")
        reason = details.get("fallback", "") if isinstance(details, dict) else ""
        text = f"{model} version {version} is configured for {asked} and runs on {runs}"
        if reason:
            yield Finding(
                "devices", "warning", f"{text}: {reason}", 'mend that, or set device = "cpu" in its model.toml'
            )
        else:
            yield Finding("devices", "error", text, f"appliance models load {model}; if it stays, report it")
    if right:
        yield Finding("devices", "good", ", ".join(right))


def providers(patient: Patient) -> Iterator[Finding]:
    """In a process of its own: a library that cannot be loaded may end whoever tries."""
    wanted = {"cpu"} | _configured(patient)
    if Path("/proc/driver/nvidia/version").exists():
        wanted.add("cuda")
    done = subprocess.run(  # noqa: S603  our own interpreter and words
        [sys.executable, "-c", SCRIPT, *sorted(wanted)], capture_output=True, text=True, timeout=PROBE_S, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        yield Finding("providers", "error", f"ONNX Runtime cannot be loaded: {last}", "reinstall it")
        return
    for line in done.stdout.splitlines():
        device, _, problem = line.partition("\t")
        if problem:
            yield Finding("providers", "error", f"{device}: {problem}", "docs/compiling.md, the device contract")
        else:
            yield Finding("providers", "good", f"{device} loads")


def _configured(patient: Patient) -> set[str]:
    """The devices that ONNX Runtime is wanted on: of the workers that it runs, or else of the manifests in the models folder."""
    if patient.workers:
        return {
            full(str(worker["configured_device"])).partition(":")[0]
            for worker in patient.workers
            if str(worker["provider"]).endswith("ExecutionProvider")
        }
    try:
        folders = Repository(Path(patient.config.repository.path)).scan().values()
    except OSError:
        return set()
    return {
        folder.manifest.device.partition(":")[0]
        for folder in folders
        if folder.manifest.engine in ("", "onnxruntime") and not folder.problem
    }
