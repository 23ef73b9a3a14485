"""`events --follow` against what an appliance answers: the record first, then the stream, in one shape."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import pytest
from typer.testing import CliRunner

from appliance.cli.main import app

NOW = time.time()


def recorded(number: int, kind: str, at: float, **fields: Any) -> dict[str, Any]:
    return {
        "id": number, "time": at, "monotonic": 1.0, "boot_id": "b", "kind": kind, "severity": "info", "fields": fields,
    }  # fmt: skip


def happened(number: int, topic: str, at: float, **data: Any) -> dict[str, Any]:
    return {"topic": topic, "seq": number, "time": datetime.fromtimestamp(at, UTC).isoformat(), "data": data}


RECORD = [
    recorded(1, "daemon.ready", NOW - 60, seconds=0.5),
    recorded(2, "model.state", NOW - 50, model="digits", state="READY"),
    recorded(3, "operator.action", NOW - 0.01, actor="anna", action="load", audit=7, model="text"),
]
STREAM = [
    # while the record was read; it holds this one already
    happened(8, "operator.load", NOW, actor="anna", model="text"),
    happened(9, "memory.leak", NOW + 1, process="front"),
    happened(10, "model.progress", NOW + 2, percent=40),
    happened(11, "model.state", NOW + 3, model="text", state="FAILED"),
    happened(12, "daemon.draining", NOW + 4),
]


class Answering(BaseHTTPRequestHandler):
    """An appliance, as far as its events go."""

    record_is_off: ClassVar[bool] = False

    def do_GET(self) -> None:
        asked = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
        if "since" not in asked:
            self._answer(200, "".join(json.dumps(event) + "\n" for event in STREAM))
        elif self.record_is_off:
            self._answer(503, json.dumps({"error": "the recorder is off"}))
        else:
            since, kind = float(asked["since"]), asked.get("kind", "")
            found = [one for one in RECORD if one["time"] >= since and one["kind"].startswith(kind)]
            self._answer(200, json.dumps({"events": found}))

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the name of the base class
        """Quiet."""


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), name="answering")
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def follow(url: str, *more: str) -> list[dict[str, Any]]:
    done = CliRunner().invoke(app, ["events", "--follow", "--json", "--url", url, *more])
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_what_was_recorded_comes_first_then_what_happens_once_and_in_one_shape(url: str) -> None:
    found = follow(url, "--since", "1h")
    assert [event["kind"] for event in found] == [
        *("daemon.ready", "model.state", "operator.action"),
        *("memory.leak", "model.progress", "model.state", "daemon.draining"),
    ]
    assert {tuple(event) for event in found} == {("time", "kind", "severity", "fields")}
    assert found[-1]["time"] == pytest.approx(NOW + 4)
    assert [event["severity"] for event in found][-2] == "error"


def test_since_and_kind_choose_of_both(url: str) -> None:
    since = datetime.fromtimestamp(NOW - 55, UTC).isoformat()
    assert [event["kind"] for event in follow(url, "--since", since)][:2] == ["model.state", "operator.action"]
    assert [event["kind"] for event in follow(url, "--since", "1h", "--kind", "daemon")] == [
        "daemon.ready",
        "daemon.draining",
    ]
    assert [event["fields"]["model"] for event in follow(url, "--since", "1h", "--kind", "model.state")] == [
        "digits",
        "text",
    ]
    assert follow(url, "--kind", "mod") == []


def test_without_since_it_begins_now_and_a_limit_counts_what_is_new(url: str) -> None:
    found = follow(url, "--limit", "2")
    assert [event["kind"] for event in found] == ["operator.action", "memory.leak"]
    assert found[0]["fields"] == {"actor": "anna", "action": "load", "model": "text"}
    assert len(follow(url, "--since", "1h", "--limit", "1")) == 4


def test_lines_for_people_look_the_same_before_and_after(url: str) -> None:
    done = CliRunner().invoke(app, ["events", "-f", "--since", "1h", "--kind", "model.state", "--url", url])
    before, after = done.stdout.splitlines()
    assert "info     model.state        model=digits state=READY" in before
    assert "error    model.state        model=text state=FAILED" in after


def test_without_a_record_it_says_so_and_follows(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Answering, "record_is_off", True)
    done = CliRunner().invoke(app, ["events", "-f", "--since", "1h", "--limit", "1", "--json", "--url", url])
    assert done.exit_code == 0
    assert "the recorder is off" in done.stderr
    assert len(done.stdout.splitlines()) == 1
