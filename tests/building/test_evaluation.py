"""An evaluation asks everything once, keeps so many in flight, counts what fails, and judges by the gate's own metrics."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from appliance.building import report
from appliance.building.comparison import Classification, Regression
from appliance.building.evaluation import Answers, Arrays, gather, judge, latency, top_share
from appliance.building.pictures import Sample
from appliance.core.errors import ApplianceError, ErrorCode

EYE = np.eye(4, dtype=np.float32)


def _samples(count: int) -> list[Sample]:
    return [Sample({"x": EYE[row % 4][np.newaxis]}, row % 4, f"s{row}") for row in range(count)]


async def _same(inputs: Arrays) -> Arrays:
    await asyncio.sleep(0)
    return {"y": inputs["x"]}


async def _ask(ask: object, count: int = 10, batch: int = 1, concurrency: int = 3) -> Answers:
    return await gather(_samples(count), ask, batch=batch, concurrency=concurrency, on_done=lambda _rows: None)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [1, 3, 64])
async def test_every_sample_is_asked_once_and_judged(batch: int) -> None:
    answers = await _ask(_same, batch=batch)
    found = judge(answers, model="m", version="1", address="a", output="y", top=[1, 4])
    assert [sample.source for sample in answers.samples] == [f"s{row}" for row in range(10)]
    assert isinstance(found.metric, Classification)
    assert (found.metric.accuracy, found.top_k, found.problems(min_accuracy=1)) == (1.0, {1: 1.0, 4: 1.0}, [])
    assert len(answers.request_s) == -(-10 // batch)


async def test_so_many_are_in_flight_and_no_more() -> None:
    now = most = 0

    async def count(inputs: Arrays) -> Arrays:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0)
        now -= 1
        return {"y": inputs["x"]}

    await _ask(count, concurrency=3)
    assert most == 3


async def test_what_fails_is_counted_named_and_no_success() -> None:
    async def refuses_threes(inputs: Arrays) -> Arrays:
        if inputs["x"][0, 3]:
            raise ApplianceError(ErrorCode.RESOURCE_EXHAUSTED, "the queue is full")
        return {"y": inputs["x"]}

    found = judge(await _ask(refuses_threes), model="m", version="1", address="a", output="y")
    assert (found.samples, found.answered) == (10, 8)
    assert [failure.samples for failure in found.failures] == [("s3",), ("s7",)]
    assert found.problems() == ["2 of 10 samples were not answered"]
    page = report.evaluation_page(found, found.problems())
    assert "RESOURCE_EXHAUSTED" in page
    assert "2 of 10 samples were not answered" in page


async def test_an_output_that_has_no_row_for_each_sample_is_a_failure_that_says_so() -> None:
    async def short(inputs: Arrays) -> Arrays:
        return {"y": inputs["x"][:1]}

    answers = await _ask(short, batch=5)
    assert "one row a request only" in answers.failures[0].message
    assert answers.samples == []


async def test_a_minimum_that_is_missed_is_named_and_one_without_labels_too() -> None:
    async def zero(inputs: Arrays) -> Arrays:
        return {"y": np.tile(EYE[0], (len(inputs["x"]), 1))}

    found = judge(await _ask(zero, count=8), model="m", version="1", address="a", output="y")
    assert found.problems(min_accuracy=0.5) == ["accuracy is 0.2500, at least 0.5 is asked for"]
    bare = judge(Answers([], [], (), [], 0.0), model="m", version="1", address="a", output="y")
    assert "no accuracy" in bare.problems(min_accuracy=0.5)[0]


def test_targets_give_squared_errors() -> None:
    samples = [Sample({"x": EYE[:1]}, -1, "s", EYE[0] + 1)]
    found = judge(Answers(samples, [{"y": EYE[0]}], (), [0.1], 0.1), model="m", version="1", address="a", output="y")
    assert isinstance(found.metric, Regression)
    assert found.metric.mse == pytest.approx(1)
    assert found.problems(max_mse=0.5) == ["mean squared error is 1, at most 0.5 is asked for"]
    assert "MSE" in report.evaluation_page(found, [])


def test_top_k_and_percentiles_are_what_they_are_called() -> None:
    samples = [Sample({}, 2, "s")]
    scores = [np.array([0.5, 0.1, 0.4])]
    assert (top_share(samples, scores, 1), top_share(samples, scores, 2)) == (0.0, 1.0)
    times = latency([0.001, 0.002, 0.003])
    assert times is not None
    assert (times.p50, times.largest) == (pytest.approx(2), pytest.approx(3))
    assert latency([]) is None


async def test_answers_of_nan_are_no_class_and_no_success() -> None:
    async def nothing(inputs: Arrays) -> Arrays:
        return {"y": np.full_like(inputs["x"], np.nan)}

    found = judge(await _ask(nothing, count=8), model="m", version="1", address="a", output="y", top=[1, 4])
    assert isinstance(found.metric, Classification)
    assert (found.metric.accuracy, found.metric.undecided, found.top_k) == (0, 8, {1: 0, 4: 0})
    assert found.problems() == ["8 of 8 answers are no class: NaN among the scores"]


def test_a_squared_error_that_is_no_number_is_within_no_limit() -> None:
    samples = [Sample({"x": EYE[:1]}, -1, "s", EYE[0])]
    answers = Answers(samples, [{"y": EYE[0] * np.nan}], (), [0.1], 0.1)
    found = judge(answers, model="m", version="1", address="a", output="y")
    assert found.problems() == found.problems(max_mse=0.5) == ["the mean squared error is not finite"]
    assert "not finite" in report.evaluation_page(found, [])


async def test_limits_and_labels_that_do_not_fit_the_answers_are_said() -> None:
    answers = await _ask(_same, count=8)
    found = judge(answers, model="m", version="1", address="a", output="y")
    assert "no mean squared error" in found.problems(max_mse=1)[0]
    with pytest.raises(ValueError, match="2 labels, and its answers have 4 scores"):
        judge(answers, model="m", version="1", address="a", output="y", labels=("a", "b"))
