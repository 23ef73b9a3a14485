"""Commands that need no appliance; those that do are tried on a real one in tests/e2e."""

from __future__ import annotations

import errno
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from appliance.cli import connection
from appliance.cli.main import app
from appliance.config import Config, HttpConfig, UnreadableError

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


@pytest.fixture
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration that is found; nobody answers, whatever it says."""
    monkeypatch.delenv("APPLIANCE_URL", raising=False)
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    file = tmp_path / "appliance.toml"
    monkeypatch.setenv("APPLIANCE_CONFIG", str(file))
    return file


@pytest.mark.parametrize("arguments", [["status"], ["ps"], ["models", "list"], ["events", "--follow"]])
def test_an_address_that_is_a_credential_is_no_host_s_name(configured: Path, arguments: list[str]) -> None:
    configured.write_text('[http]\nport = 9\nhost = "credential:http-host"\n')
    done = run.invoke(app, arguments)
    assert (done.exit_code, type(done.exception)) == (3, SystemExit), done.output
    assert "127.0.0.1:9" in done.stderr
    if "--follow" not in arguments:
        assert "http.host is a credential" in done.stderr


def test_an_address_of_ipv6_can_be_asked(configured: Path) -> None:
    configured.write_text('[http]\nport = 9\nhost = "::1"\n')
    done = run.invoke(app, ["status"])
    assert (done.exit_code, "no appliance answers at http://[::1]:9: " in done.stderr) == (3, True), done.output


def test_the_doctor_does_not_take_a_wrong_url_for_an_appliance_that_is_down(configured: Path) -> None:
    configured.write_text("")
    done = run.invoke(app, ["doctor", "--only", "running", "--url", "http://x:abc"])
    assert (done.exit_code, "is no URL of an appliance" in done.stderr) == (2, True), done.output


def test_another_program_that_answers_is_told_as_that() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            peer, _ = server.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>")

        thread = threading.Thread(target=answer)
        thread.start()
        done = run.invoke(app, ["status", "--url", f"http://127.0.0.1:{server.getsockname()[1]}"])
        thread.join()
    assert (done.exit_code, "is no appliance" in done.stderr) == (3, True), done.output


@pytest.mark.parametrize(
    "url",
    [
        "http://x:abc",
        "http://x:99999",
        "http://[::1",
        "http://a b",
        "http:/x y",
        "https://x",
        "tcp://x",
    ],
)
def test_what_is_no_url_is_told_so(url: str) -> None:
    done = run.invoke(app, ["status", "--url", url])
    assert (done.exit_code, type(done.exception)) == (2, SystemExit), done.output
    assert "is no URL of an appliance" in done.stderr
    assert "http://HOST:PORT or unix:/PATH" in done.stderr


def test_a_name_that_no_host_can_have_is_one_that_does_not_answer() -> None:
    done = run.invoke(app, ["status", "--url", f"http://{'x' * 70}.local"])
    assert (done.exit_code, type(done.exception)) == (3, SystemExit), done.output


CLOSED = [
    "config check",
    "config show",
    "engines list",
    "verify digits",
    "compile digits",
    "serve",
    "events",
    "history",
]


@pytest.mark.parametrize("arguments", [*CLOSED, "doctor"])
def test_who_may_not_read_the_configuration_is_told_to_join_the_group(
    arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APPLIANCE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("APPLIANCE_CONFIG", raising=False)
    monkeypatch.setattr("appliance.config.SEARCH", (Path("appliance.toml"), tmp_path / "appliance.toml"))
    stat, read = Path.stat, Path.read_bytes

    def refuse(path: Path, ask: Callable[[], Any]) -> Any:
        """As of somebody in whose current folder he is nobody, either: `runuser` begun in root's."""
        if path.name == "appliance.toml":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return ask()

    monkeypatch.setattr(Path, "stat", lambda path, **more: refuse(path, lambda: stat(path, **more)))
    monkeypatch.setattr(Path, "read_bytes", lambda path: refuse(path, lambda: read(path)))
    done = run.invoke(app, arguments.split())
    assert (done.exit_code, type(done.exception)) == (1 if arguments == "doctor" else 78, SystemExit), done.output
    words = " ".join((done.stdout + done.stderr).split())
    assert f"not allowed to read the configuration {tmp_path}" in words.replace("/ ", "/").replace("- ", "-")
    assert "--groups appliance" in words


def test_who_asks_the_usual_port_for_want_of_a_configuration_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path | None) -> None:
        raise UnreadableError(errno.EACCES, "Permission denied", "/etc/appliance/appliance.toml")

    monkeypatch.delenv("APPLIANCE_URL", raising=False)
    monkeypatch.setattr(connection, "load", refuse)
    monkeypatch.setattr(connection, "Config", lambda: Config(http=HttpConfig(port=9, unix_socket="none")))
    done = run.invoke(app, ["status"])
    assert (done.exit_code, "may not read the configuration" in done.stderr) == (3, True), done.output


def test_a_configuration_in_another_encoding_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_bytes("[http]\n# für uns\nport = 1\n".encode("latin-1"))
    done = run.invoke(app, ["config", "check", "--config", str(file)])
    assert done.exit_code == 78
    assert "a.toml:2: not UTF-8 text" in done.stderr
