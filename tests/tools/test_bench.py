"""The benchmark's parts: cells, networks, verification, ratios, targets, and what is printed. Nothing here measures anything."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from rich.console import Console

from appliance.cli.load import Kept, Result
from tools.benchmark import report as reports
from tools.benchmark.cells import SUBJECTS, Cell, agree, parse, plan, rows, standard, truth, verify
from tools.benchmark.networks import NETWORKS, write_model
from tools.benchmark.rounds import ratios
from tools.benchmark.targets import targets

DIGITS = Path(__file__).parents[2] / "models" / "digits"


@pytest.mark.parametrize("name", NETWORKS)
def test_network_is_the_same_every_time(name: str) -> None:
    assert NETWORKS[name]().SerializeToString() == NETWORKS[name]().SerializeToString()


@pytest.mark.parametrize("name", SUBJECTS)
def test_network_answers_rows_in_any_batch_alike_and_tells_them_apart(name: str, tmp_path: Path) -> None:
    model_file = write_model(tmp_path, name, DIGITS) / "1" / "model.onnx"
    alone = truth(name, model_file)  # raises if two rows are answered alike
    subject = SUBJECTS[name]
    kind = np.uint8 if subject.datatype == "UINT8" else np.float32
    batch = np.concatenate([np.frombuffer(row.data, kind).reshape(subject.shape) for row in rows(name)])
    session = ort.InferenceSession(str(model_file), providers=["CPUExecutionProvider"])
    [together] = session.run(None, {subject.input: batch})
    assert all(agree(found, expected) for found, expected in zip(together, alone, strict=True))
    assert {len(answer) for answer in alone} == {subject.answers}
    onnx.checker.check_model(str(model_file))


def test_digits_is_measured_as_it_is_served(tmp_path: Path) -> None:
    assert (write_model(tmp_path, "digits", DIGITS) / "model.toml").read_text() == (DIGITS / "model.toml").read_text()


def test_cells_are_named_as_they_are_asked_for() -> None:
    cells = parse("digits:zmq-ipc:1,16,500/s")
    assert [cell.name for cell in cells] == ["digits:zmq-ipc:1", "digits:zmq-ipc:16", "digits:zmq-ipc:500/s"]
    assert [cell.rate_per_s for cell in cells] == [0, 0, 500]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("fingers:zmq-ipc:1", "fingers"),
        ("digits:carrier-pigeon:1", "carrier-pigeon"),
        ("digits:zmq-ipc", "''"),
        ("digits:zmq-ipc:many", "many"),
        ("digits:zmq-ipc:0", "'0'"),
        ("digits:zmq-ipc:fast/s", "fast/s"),
        ("digits:zmq-ipc:nan/s", "nan/s"),
    ],
)
def test_cell_that_does_not_exist_is_refused_by_its_wrong_word(text: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        parse(text)


def test_standard_cells_are_enough_for_every_target() -> None:
    cells = standard(list(SUBJECTS), quick=True)
    for cell in cells:
        keys = ("share_of_raw_best", "share_of_raw_batch_1", "share_of_echo", "over_limit_ms", "cpu_s_per_1000")
        cell.rounds.append(dict.fromkeys(keys, 1.0))
    report = {"server": {"digits": [{"pss_mb": 1.0, "ready_s": 1.0}]}}
    assert "not measured" not in [verdict.word for verdict in reports.judge(cells, report)]


def test_plan_sends_different_rows_over_every_transport() -> None:
    for transport in ("zmq-ipc", "http-binary", "http-json"):
        requests = plan(Cell("digits", transport, 4), "address", 1.0).requests
        assert len(set(requests)) == len(requests) > 1
    frames = plan(Cell("digits", "zmq-ipc", 4), "address", 1.0).requests[0]
    assert [len(frame) for frame in frames[2:]] == [4 * 28 * 28]
    assert json.loads(frames[1])["inputs"] == [
        {"name": "image", "datatype": "FP32", "shape": [1, 28, 28, 1], "frame": 0}
    ]


def result(*kept: Kept, errors: int = 0, unanswered: int = 0) -> Result:
    return Result(1, 1.0, [0.001], 1, errors, unanswered, "busy" if errors else "", list(kept))


ANSWERS = [np.arange(10, dtype=np.float32), np.arange(10, dtype=np.float32) * 2]


def test_rows_that_were_mixed_up_are_noticed() -> None:
    cell = Cell("digits", "zmq-ipc", 1)
    verify(result(Kept(1, ANSWERS[1].tobytes()), Kept(0, ANSWERS[0].tobytes())), cell, ANSWERS)
    with pytest.raises(RuntimeError, match="differs"):
        verify(result(Kept(0, ANSWERS[1].tobytes())), cell, ANSWERS)


def test_json_answers_are_compared_too() -> None:
    cell = Cell("digits", "http-json", 1)
    payload = json.dumps({"outputs": [{"data": ANSWERS[1].tolist()}]}).encode()
    verify(result(Kept(1, payload)), cell, ANSWERS)
    with pytest.raises(RuntimeError, match="differs"):
        verify(result(Kept(0, payload)), cell, ANSWERS)


@pytest.mark.parametrize("bad", [result(errors=1), result(unanswered=1)])
def test_errors_and_missing_replies_end_the_run(bad: Result) -> None:
    with pytest.raises(RuntimeError, match="digits:zmq-ipc:1"):
        verify(bad, Cell("digits", "zmq-ipc", 1), None)


MEASURED = {
    "items_s": 500.0,
    "p50_ms": 1.0,
    "raw_items_s": 1000.0,
    "raw_best_items_s": 2000.0,
    "raw_p50_ms": 0.25,
    "echo_items_s": 625.0,
    "echo_p50_ms": 0.5,
}


def test_ratios_are_to_the_limits_of_the_same_round() -> None:
    assert ratios(MEASURED) == pytest.approx(
        {"share_of_raw_best": 0.25, "share_of_raw_batch_1": 0.5, "share_of_echo": 0.8, "over_limit_ms": 0.15}
    )
    assert ratios({"items_s": 500.0, "p50_ms": 1.0}) == {}


def test_median_is_of_the_rounds_that_have_the_number() -> None:
    cell = Cell(
        "digits", "zmq-ipc", 1, rounds=[{"items_s": 1.0}, {"items_s": 5.0}, {"items_s": 3.0}, {"items_s": math.nan}, {}]
    )
    assert cell.median("items_s") == 3.0
    assert math.isnan(cell.median("p50_ms"))


@pytest.mark.parametrize(
    ("value", "word"), [(0.30, "aim"), (0.29, "floor"), (0.22, "floor"), (0.21, "missed"), (math.nan, "not measured")]
)
def test_share_is_judged_by_floor_and_aim(value: float, word: str) -> None:
    [target] = [target for target in targets() if target.name.startswith("digits:zmq-ipc:16 ")]
    assert target.verdict(value) == word


@pytest.mark.parametrize(("value", "word"), [(0.12, "aim"), (0.13, "floor"), (0.20, "floor"), (0.21, "missed")])
def test_cost_is_judged_the_other_way_round(value: float, word: str) -> None:
    [target] = [target for target in targets() if "zmq-ipc 16: CPU" in target.name]
    assert target.verdict(value) == word


def report_of_one_cell() -> tuple[list[Cell], dict[str, object]]:
    found = MEASURED | ratios(MEASURED) | {"others_cores": 0.5, "p90_ms": math.nan}
    server = {"ready_s": 0.5, "rss_mb": 190.0, "pss_mb": 110.0, "idle_cores": 0.001}
    raw = {"threads_batch_1": 1, "threads_best": 2, "batch_best": 32}
    return [Cell("digits", "zmq-ipc", 16, rounds=[found])], {"server": {"digits": [server]}, "raw": {"digits": [raw]}}


def test_tables_mark_what_others_disturbed_and_say_what_was_missed() -> None:
    pages = reports.pages(*report_of_one_cell())
    text = reports.markdown(pages)
    assert "| digits:zmq-ipc:16† | 500 | 1.000 | – |" in text
    assert "| digits | 1,000 | 0.250 | 2,000 | batch 32, 2 threads |" in text
    assert "| digits:zmq-ipc:16 of raw best | 25% | 22% | 30% | floor |" in text
    assert "not measured" not in text
    terminal = io.StringIO()
    reports.print_tables(pages, Console(file=terminal, width=200))
    assert "digits:zmq-ipc:16†" in terminal.getvalue()


def test_document_is_json_with_null_for_what_was_not_measured() -> None:
    document = reports.document(*report_of_one_cell(), command="bench")
    text = json.dumps(document["targets"], allow_nan=False)
    assert '"verdict": "not measured"' in text
    assert document["cells"][0]["median"]["p90_ms"] is None
    assert document["machine"]["cores"] > 0
