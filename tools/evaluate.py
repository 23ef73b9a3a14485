"""Measure a model of a running appliance on labelled samples: what it gets right, how long it takes, what it does not answer.

    python tools/evaluate.py digits tcp://127.0.0.1:5570 models/digits/golden/batch_32.npz --repository models
    python tools/evaluate.py digits http://127.0.0.1:8000 samples/ --labels labels.txt --min-accuracy 0.95 --report out.html

SAMPLES is a folder with one subfolder per label, or an .npz with an array for each input and `labels` (or `target`). The exit
status is 0; 1 if a request failed or a limit was missed; 2 for wrong arguments or samples; 3 if no appliance answers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, Python only knows its own folder

import msgspec

from appliance.building import evaluation, report
from appliance.building.comparison import DEFAULTS, Classification, Regression, shown, tolerance
from appliance.building.pictures import SampleError, SampleSource
from appliance.building.runner import Runner
from appliance.cli.asking import Asking
from appliance.cli.engines import progress_bar
from appliance.cli.output import CommandError, Exit, note, print_json, print_table
from appliance.client import Description
from appliance.core.manifest import ModelManifest, PreprocessingManifest
from appliance.core.request import ModelName
from appliance.engines.base import EngineError, EngineOptions
from appliance.lifecycle.repository import Repository


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("address", help="http://HOST:PORT, unix:/PATH, tcp://HOST:PORT or ipc://PATH")
    parser.add_argument("samples", type=Path)
    parser.add_argument("--model-version", default="", help="default: the newest that is ready")
    parser.add_argument("--repository", type=Path, help="take preprocessing, labels and tolerances from the model here")
    parser.add_argument("--labels", type=Path, help="a file with a label a line")
    parser.add_argument("--output", default="", help="the output to judge (default: the first)")
    picture = parser.add_argument_group("preprocessing of pictures, where the repository does not say it")
    picture.add_argument("--layout", choices=("NHWC", "NCHW"))
    picture.add_argument("--channels", choices=("L", "RGB", "BGR"))
    picture.add_argument("--resize", choices=("stretch", "letterbox", "crop"))
    picture.add_argument("--scale", type=float)
    picture.add_argument("--mean", type=float, nargs="+")
    picture.add_argument("--std", type=float, nargs="+")
    parser.add_argument("--batch", type=_positive, default=1, help="rows in a request (default: 1)")
    parser.add_argument("--concurrency", type=_positive, default=4, help="requests in flight (default: 4)")
    parser.add_argument("--timeout", type=float, default=10.0, metavar="S", help="for each request (default: 10)")
    parser.add_argument("--limit", type=int, default=0, help="at most so many samples, evenly from all")
    parser.add_argument("--top-k", type=_positive, nargs="+", default=[], metavar="K")
    parser.add_argument(
        "--reference", type=Path, metavar="ONNX", help="compare with this model on the CPU, as the gate does"
    )
    parser.add_argument("--precision", choices=tuple(DEFAULTS), help="whose tolerances hold for --reference")
    parser.add_argument("--min-accuracy", type=float, default=0.0, metavar="SHARE")
    parser.add_argument("--max-mse", type=float, default=float("inf"), metavar="ERROR")
    parser.add_argument("--report", type=Path, metavar="HTML", help="write a page")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return value


def main(given: list[str] | None = None) -> int:
    """Measure, print, and say by the exit status whether all was well."""
    options = arguments().parse_args(given)
    try:
        manifest, labels = described(options)
        found = asyncio.run(run(options, manifest, labels))
        problems = found.problems(min_accuracy=options.min_accuracy, max_mse=options.max_mse)
        if options.report is not None:
            options.report.write_text(report.evaluation_page(found, problems))
    except CommandError as error:
        note(f"evaluate: {error.message}" + (f"\n  → {error.hint}" if error.hint else ""))
        return int(error.code)
    except (SampleError, EngineError, ValueError, OSError) as error:
        note(f"evaluate: {error}")
        return int(Exit.USAGE)
    except KeyboardInterrupt:
        return 130
    if options.json:
        print_json(msgspec.to_builtins(found, str_keys=True) | {"passed": not problems, "problems": problems})
    else:
        show(found, problems)
    return int(Exit.FAILED if problems else Exit.OK)


def described(options: argparse.Namespace) -> tuple[ModelManifest, tuple[str, ...]]:
    """Manifest and labels by the repository and the options. CommandError if the repository has no such model."""
    manifest, labels = ModelManifest(), ()
    if options.repository is not None:
        folder = Repository(options.repository).read(ModelName(options.model))
        if folder is None or folder.problem:
            why = folder.problem if folder is not None else "it is not there"
            raise CommandError(Exit.USAGE, "NO_MODEL", f"{options.repository} has no model {options.model!r}: {why}")
        manifest, labels = folder.manifest, folder.labels
    if options.labels is not None:
        labels = tuple(line.strip() for line in options.labels.read_text().splitlines())
    wanted = {
        name: tuple(value) if isinstance(value, list) else value
        for name in PreprocessingManifest.__struct_fields__
        if (value := getattr(options, name, None)) is not None
    }
    preprocessing = msgspec.structs.replace(manifest.preprocessing, **wanted)
    return msgspec.structs.replace(manifest, preprocessing=preprocessing), labels


async def run(options: argparse.Namespace, manifest: ModelManifest, labels: tuple[str, ...]) -> evaluation.Evaluation:
    """Ask about every sample and judge the answers."""
    asking = Asking(
        options.address,
        options.model,
        options.model_version,
        timeout_s=options.timeout,
        concurrency=options.concurrency,
    )
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(asking)
        model = await asking.describe()
        labels = labels or model.labels
        output = options.output or model.outputs[0].name
        if output not in [spec.name for spec in model.outputs]:
            names = ", ".join(spec.name for spec in model.outputs)
            raise CommandError(Exit.USAGE, "NO_OUTPUT", f"the model has no output {output!r}; it has {names}")
        beside = None
        if options.reference is not None:
            beside = stack.enter_context(contextlib.closing(reference(options.reference, model)))
        source = SampleSource(options.samples, model.inputs, manifest.preprocessing, labels, limit=options.limit)
        samples = list(source)
        if not samples:
            raise SampleError(f"{options.samples} holds no samples")
        done = 0
        with progress_bar(f"{options.model} at {options.address}") as on_percent:

            def step(rows: int) -> None:
                nonlocal done
                done += rows
                on_percent("asking", 100 * done / len(samples))

            answers = await evaluation.gather(
                samples, asking, batch=options.batch, concurrency=options.concurrency, on_done=step
            )
        compared = evaluation.against(beside, answers) if beside is not None else ()
    return evaluation.judge(
        answers,
        model=options.model,
        version=model.version,
        address=options.address,
        output=output,
        labels=labels,
        top=options.top_k,
        compared=compared,
        tolerance=tolerance(options.precision or manifest.precision, manifest.verify) if compared else None,
    )


def reference(file: Path, model: Description) -> Runner:
    """The file on ONNX Runtime's CPU provider. CommandError if it takes, or gives, something else than the model."""
    runner = Runner(EngineOptions("onnxruntime", str(file), "cpu", 0, 1, ModelManifest().onnxruntime, {}, ""))
    for kind, wanted, came in (
        ("inputs", model.inputs, runner.traits.inputs),
        ("outputs", model.outputs, runner.traits.outputs),
    ):
        first, second = ({spec.name: spec.datatype.value for spec in specs} for specs in (wanted, came))
        if first != second:
            runner.close()
            said, other = (", ".join(f"{name} {kind}" for name, kind in specs.items()) for specs in (first, second))
            raise CommandError(
                Exit.USAGE,
                "NO_REFERENCE",
                f"--reference {file} is of another model: its {kind} are {other}, not {said}",
            )
    return runner


def show(found: evaluation.Evaluation, problems: list[str]) -> None:
    """For people: metrics by class, latency, comparison, failures."""
    metric = found.metric
    if isinstance(metric, Classification):
        rows = [
            (item.label, f"{item.precision:.4f}", f"{item.recall:.4f}", f"{item.f1:.4f}", item.support)
            for item in metric.classes
        ]
        rows.append(("macro", f"{metric.precision:.4f}", f"{metric.recall:.4f}", f"{metric.f1:.4f}", metric.samples))
        print_table(("CLASS", "PRECISION", "RECALL", "F1", "SAMPLES"), rows)
        print_table(
            ("TRUE\\SAID", *(item.label for item in metric.classes)),
            [(item.label, *row) for item, row in zip(metric.classes, metric.confusion, strict=True)],
        )
        tops = "".join(f", top {k}: {share:.4f}" for k, share in found.top_k.items())
        print(f"accuracy {metric.accuracy:.4f}{tops} ({metric.samples} samples)")
    elif isinstance(metric, Regression):
        print(f"MSE {shown(metric.mse, '.6g')}, MAE {shown(metric.mae, '.6g')} ({metric.samples} samples)")
    for output in found.outputs:
        largest, mean = shown(output.max_absolute, ".3g"), shown(output.mean_absolute, ".3g")
        errors = f"max abs {largest}, mean abs {mean}, cosine {output.cosine:.6f}"
        print(f"{output.name} beside the reference: {output.problem or errors}")
    if found.latency_ms is not None:
        times = found.latency_ms
        note(f"requests: p50 {times.p50:.2f}, p90 {times.p90:.2f}, p99 {times.p99:.2f}, largest {times.largest:.2f} ms")
    for failure in found.failures:
        names = ", ".join(failure.samples[:3]) + (" …" if len(failure.samples) > 3 else "")
        note(f"not answered: {names}: {failure.code}: {failure.message}")
    for problem in problems:
        note(f"failed: {problem}")


if __name__ == "__main__":
    sys.exit(main())
