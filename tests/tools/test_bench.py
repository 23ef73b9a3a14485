"""The benchmark's own arithmetic: what is sent, what is right, what medians and verdicts are made of; and once for real."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appliance.cli.load import Result
from tools import bench
from tools.bench import INPUTS, Cell, choose, judge, measure_echo, percentile, plan, quiet, ratios, rows, verify
from tools.benchmark.targets import targets

TRUTH = np.arange(10, dtype=np.float32) / 10


def options(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**({"cells": None, "model": None, "quick": False} | changes))


def result(kept: list[bytes], errors: int = 0, unanswered: int = 0) -> Result:
    return Result(10, 12, errors, 1.0, [0.001] * 10, kept, unanswered, "no" if errors else "")


def measured(others: float = 0.0, **numbers: float) -> dict[str, float]:
    return {"others_cores": others, **numbers}


@pytest.mark.parametrize("model", list(INPUTS))
def test_zmq_message_describes_the_tensor_that_it_carries(model: str) -> None:
    name, datatype, shape, _ = INPUTS[model]
    magic, header, data = plan(Cell(model, "zmq-ipc", 4), "ipc://x", 1.0).frames
    assert magic == b"AIP1"
    told = json.loads(header)
    assert (told["op"], told["model"]) == ("infer", model)
    assert told["inputs"] == [{"name": name, "datatype": datatype, "shape": shape, "frame": 0}]
    assert len(data) == math.prod(shape) * (1 if datatype == "UINT8" else 4)


def test_http_binary_request_has_lengths_that_add_up() -> None:
    request = plan(Cell("digits", "http-binary", 4), "http://h", 1.0).request
    head, _, body = request.partition(b"\r\n\r\n")
    lines = dict(line.split(b": ") for line in head.split(b"\r\n")[1:])
    assert head.startswith(b"POST /v2/models/digits/infer HTTP/1.1\r\n")
    assert int(lines[b"Content-Length"]) == len(body)
    size = int(lines[b"Inference-Header-Content-Length"])
    told = json.loads(body[:size])
    assert told["inputs"][0]["parameters"]["binary_data_size"] == len(body) - size == 4 * 28 * 28
    assert told["parameters"] == {"binary_data_output": True}


def test_http_json_request_holds_the_same_picture() -> None:
    as_json = plan(Cell("digits", "http-json", 1), "http://h", 1.0).request.partition(b"\r\n\r\n")[2]
    as_bytes = plan(Cell("digits", "zmq-ipc", 1), "ipc://x", 1.0).frames[2]
    values = json.loads(as_json)["inputs"][0]["data"]
    np.testing.assert_allclose(values, np.frombuffer(as_bytes, np.float32), atol=1e-4)


def test_right_answers_pass() -> None:
    verify(result([b"header" + TRUTH.tobytes()]), TRUTH, Cell("digits", "http-binary", 1))
    verify(result([TRUTH.tobytes()]), TRUTH, Cell("digits", "zmq-ipc", 1))
    answer = json.dumps({"outputs": [{"data": TRUTH.tolist()}]}).encode()
    verify(result([answer]), TRUTH, Cell("digits", "http-json", 1))


@pytest.mark.parametrize("transport", ["zmq-ipc", "http-binary", "http-json"])
def test_one_wrong_answer_among_those_kept_stops_the_benchmark(transport: str) -> None:
    def answer(values: np.ndarray[Any, Any]) -> bytes:
        as_json = json.dumps({"outputs": [{"data": values.tolist()}]}).encode()
        return as_json if transport == "http-json" else values.tobytes()

    wrong = TRUTH.copy()
    wrong[3] += 0.1
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        verify(result([answer(TRUTH), answer(wrong)]), TRUTH, Cell("digits", transport, 1))


def test_refused_and_unanswered_requests_stop_a_closed_loop_only() -> None:
    for bad in (result([], errors=1), result([], unanswered=1)):
        with pytest.raises(RuntimeError, match="digits:zmq-ipc:4: "):
            verify(bad, TRUTH, Cell("digits", "zmq-ipc", 4))
        verify(bad, TRUTH, Cell("digits", "zmq-ipc", 64, 2000.0))


def test_percentile_is_by_nearest_rank() -> None:
    values = [float(number) for number in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values, 0.999)) == (51.0, 100.0, 100.0)
    assert math.isnan(percentile([], 0.5))


def test_median_leaves_out_rounds_with_others() -> None:
    cell = Cell("digits", "zmq-ipc", 1)
    cell.rounds = [measured(0.9, p50_ms=9.0), measured(0.1, p50_ms=1.0), measured(0.0, p50_ms=3.0)]
    assert cell.median("p50_ms") == 2.0
    assert not cell.noisy
    assert not rows([cell])[0][0].endswith("†")


def test_median_of_a_cell_with_others_in_every_round_is_marked() -> None:
    cell = Cell("digits", "zmq-ipc", 1)
    cell.rounds = [measured(0.9, p50_ms=9.0), measured(0.5, p50_ms=1.0)]
    assert cell.median("p50_ms") == 5.0
    assert rows([cell])[0][0] == "digits:zmq-ipc:1†"
    assert math.isnan(cell.median("never measured"))


def test_limits_measured_beside_others_do_not_count_if_there_is_a_better_one() -> None:
    calm, loud = {"others_cores": 0.1}, {"others_cores": 1.0}
    assert quiet([loud, calm]) == [calm]
    assert quiet([loud]) == [loud]


def test_ratios_are_to_the_limits_of_the_same_round() -> None:
    raw = {"best_items_s": 40_000.0, "batch_1_items_s": 10_000.0, "batch_1_p50_s": 0.0001, "others_cores": 0.2}
    found = measured(0.1, items_s=10_000.0, p50_ms=0.5, echo_items_s=20_000.0, echo_p50_ms=0.2, echo_others_cores=0.3)
    made = ratios(found, raw)
    assert made["share_of_raw_best"] == 0.25
    assert made["share_of_raw_batch_1"] == 1.0
    assert made["share_of_echo"] == 0.5
    assert made["over_limit_ms"] == pytest.approx(0.5 - 1.2 * 0.2 - 0.1)
    assert made["others_cores"] == 0.3, "whoever disturbed a limit disturbed the ratio"


def test_cells_are_chosen_by_model_transport_and_load() -> None:
    names = [cell.name for cell in choose(options(cells=["digits:zmq-ipc:1,16", "identity:http-binary:500/s"]))]
    assert names == ["digits:zmq-ipc:1", "digits:zmq-ipc:16", "identity:http-binary:500/s"]


def test_everything_but_the_long_cells_is_in_a_quick_run() -> None:
    complete, quick = ({cell.name for cell in choose(options(quick=quick))} for quick in (False, True))
    assert quick < complete
    assert {"digits:http-json:1", "digits:zmq-tcp:16", "digits:zmq-ipc:500/s"} <= complete - quick
    assert {target.cell for target in targets() if target.cell} <= quick, "a quick run judges every target"


def test_every_target_has_a_verdict_on_both_sides_of_its_floor_and_aim() -> None:
    for target in targets():
        better = -1.0 if target.at_most else 1.0
        assert target.verdict(target.aim) == "aim"
        assert target.verdict(target.floor - better * 1e-6) == "missed"
        assert target.verdict(math.nan) == "not measured"
        if target.aim != target.floor:
            assert target.verdict((target.aim + target.floor) / 2) == "floor"


def test_targets_are_judged_by_their_own_cells() -> None:
    cell = Cell("digits", "zmq-ipc", 16)
    cell.rounds = [measured(0.0, share_of_raw_best=0.25, cpu_s_per_1000=0.1)]
    report = {"server": {"digits": [{"pss_mb": 100.0, "ready_s": 2.0}]}}
    verdicts = {target.name: verdict for target, _, verdict in judge([cell], report) if verdict != "not measured"}
    assert verdicts == {
        "digits:zmq-ipc:16 of raw best": "floor",
        "digits zmq-ipc 16: CPU s per 1,000": "aim",
        "digits: PSS of all processes, MB": "aim",
        "digits: start to ready, s": "missed",
    }


def test_verdict_from_noise_is_marked() -> None:
    cell = Cell("digits", "zmq-ipc", 16)
    cell.rounds = [measured(1.0, share_of_raw_best=0.1, cpu_s_per_1000=0.1)]
    report = {"server": {"digits": [{"pss_mb": 100.0, "ready_s": 1.0}]}}
    verdicts = {target.name: verdict for target, _, verdict in judge([cell], report)}
    assert verdicts["digits:zmq-ipc:16 of raw best"] == "missed†"


@pytest.mark.parametrize("transport", ["zmq-ipc", "zmq-tcp", "http-binary", "http-json"])
def test_bare_echo_answers_over_every_transport(transport: str) -> None:
    found = measure_echo(Cell("identity", transport, 4), 0.1)
    assert found["echo_items_s"] > 100
    assert 0 < found["echo_p50_ms"] < 100


def test_bare_http_echo_takes_a_camera_frame() -> None:
    assert measure_echo(Cell("detector", "http-binary", 1), 0.1)["echo_items_s"] > 1


@pytest.mark.slow
def test_whole_benchmark_measures_and_judges_a_real_appliance() -> None:
    command = [
        sys.executable,
        str(Path(bench.__file__)),
        "--json",
        "--seconds",
        "0.3",
        "--rounds",
        "1",
        "--patience",
        "0",
    ]
    cells = ["identity:zmq-ipc:16", "identity:http-binary:16", "digits:http-json:2", "digits:zmq-tcp:100/s"]
    done = subprocess.run([*command, "--cells", *cells], capture_output=True, check=False, timeout=240)
    assert done.returncode in (0, 1), done.stderr.decode()
    report = json.loads(done.stdout)
    found = {cell["name"]: cell["rounds"][0] for cell in report["cells"]}
    assert set(found) == set(cells)
    for numbers in found.values():
        assert numbers["items_s"] > 10
        assert 0 < numbers["p50_ms"] <= numbers["p90_ms"] <= numbers["p99_ms"] <= numbers["p999_ms"]
        assert numbers["failures"] == 0
        assert numbers["cpu_s_per_1000"] > 0
    assert 0 < found["identity:zmq-ipc:16"]["share_of_echo"] < 2
    assert report["server"]["identity"][0]["pss_mb"] > 30
    assert 0.1 < report["server"]["identity"][0]["ready_s"] < 60
    judged = {target["target"]: target["verdict"] for target in report["targets"]}
    assert judged["identity:zmq-ipc:16 of the echo"] != "not measured"
