"""Turn a bare ONNX file into an engine for this box, outside of any repository, and check that it answers as the file does.

    python tools/compile_model.py model.onnx --precision int8 --calibration pictures/ --output engine/
    python tools/compile_model.py model.onnx --precision fp16 --samples labelled.npz --json

Writes the engine with verification.json and verification.html into --output. The exit status is 0; 1 if it cannot be built or
does not agree with the file (then only the report is written); 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, Python only knows its own folder

import msgspec
import tomlkit

from appliance.building.compilation import keep_report
from appliance.building.inspect import InspectError, inspect
from appliance.building.store import REPORT_JSON, REPORT_PAGE, SIDECAR
from appliance.cli.engines import ENGINES, PRECISIONS, chosen, compile_folder, model_folder, say_report
from appliance.cli.output import CommandError, Exit, note, print_json
from appliance.config import ConfigError, find, load


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="default: NAME-engine beside the model; must not exist"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="as-is")
    parser.add_argument("--engine", choices=ENGINES, default="onnxruntime")
    parser.add_argument(
        "--calibration", type=Path, help="for int8: a folder of pictures or .npz files of typical inputs"
    )
    parser.add_argument("--samples", type=Path, help="labelled: a folder with a subfolder per label, or an .npz")
    parser.add_argument("--labels", type=Path, help="a file with a label a line")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(given: list[str] | None = None) -> int:
    """Compile, print, and say by the exit status whether the engine may serve."""
    options = arguments().parse_args(given)
    output = options.output or options.model.with_name(f"{options.model.stem}-engine")
    try:
        if output.exists():
            raise CommandError(Exit.USAGE, "EXISTS", f"{output} exists already", "name another with --output")
        with tempfile.TemporaryDirectory(prefix="compile-") as scratch:
            document, passed = make(options, Path(scratch), output)
    except CommandError as error:
        note(f"compile_model: {error.message}" + (f"\n  → {error.hint}" if error.hint else ""))
        return int(error.code)
    except ConfigError as error:
        note("compile_model: " + "; ".join(map(str, error.problems)))
        return int(Exit.CONFIG)
    except OSError as error:
        note(f"compile_model: {error.filename or output}: {error.strerror}")
        return int(Exit.FAILED)
    except KeyboardInterrupt:
        return 130
    if options.json:
        print_json(document)
    note(f"wrote {output}" if passed else f"failed: only the report was written to {output}")
    return int(Exit.OK if passed else Exit.FAILED)


def make(options: argparse.Namespace, scratch: Path, output: Path) -> tuple[dict[str, Any], bool]:
    """Build in a repository of its own, and copy what came of it."""
    name = arrange(options, scratch / "models")
    config = load(
        find(), overrides=[f'repository.path="{scratch / "models"}"', f'engines.path="{scratch / "engines"}"']
    )
    folder, _ = chosen(model_folder(config, name), options.precision, options.engine)
    outcome, report, _ = compile_folder(config, folder, 1, force=False)
    staging = scratch / "done"
    staging.mkdir()
    keep_report(staging, report)
    if report.passed:
        source = Path(outcome.folder) if outcome is not None else scratch / "models" / name / "1"
        # the seal is worth something only in the store of the box that made it
        ignored = shutil.ignore_patterns(SIDECAR, REPORT_JSON, REPORT_PAGE)
        shutil.copytree(source, staging, ignore=ignored, dirs_exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(staging, output)
    if not options.json:
        say_report(report)
    engine = outcome.label if outcome is not None else "onnxruntime"
    return {"engine": engine, "output": str(output), "report": msgspec.to_builtins(report)}, report.passed


def arrange(options: argparse.Namespace, repository: Path) -> str:
    """A model folder with the file, its external data, calibration and samples; the model's name."""
    try:
        found = inspect(options.model)
    except InspectError as error:
        raise CommandError(Exit.USAGE, "NOT_A_MODEL", f"{options.model} {error}") from error
    if (
        options.precision == "int8"
        and options.calibration is None
        and not (options.samples and options.samples.is_dir())
    ):
        raise CommandError(
            Exit.USAGE,
            "NO_CALIBRATION",
            "int8 needs calibration samples",
            "--calibration FOLDER with typical inputs: pictures, or .npz files with an array for each input",
        )
    name = re.sub(r"[^A-Za-z0-9._-]", "-", options.model.stem).lstrip("._-") or "model"
    folder = repository / name
    (folder / "1").mkdir(parents=True)
    shutil.copy(options.model, folder / "1" / "model.onnx")
    for beside in found.external_data:
        (folder / "1" / beside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(options.model.parent / beside, folder / "1" / beside)
    manifest: dict[str, Any] = {}
    for table, key, place in (("build", "calibration", options.calibration), ("verify", "samples", options.samples)):
        if place is None:
            continue
        if not place.exists():
            raise CommandError(Exit.USAGE, "NO_FILE", f"--{key}: {place} is not there")
        kept = key if place.is_dir() else f"{key}{place.suffix}"
        (shutil.copytree if place.is_dir() else shutil.copy)(place, folder / kept)
        manifest[table] = {key: kept}
    if options.labels is not None:
        shutil.copy(options.labels, folder / "labels.txt")
    (folder / "model.toml").write_text(tomlkit.dumps(manifest))
    return name


if __name__ == "__main__":
    sys.exit(main())
