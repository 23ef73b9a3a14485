"""`compile --tune` with real appliances on trial: what is measured, written, and left alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import psutil
import pytest

from appliance.cli.engines import model_folder
from appliance.cli.trial import Trial, TrialError
from appliance.cli.tune import Session, TuneOptions
from appliance.cli.tuning_page import page, picture
from appliance.config import Config, RepositoryConfig
from appliance.core.tuning import DEFAULT, Candidate

ROOT = Path(__file__).parents[2]
LOOPBACK = '# the echo\nengine = "loopback"\n[parameters]\nshape = "4"\ndelay_ms = "2"\n'


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    (folder / "echo" / "1").mkdir(parents=True)
    (folder / "echo" / "model.toml").write_text(LOOPBACK)
    shutil.copytree(ROOT / "models" / "digits", folder / "digits")
    return folder


def tune(models: Path, *arguments: str) -> tuple[int, Any, str]:
    done = subprocess.run(
        [sys.executable, "-m", "appliance", "compile", *arguments, "--tune", "--repository", str(models), "--json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=models,
        env={**os.environ, "APPLIANCE_URL": "http://127.0.0.1:9"},
    )
    return done.returncode, json.loads(done.stdout), done.stderr


def test_a_trial_serves_the_model_with_the_settings_on_trial_and_leaves_nothing_behind(models: Path) -> None:
    config = Config(repository=RepositoryConfig(path=str(models)))
    manifest = "[batching]\nmax_batch_size = 4\n[worker]\ninstances = 2\n"
    with Trial(config, "digits", 1, manifest, models / ".engines") as trial:
        assert trial.config()["max_batch_size"] == 4
        assert trial.config()["instance_group"][0]["count"] == 2
        assert trial.threads() == 1
        assert [spec["name"] for spec in trial.metadata()["inputs"]] == ["image"]
    assert psutil.Process().children(recursive=True) == []
    assert not trial._folder.exists()


def test_settings_for_which_the_verdict_on_an_engine_does_not_hold_are_measured_with_the_engine_verified_anew(
    models: Path,
) -> None:
    manifest = models / "digits" / "model.toml"
    manifest.write_text(f'precision = "fp16"\n{manifest.read_text()}')
    config = Config(repository=RepositoryConfig(path=str(models)))
    folder = model_folder(config, "digits")
    session = Session(config, folder, 1, TuneOptions("1m", "throughput", "1", 0.0, 99.0, 0, burning=False, write=False))
    other = Candidate((("onnxruntime.graph_optimization", "extended"),))
    try:
        for candidate in (DEFAULT, other):
            served = session.start(candidate).config()["parameters"]["appliance.engine"]
            assert served == {"string_value": "fp16"}
    finally:
        session.close()


def test_a_trial_that_cannot_serve_says_why(models: Path) -> None:
    config = Config(repository=RepositoryConfig(path=str(models)))
    with (
        Trial(config, "echo", 1, LOOPBACK + 'load = "fail"\n', models / ".engines") as trial,
        pytest.raises(TrialError, match="told to fail"),
    ):
        trial.metadata()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("nobody",), 2, "no model folder 'nobody'"),
        (("echo", "--budget", "soon"), 2, "'soon' is no time"),
        (("echo", "--concurrency", "0"), 2, "no list of numbers"),
        (("echo", "--goal", "fame"), 2, "no goal"),
        (("echo", "--precision", "int8"), 2, "leave them out"),
        (("echo", "--budget", "2s"), 2, "too little"),
    ],
)
def test_what_is_wrong_is_said(models: Path, arguments: tuple[str, ...], code: int, said: str) -> None:
    status, document, _ = tune(models, *arguments)
    assert (status, said in document["error"]["message"]) == (code, True), document
    assert (models / "echo" / "model.toml").read_text() == LOOPBACK


@pytest.mark.slow
def test_settings_that_are_surely_better_are_written_with_their_remark(models: Path) -> None:
    # an engine that sleeps gains from instances whatever else the machine does
    status, document, words = tune(models, "echo", "--budget", "60s", "--concurrency", "64", "--rows", "32")
    assert status == 0, words
    assert document["written"]
    text = (models / "echo" / "model.toml").read_text()
    assert text.startswith("# Tuned ")
    assert "# the echo" in text
    chosen = next(row for row in document["rows"] if row["chosen"])
    assert chosen["ratio"] > 1.03
    assert chosen["at_least"] > 1
    assert "instances = 2" in text
    for name in ("tuning.json", "tuning.svg", "tuning.html"):
        assert (models / ".engines" / "echo" / name).stat().st_size > 500


@pytest.mark.slow
def test_a_limit_that_nothing_keeps_names_the_nearest_and_writes_nothing(models: Path) -> None:
    before = (models / "digits" / "model.toml").read_text()
    status, document, _ = tune(models, "digits", "--budget", "45s", "--concurrency", "16", "--latency-limit-ms", "0.01")
    assert status == 1
    assert document["chosen"] is None
    assert "nothing keeps the limit of 0.01 ms; the nearest" in document["reason"]
    assert (models / "digits" / "model.toml").read_text() == before


def _row(name: str, *, chosen: bool, speed: float) -> dict[str, Any]:
    points = [{"concurrency": c, "items_s": 100 * c * speed, "p50_ms": 1.0, "tail_ms": 2.0 * c} for c in (1, 16)]
    row = {"name": name, "changes": {"a": 1} if name != "as it is" else {}, "points": points, "ratio": speed}
    return row | {"at_least": speed, "rounds": 5, "verified": True, "failure": "", "chosen": chosen}


def test_the_picture_is_an_svg_with_the_limit_and_escaped_names() -> None:
    document = {
        "model": "<m>",
        "version": 1,
        "when": "now",
        "goal": "throughput",
        "loads": [1, 16],
        "limit_ms": 50.0,
        "percentile": 99.0,
        "cores": 2,
        "chosen": "<fast>",
        "reason": "1.2 ×",
        "rows": [_row("as it is", chosen=False, speed=1.0), _row("<fast>", chosen=True, speed=1.2)],
    }
    tree = ET.fromstring(picture(document))
    texts = ["".join(node.itertext()) for node in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert {"limit 50 ms", "<fast> (chosen)", "as it is (present)"} <= set(texts)
    assert len(list(tree.iter("{http://www.w3.org/2000/svg}polyline"))) == 2
    assert "&lt;fast&gt;" in page(document)
    assert "<fast>" not in page(document)
