"""Unmodified clients from their packages: kserve, open-inference-openapi, mlserver."""

from __future__ import annotations

import json
import urllib.request
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
    if "echo" not in http_server.models:
        pytest.skip("what comes back is compared with what was sent")
    with urllib.request.urlopen(f"{http_server.url}/v2/models/echo") as reply:
        name = json.load(reply)["inputs"][0]["name"]
    requests, answers = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    rows = [[float(row), 1.5, -2.0, 0.0] for row in range(20)]
    tensors = [{"name": name, "shape": [1, 4], "datatype": "FP32", "data": row} for row in rows]
    requests.write_text("".join(json.dumps({"inputs": [tensor]}) + "\n" for tensor in tensors))
    run(
        *(programs("mlserver") / "mlserver", "infer", "--url", http_server.url.removeprefix("http://")),
        *("--model-name", "echo", "--input-data-path", requests, "--output-data-path", answers),
        *("--batch-size", "4", "--workers", "2"),
        *(["--binary-data"] if binary else []),
    )
    found = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [answer["error"] for answer in found if "error" in answer] == []
    assert sorted(answer["outputs"][0]["data"] for answer in found) == sorted(rows)
