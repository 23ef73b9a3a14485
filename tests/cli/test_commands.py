"""Commands that need no appliance; those that do are tried on a real one in tests/e2e."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from appliance.cli.main import app

DIGITS = Path(__file__).parents[2] / "models" / "digits" / "1" / "model.onnx"
run = CliRunner()


def test_inspect_shows_symbols_in_shapes() -> None:
    done = run.invoke(app, ["inspect", str(DIGITS)])
    assert done.exit_code == 0
    assert "[batch, 28, 28, 1]" in done.output
    assert "batch axis free" in done.output
    assert json.loads(run.invoke(app, ["inspect", str(DIGITS), "--json"]).stdout)["batch_axis"] == "free"


def test_inspect_says_what_would_run_it() -> None:
    done = run.invoke(app, ["inspect", str(DIGITS)], env={"COLUMNS": "80"})
    assert "probably runs it" in done.output
    assert "seems to want NHWC, 28 × 28 pixels" in done.output
    assert max(len(line.rstrip()) for line in done.output.splitlines()) <= 80
    document = json.loads(run.invoke(app, ["inspect", str(DIGITS), "--json"]).stdout)
    assert [fit["engine"] for fit in document["engines"]] == [
        "onnxruntime",
        "onnxruntime cuda",
        "tensorrt",
        "tensorrt_rtx",
    ]


def test_names_in_a_file_do_not_steer_the_terminal(tmp_path: Path) -> None:
    from onnx import load, save

    model = load(str(DIGITS))
    model.producer_name = "\x1b[2J\nmine"
    model.graph.input[0].name = "\x1b]0;title\x07"
    model.graph.node[0].op_type = "\x1b[31mRed"
    save(model, str(tmp_path / "m.onnx"))
    done = run.invoke(app, ["inspect", str(tmp_path / "m.onnx")])
    assert done.exit_code == 0
    assert "\x1b" not in done.output
    assert "?[2J?mine" in done.output


def test_inspect_says_what_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    file.write_bytes(b"no model")
    done = run.invoke(app, ["inspect", str(file), "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["error"]["code"] == "NOT_A_MODEL"


def test_the_configuration_is_checked_shown_and_described(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("[http]\nport = 1234\n")
    assert run.invoke(app, ["config", "check", "--config", str(file)]).exit_code == 0
    assert (
        json.loads(run.invoke(app, ["config", "show", "--config", str(file), "--json"]).stdout)["http"]["port"] == 1234
    )
    assert "port = 1234" in run.invoke(app, ["config", "show", "--config", str(file)]).stdout
    assert "$defs" in json.loads(run.invoke(app, ["config", "schema"]).stdout)
    assert run.invoke(app, ["config", "docs"]).stdout.startswith("# Configuration")
    file.write_text("[http]\nprot = 1\n")
    done = run.invoke(app, ["config", "check", "--config", str(file)])
    assert done.exit_code == 78
    assert "did you mean 'port'" in done.stderr
    assert run.invoke(app, ["config", "check", "--config", str(tmp_path / "none.toml")]).exit_code == 78


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["status", "--url", "ftp://x"], 2),
        (["status", "--url", "http://127.0.0.1:9"], 3),
        (["ps", "--url", "unix:/nowhere"], 3),
        (["bench", "m", "--concurrency", "many", "--url", "http://127.0.0.1:9"], 2),
        (["nothing"], 2),
    ],
)
def test_what_went_wrong_is_an_exit_code(arguments: list[str], code: int) -> None:
    done = run.invoke(app, arguments)
    assert done.exit_code == code, done.output
    assert done.stderr


def test_help_imports_nothing_heavy() -> None:
    heavy = ("aiohttp", "numpy", "onnx", "uvloop")
    code = f"import sys; from appliance.cli.main import app; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
