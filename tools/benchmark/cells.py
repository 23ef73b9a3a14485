"""Cells: one model over one transport with so many requests in flight. What is sent, what must come back, what was found."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from appliance.cli.load import Plan, Result
from appliance.cli.payloads import Input, http_binary, http_json, noise, zmq_frames


class Subject(msgspec.Struct, frozen=True):
    """A model's only input, the shape of one row, and how many FP32 numbers it answers with."""

    input: str
    datatype: str
    shape: tuple[int, ...]
    answers: int


SUBJECTS = {
    "digits": Subject("image", "FP32", (1, 28, 28, 1), 10),
    "identity": Subject("input", "FP32", (1, 256), 256),
    "detector": Subject("input", "UINT8", (1, 640, 640, 3), 84),
    "resnet18": Subject("input", "FP32", (1, 3, 224, 224), 1000),
}
TRANSPORTS = ("zmq-ipc", "zmq-tcp", "http-binary", "http-json")
CONCURRENCIES = {"digits": (1, 4, 16, 64), "identity": (16, 64), "detector": (1, 4, 16), "resnet18": (1, 4, 16)}
RATES = (500.0, 2000.0)
OPEN_LOOP_SLOTS = 64

VARIANTS = 4
"""Different rows, sent in turn: a batch that mixes its rows up would be noticed."""


class Cell(msgspec.Struct):
    """One cell. `rate_per_s` above 0 is an open loop. `rounds` has what each round found, by name."""

    model: str
    transport: str
    concurrency: int
    rate_per_s: float = 0.0
    rounds: list[dict[str, float]] = []

    @property
    def name(self) -> str:
        """As `--cells` names it."""
        load = f"{self.rate_per_s:g}/s" if self.rate_per_s else str(self.concurrency)
        return f"{self.model}:{self.transport}:{load}"

    def median(self, key: str) -> float:
        """Over the rounds; NaN if nothing was measured."""
        values = [found[key] for found in self.rounds if key in found and not math.isnan(found[key])]
        return statistics.median(values) if values else math.nan


def parse(text: str) -> list[Cell]:
    """`model:transport:1,16,500/s` as cells. ValueError that says what is wrong."""
    model, transport, loads = [*text.split(":"), "", ""][:3]
    if model not in SUBJECTS:
        raise ValueError(f"{text!r}: no model {model!r}; there are {', '.join(SUBJECTS)}")
    if transport not in TRANSPORTS:
        raise ValueError(f"{text!r}: no transport {transport!r}; there are {', '.join(TRANSPORTS)}")
    cells = []
    for load in loads.split(","):
        rate, concurrency = load.removesuffix("/s"), OPEN_LOOP_SLOTS
        if not load.endswith("/s"):
            rate, concurrency = "0", int(load) if load.isdigit() else 0
        try:
            cell = Cell(model, transport, concurrency, float(rate))
        except ValueError:
            cell = Cell(model, transport, 0)
        if cell.concurrency < 1 or not 0 <= cell.rate_per_s <= 1e6:
            raise ValueError(f"{text!r}: {load!r} is neither a number in flight (16) nor a rate (500/s)")
        cells.append(cell)
    return cells


def standard(models: Sequence[str], *, quick: bool) -> list[Cell]:
    """The cells that the targets need; if there is time, also the other transports, and open loops."""
    cells = []
    for model in models:
        for transport in ("zmq-ipc", "http-binary"):
            cells += [Cell(model, transport, concurrency) for concurrency in CONCURRENCIES[model]]
    if "digits" in models and not quick:
        for transport in ("zmq-tcp", "http-json"):
            cells += [Cell("digits", transport, concurrency) for concurrency in CONCURRENCIES["digits"]]
        for transport in TRANSPORTS:
            cells += [Cell("digits", transport, OPEN_LOOP_SLOTS, rate) for rate in RATES]
    return cells


@cache
def rows(model: str) -> tuple[Input, ...]:
    """The variants of a model's input."""
    subject = SUBJECTS[model]
    return tuple(noise(subject.input, subject.datatype, subject.shape, seed=seed) for seed in range(VARIANTS))


def plan(cell: Cell, address: str, seconds: float, *, echo: bool = False) -> Plan:
    """What the load generator does for a cell, against the appliance or an echo."""
    encode = {"http-binary": http_binary, "http-json": http_json}.get(cell.transport)
    requests = tuple(
        zmq_frames(cell.model, [row]) if encode is None else (encode(cell.model, [row]),) for row in rows(cell.model)
    )
    # an echo of the header comes with its own `op`
    good = '"op":"infer"' if echo else '"ok":true'
    return Plan(address, requests, cell.concurrency, seconds, rate_per_s=cell.rate_per_s, good=good)


def truth(model: str, model_file: Path) -> list[np.ndarray[Any, Any]]:
    """What the engine alone answers to each variant, flat. ValueError if two are too alike to tell rows apart."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(model_file), providers=["CPUExecutionProvider"])
    subject = SUBJECTS[model]
    kind = np.uint8 if subject.datatype == "UINT8" else np.float32
    answers = [
        session.run(None, {subject.input: np.frombuffer(row.data, kind).reshape(subject.shape)})[0].reshape(-1)
        for row in rows(model)
    ]
    for index, answer in enumerate(answers):
        if any(agree(answer, other) for other in answers[:index]):
            raise ValueError(f"{model} answers two different inputs alike; nothing could be verified by it")
    return answers


def agree(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> bool:
    """The same but for the order of additions, which differs between batch sizes."""
    return found.shape == expected.shape and bool(np.allclose(found, expected, rtol=1e-3, atol=1e-5))


def verify(result: Result, what: Cell, expected: list[np.ndarray[Any, Any]] | None) -> None:
    """RuntimeError unless every reply was good, and those kept hold the right numbers (None: the numbers do not matter)."""
    if result.errors or result.unanswered or not result.replies:
        raise RuntimeError(
            f"{what.name}: {result.answered} replies, {result.errors} errors, {result.unanswered} unanswered: "
            f"{result.first_error or 'none says why'}"
        )
    for kept in result.kept if expected is not None else ():
        if what.transport == "http-json":
            found = np.array(json.loads(kept.payload)["outputs"][0]["data"], np.float32)
        else:
            found = np.frombuffer(kept.payload[-4 * SUBJECTS[what.model].answers :], np.float32)
        if expected is not None and not agree(found, expected[kept.request]):
            raise RuntimeError(f"{what.name}: a reply differs from what the engine alone answers")
