"""A verification as a page that people can read: one file, no script, nothing fetched, light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from appliance.building.comparison import Classification, OutputComparison, Regression, shown
from appliance.building.evaluation import Evaluation
from appliance.building.verification import Report

STYLE = """
:root { color-scheme: light dark; --line: #8884; --bar: #2f6fb7; --good: #1a7f37; --bad: #c62828; }
@media (prefers-color-scheme: dark) { :root { --bar: #6ea8e5; --good: #4cc36b; --bad: #ff7b72; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.verdict { font-weight: 600; } .good { color: var(--good); } .bad { color: var(--bad); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem .25rem 0; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, .words { text-align: left; }
th { font-weight: 500; opacity: .75; }
.wide { overflow-x: auto; } figure { margin: 1rem 0; } figcaption { opacity: .75; font-size: .9rem; }
.confusion td { text-align: center; min-width: 1.6rem; padding: .25rem; border: 1px solid var(--line); }
svg text { fill: currentColor; font: 11px system-ui, sans-serif; } svg rect { fill: var(--bar); }
"""

MAX_CONFUSION = 40
"""More classes than that are no picture any more; the JSON has them all."""

PLOT_WIDTH, PLOT_HEIGHT, PLOT_FOOT = 480, 130, 18


def page(report: Report) -> str:
    """The report as HTML."""
    verdict = "passed: it may serve" if report.passed else "failed: it does not serve"
    title = f"{report.model} version {report.version}: {report.label}"
    parts = _opening(title, verdict, good=report.passed)
    if report.failures:
        parts.append("<ul>" + "".join(f"<li>{escape(text)}</li>" for text in report.failures) + "</ul>")
    parts.append(f"<p>{report.rows} rows of input, {escape(report.inputs)}.</p>")
    parts.append(_speed(report))
    allowed = report.tolerance
    parts.append(
        "<h2>Answers beside the reference</h2><p>Allowed: largest relative error "
        f"{allowed.max_relative:g} of an output's largest magnitude, cosine similarity at least {allowed.min_cosine:g}, "
        f"unequal elements {allowed.mismatch:.1%}, loss in the task {allowed.metric_drop:.1%}.</p>"
    )
    parts.append(_outputs(report.outputs))
    parts += [_histogram(output) for output in report.outputs if sum(output.histogram)]
    if report.invariance:
        parts += ["<h2>A row alone and the same row in a batch</h2>", _outputs(report.invariance)]
    parts += _metrics(report)
    parts.append("</body></html>\n")
    return "\n".join(parts)


def _opening(title: str, verdict: str, *, good: bool) -> list[str]:
    return [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>',
        f"<h1>{escape(title)}</h1>",
        f'<p class="verdict {"good" if good else "bad"}">{verdict}</p>',
    ]


def evaluation_page(found: Evaluation, problems: Sequence[str]) -> str:
    """An evaluation as HTML, with what is wrong with it in words."""
    title = f"{found.model} version {found.version} at {found.address}"
    parts = _opening(title, "not good enough" if problems else "good", good=not problems)
    if problems:
        parts.append("<ul>" + "".join(f"<li>{escape(text)}</li>" for text in problems) + "</ul>")
    parts.append(f"<p>{found.answered} of {found.samples} samples answered in {found.seconds:.1f} s.</p>")
    if found.latency_ms is not None:
        times = found.latency_ms
        row = [f"{value:.2f}" for value in (times.p50, times.p90, times.p99, times.largest, times.mean)]
        parts.append(_table(("A request, ms", "p50", "p90", "p99", "largest", "mean"), [("", *row)]))
    metric = found.metric
    if isinstance(metric, Regression):
        parts.append(
            _table(
                ("In the task", "MSE", "MAE"),
                [(f"{metric.samples} samples", shown(metric.mse, ".5g"), shown(metric.mae, ".5g"))],
            )
        )
    elif isinstance(metric, Classification):
        shares = [("macro", f"{metric.precision:.4f}", f"{metric.recall:.4f}", f"{metric.f1:.4f}", f"{metric.samples}")]
        shares += [
            (item.label, f"{item.precision:.4f}", f"{item.recall:.4f}", f"{item.f1:.4f}", f"{item.support}")
            for item in metric.classes
        ]
        tops = "".join(f", top {k}: {share:.4f}" for k, share in found.top_k.items())
        parts.append(f"<h2>In the task: accuracy {metric.accuracy:.4f}{tops}</h2>")
        parts.append(_table(("Class", "precision", "recall", "F1", "samples"), shares))
        if len(metric.classes) <= MAX_CONFUSION:
            parts.append(_confusion(metric, found.model))
    if found.outputs:
        parts += ["<h2>Answers beside the reference</h2>", _outputs(found.outputs)]
        parts += [_histogram(output) for output in found.outputs if sum(output.histogram)]
    if found.failures:
        rows = [(", ".join(item.samples), item.code, item.message) for item in found.failures]
        parts += ["<h2>Not answered</h2>", _table(("Samples", "code", "why"), rows)]
    parts.append("</body></html>\n")
    return "\n".join(parts)


def _speed(report: Report) -> str:
    if not report.candidate_s:
        return ""
    return _table(
        ("One row", "provider", "median"),
        [
            ("reference", report.reference_provider, f"{report.reference_s * 1000:.3f} ms"),
            (report.label, report.candidate_provider, f"{report.candidate_s * 1000:.3f} ms"),
        ],
    )


def _outputs(outputs: Sequence[OutputComparison]) -> str:
    rows = [
        (
            output.name,
            output.datatype,
            f"{output.elements:,}",
            *(
                (output.problem, "", "", "", "")
                if output.problem
                else (
                    shown(output.max_absolute, ".3g"),
                    shown(output.mean_absolute, ".3g"),
                    shown(output.max_relative, ".3g"),
                    shown(output.mean_relative, ".3g"),
                    f"{output.cosine:.6f}",
                )
            ),
            f"{output.mismatch:.2%}",
        )
        for output in outputs
    ]
    head = ("Output", "type", "elements", "max abs", "mean abs", "max rel", "mean rel", "cosine", "unequal")
    return _table(head, rows)


def _histogram(output: OutputComparison) -> str:
    """Absolute errors in equal bins; heights by the square root, so that the rare large ones are seen."""
    tallest = max(output.histogram) ** 0.5
    step = PLOT_WIDTH / len(output.histogram)
    bars = []
    for index, count in enumerate(output.histogram):
        height = count**0.5 / tallest * PLOT_HEIGHT
        bars.append(
            f'<rect x="{index * step:.1f}" y="{PLOT_HEIGHT - height:.1f}" width="{step - 1.5:.1f}" height="{height:.1f}">'
            f"<title>{count:,} elements</title></rect>"
        )
    return (
        f'<figure><svg width="{PLOT_WIDTH}" height="{PLOT_HEIGHT + PLOT_FOOT}" role="img">{"".join(bars)}'
        f'<text x="0" y="{PLOT_HEIGHT + 14}">0</text>'
        f'<text x="{PLOT_WIDTH}" y="{PLOT_HEIGHT + 14}" text-anchor="end">{shown(output.max_absolute, ".3g")}</text></svg>'
        f"<figcaption>{escape(output.name)}: elements by absolute error (height: square root of the count)</figcaption></figure>"
    )


def _metrics(report: Report) -> list[str]:
    reference, candidate = report.metric_reference, report.metric_candidate
    if reference is None or candidate is None:
        return []
    head = f"<h2>In the task: {reference.samples} samples</h2>"
    if isinstance(reference, Regression) or isinstance(candidate, Regression):
        assert isinstance(reference, Regression)
        assert isinstance(candidate, Regression)
        rows = [
            ("reference", shown(reference.mse, ".5g"), shown(reference.mae, ".5g")),
            (report.label, shown(candidate.mse, ".5g"), shown(candidate.mae, ".5g")),
        ]
        return [head, _table(("", "mean squared error", "mean absolute error"), rows)]
    shares = [
        (name, *(f"{value:.4f}" for value in (metric.accuracy, metric.precision, metric.recall, metric.f1)))
        for name, metric in (("reference", reference), (report.label, candidate))
    ]
    parts = [head, _table(("", "accuracy", "precision", "recall", "F1"), shares)]
    if len(candidate.classes) <= MAX_CONFUSION:
        parts.append(_confusion(candidate, report.label))
    return parts


def _confusion(metric: Classification, label: str) -> str:
    names = [escape(item.label) for item in metric.classes]
    lines = ["<tr><th></th>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"]
    for name, row in zip(names, metric.confusion, strict=True):
        total = sum(row) or 1
        cells = "".join(
            f'<td style="background: color-mix(in srgb, var(--bar) {round(count / total * 60)}%, transparent)">{count or ""}</td>'
            for count in row
        )
        lines.append(f"<tr><th>{name}</th>{cells}</tr>")
    return (
        f'<figure class="wide"><table class="confusion">{"".join(lines)}</table>'
        f"<figcaption>{escape(label)}: rows are true classes, columns what was answered</figcaption></figure>"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of words to the left, of numbers to the right."""
    rows = list(rows)
    words = [any(row[column][:1].isalpha() for row in rows) for column in range(len(head))]
    lines = [_line("th", head, words), *(_line("td", row, words) for row in rows)]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _line(tag: str, cells: Sequence[str], words: Sequence[bool]) -> str:
    marks = [' class="words"' if word else "" for word in words]
    return "<tr>" + "".join(f"<{tag}{m}>{escape(c)}</{tag}>" for c, m in zip(cells, marks, strict=True)) + "</tr>"
