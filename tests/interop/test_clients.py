"""Unmodified clients from their packages: kserve, open-inference-openapi, mlserver."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.interop.conftest import HttpServer, run

CLIENTS = Path(__file__).parent / "clients"

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("environment", "client"), [("kserve", "kserve_rest.py"), ("open-inference", "open_inference.py")]
)
def test_a_python_client(
    http_server: HttpServer, programs: Callable[[str], Path], environment: str, client: str
) -> None:
    for model in http_server.models:
        output = run(programs(environment) / "python", CLIENTS / client, http_server.url, model)
        assert output.splitlines()[-1] == f"{model}: all good"


@pytest.mark.parametrize("binary", [False, True])
def test_mlserver_infer(http_server: HttpServer, programs: Callable[[str], Path], tmp_path: Path, binary: bool) -> None:
    requests, answers = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    rows = [[float(row), 1.5, -2.0, 0.0] for row in range(20)]
    with requests.open("w") as file:
        for row in rows:
            tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": row}
            file.write(json.dumps({"inputs": [tensor]}) + "\n")
    run(
        *(programs("mlserver") / "mlserver", "infer", "--url", http_server.url.removeprefix("http://")),
        *("--model-name", "echo", "--input-data-path", requests, "--output-data-path", answers),
        *("--batch-size", "4", "--workers", "2"),
        *(["--binary-data"] if binary else []),
    )
    found = sorted(
        (json.loads(line) for line in answers.read_text().splitlines()),
        key=lambda answer: answer["parameters"]["inference_index"] if "parameters" in answer else 0,
    )
    assert sorted(answer["outputs"][0]["data"] for answer in found) == sorted(rows)
