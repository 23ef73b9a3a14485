"""Rules, dashboard and page name only metrics and labels that the code can render; every alert is tested; promtool agrees."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.observability.metrics import FAMILIES
from tools import metrics_docs

DOCS = Path(__file__).parents[2] / "docs"
RULES = DOCS / "prometheus" / "appliance.rules.yml"
RULES_TEST = DOCS / "prometheus" / "appliance.rules.test.yml"
DASHBOARD = DOCS / "grafana" / "appliance.json"
TARGET_LABELS = {"job", "instance"}
"""What Prometheus adds to every series."""

SERIES = {
    name: {*family.labels, *TARGET_LABELS, *({"le"} if family.kind == "histogram" else ())}
    for family in FAMILIES
    for name in (
        [f"{family.name}_{suffix}" for suffix in ("bucket", "sum", "count")]
        if family.kind == "histogram"
        else [family.name]
    )
}
NAME = re.compile(r"\b(?:nv|appliance)_\w+")
SELECTOR = re.compile(r"\b((?:nv|appliance)_\w+)\{([^}]*)\}")
GROUPED = re.compile(r"\b(?:by|on)\s*\(([^)]*)\)")
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)"
)


def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text())  # type: ignore[no-any-return]  # a JSON object


def expressions(text: str) -> list[str]:
    return re.findall(r"^\s+expr: (.+)$", text, re.MULTILINE)


def queries() -> Iterator[str]:
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            yield target["expr"]
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]


def complaints(expression: str) -> list[str]:
    """What that expression names and does not exist."""
    found = [name for name in NAME.findall(expression) if name not in SERIES]
    for name, matchers in SELECTOR.findall(expression):
        matched = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)
        found += [f"{name} has no label {label}" for label in matched if label not in SERIES.get(name, set())]
    labels = set().union(*(SERIES.get(name, set()) for name in NAME.findall(expression)))
    for clause in GROUPED.findall(expression):
        found += [f"no series has {label}" for label in re.findall(r"\w+", clause) if label not in labels]
    return found


def test_a_misspelt_name_or_label_is_found() -> None:
    assert complaints("sum by (model) (rate(nv_inference_count[5m]))") == []
    assert complaints("appliance_governer_level > 1") == ["appliance_governer_level"]
    assert complaints('appliance_gpu_power_watts{gpus="0"}') == ["appliance_gpu_power_watts has no label gpus"]
    assert complaints("sum by (modle) (nv_inference_count)") == ["no series has modle"]
    assert complaints("appliance_request_duration_seconds > 1") == ["appliance_request_duration_seconds"]


def test_rules_name_only_what_exists() -> None:
    found = [expression for expression in expressions(RULES.read_text()) if NAME.search(expression)]
    assert len(found) > 20
    assert {expression: complaints(expression) for expression in found if complaints(expression)} == {}


def test_the_rules_test_feeds_only_series_that_exist() -> None:
    fed = re.findall(r"series: '([^']+)'", RULES_TEST.read_text())
    assert len(fed) > 40
    assert [wrong for series in fed for wrong in complaints(series)] == []


def test_every_alert_is_tested_and_says_what_to_do() -> None:
    blocks = RULES.read_text().split("- alert: ")[1:]
    raised = re.findall(r'alertname="(\w+)"\}', RULES_TEST.read_text().partition("everything wrong")[2])
    assert {block.split("\n")[0] for block in blocks} == set(raised)
    for block in blocks:
        assert "severity: " in block
        assert "summary: " in block
        assert "action: " in block


def test_the_dashboard_names_only_what_exists() -> None:
    found = list(queries())
    assert len(found) > 40
    assert {query: complaints(query) for query in found if complaints(query)} == {}


def test_the_dashboards_panels_are_whole_and_do_not_overlap() -> None:
    document = dashboard()
    ids = [panel["id"] for panel in document["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in document["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken
        taken |= cells
        assert panel["title"]
        if panel["type"] != "row":
            references = [target["refId"] for target in panel["targets"]]
            assert references
            assert len(references) == len(set(references))
    rows = [panel["title"] for panel in document["panels"] if panel["type"] == "row"]
    assert rows == ["Overview", "Latency", "Models", "GPU", "Host", "Energy"]


def test_every_variable_that_a_query_uses_is_declared() -> None:
    declared = {variable["name"] for variable in dashboard()["templating"]["list"]} | {"__rate_interval"}
    used = set(re.findall(r"\$\{?(\w+)", " ".join(queries())))
    assert used <= declared


def test_the_page_lists_every_metric_as_the_code_has_it() -> None:
    text = metrics_docs.PAGE.read_text()
    assert metrics_docs.page(text) == text, "run `make docs`"


@needs_promtool
@pytest.mark.slow
def test_promtool_accepts_the_rules_and_each_alert_is_raised_when_it_should() -> None:
    for command in (
        ["check", "rules", RULES.name],
        ["check", "config", "prometheus.yml"],
        ["test", "rules", RULES_TEST.name],
    ):
        done = subprocess.run(
            ["promtool", *command], cwd=RULES.parent, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
