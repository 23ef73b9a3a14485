"""The page's sums of energy, without a browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

import appliance

VIEW = Path(appliance.__file__).parent / "web" / "views" / "energy.js"


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node (apt-get install nodejs)")
def test_a_jetson_s_gpu_counts_once_in_the_page_s_totals() -> None:
    common = {"estimated": False, "busy_s": 1.0, "model": "", "items": 0}
    sums = [
        {"device": "gpu:0", "source": "estimate", "kind": "total", "uj": 240e6, "within": "host", **common},
        {"device": "host", "source": "ina3221", "kind": "total", "uj": 720e6, "within": "", **common},
    ]
    sums += [
        {**one, "kind": "model", "model": "m:1", "items": 500, "uj": one["uj"] / 2}  # type: ignore[operator]  a number
        for one in sums
    ]
    script = f"import {{ accounts }} from {json.dumps(VIEW.as_uri())}; console.log(JSON.stringify(accounts({json.dumps(sums)})));"
    done = subprocess.run(
        ["node", "--experimental-default-type=module", "--input-type=module", "--eval", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["total_j"] == 720
    assert found["models"] == [{"model": "m", "version": "1", "joules": 360, "inferences": 500}]
    assert [(device["device"], device["total_j"]) for device in found["devices"]] == [("gpu:0", 240), ("host", 720)]
