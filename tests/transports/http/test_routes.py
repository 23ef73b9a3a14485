"""Every route of the protocol, as the checklist of real clients wants it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from appliance.core.errors import ApplianceError, ErrorCode, not_found
from appliance.core.request import ModelName
from tests.transports.http.conftest import House, infer_json


class TestHealth:
    async def test_live_and_ready_have_bodies_that_every_client_reads(self, house: House) -> None:
        assert (await house.ask("GET", "/v2/health/live")).json == {"live": True}
        assert (await house.ask("GET", "/v2/health/ready")).json == {"live": True, "ready": True}
        assert (await house.ask("GET", "/v2/models/echo/ready")).json == {"name": "echo", "ready": True}
        assert (await house.ask("GET", "/v2/models/echo/versions/1/ready")).json == {"name": "echo", "ready": True}

    async def test_not_ready_is_503_with_the_same_bodies(self, house: House) -> None:
        house.service.loaded = False
        ready = await house.ask("GET", "/v2/health/ready")
        assert (ready.status, ready.json) == (503, {"live": True, "ready": False})
        model = await house.ask("GET", "/v2/models/echo/ready")
        assert (model.status, model.json) == (503, {"name": "echo", "ready": False})
        assert (await house.ask("GET", "/v2/health/live")).status == 200

    async def test_an_unknown_model_is_404(self, house: House) -> None:
        assert (await house.ask("GET", "/v2/models/nope/ready")).status == 404
        assert (await house.ask("GET", "/v2/models/echo/versions/2/ready")).status == 404


class TestDocuments:
    @pytest.mark.parametrize("path", ["/v2", "/v2/", "/v2?test_1=1&test_2=2", "http://other/v2"])
    async def test_server_metadata(self, house: House, path: str) -> None:
        reply = await house.ask("GET", path)
        assert reply.status == 200
        assert reply.headers["content-type"] == "application/json"
        assert reply.json == {"name": "appliance", "version": "0.1.0", "extensions": ["binary_tensor_data"]}

    @pytest.mark.parametrize("path", ["/v2/models/echo", "/v2/models/echo/versions/1", "/v2/models/ech%6f?a=b"])
    async def test_model_metadata(self, house: House, path: str) -> None:
        document = (await house.ask("GET", path)).json
        assert (document["name"], document["versions"], document["platform"]) == ("echo", ["1"], "loopback")
        assert document["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]

    async def test_model_configuration(self, house: House) -> None:
        document = (await house.ask("GET", "/v2/models/echo/versions/1/config")).json
        assert document["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [4]}]
        assert document["max_batch_size"] == 8

    @pytest.mark.parametrize("path", ["/v2/models/stats", "/v2/models/echo/stats", "/v2/models/echo/versions/1/stats"])
    async def test_statistics(self, house: House, path: str) -> None:
        (model,) = (await house.ask("GET", path)).json["model_stats"]
        assert (model["name"], model["version"]) == ("echo", "1")

    async def test_head_is_get_without_the_body(self, house: House) -> None:
        client = await house.connect()
        reply = await client.ask("HEAD", "/v2")
        assert int(reply.headers["content-length"]) > 0
        assert (await client.ask("GET", "/v2")).status == 200

    async def test_a_reply_has_a_date(self, house: House) -> None:
        assert (await house.ask("GET", "/v2")).headers["date"].endswith("GMT")

    @pytest.mark.parametrize("path", ["/v2/appliance/status", "/v2/appliance/snapshot"])
    async def test_the_appliances_own_status(self, house: House, path: str) -> None:
        assert (await house.ask("GET", path)).json["boot"] == "boot-1"

    @pytest.mark.parametrize("version", ["", "/versions/1"])
    async def test_the_verification_of_what_serves_is_a_document(self, house: House, version: str) -> None:
        house.service.report = b'{"passed":true}'
        answer = await house.ask("GET", f"/v2/appliance/models/echo{version}/verification")
        assert answer.status == 200
        assert answer.json["report"] == {"passed": True}
        assert (answer.json["model"], answer.json["version"], answer.json["engine"]) == ("echo", "1", "int8")

    @pytest.mark.parametrize("model", ["echo", "none", "echo/versions/7"])
    async def test_no_verification_is_not_found_in_words(self, house: House, model: str) -> None:
        answer = await house.ask("GET", f"/v2/appliance/models/{model}/verification")
        assert answer.status == 404
        assert "there is no verification" in answer.json["error"] or "is not found" in answer.json["error"]

    async def test_workers_are_a_list(self, house: House) -> None:
        assert (await house.ask("GET", "/v2/appliance/workers")).json == []

    async def test_metrics_are_text(self, house: House) -> None:
        reply = await house.ask("GET", "/metrics")
        assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert b'nv_inference_request_success{model="echo",version="1"} 0\n' in reply.body


class TestErrors:
    @pytest.mark.parametrize(
        "path",
        [
            *("/v1", "/v2/nope", "/v2/models", "/v2/models/", "/v2/models//infer", "/v2/models/echo/"),
            *("/v2/models/echo/versions/x", "/v2/models/a/b/c", "/v2/health", "/v2/trace/setting", "/v2/logging"),
            *("/v2/models/echo/infer\n", "/metrics/", "/v2/../etc/passwd", "//v2"),
        ],
    )
    async def test_an_unknown_path_is_404_in_json(self, house: House, path: str) -> None:
        client = await house.connect()
        client.send(f"GET {path.strip()}{'x' if path.endswith(chr(10)) else ''} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        reply = await client.reply()
        assert (reply.status, reply.error) == (404, "Not Found")

    @pytest.mark.parametrize(
        ("method", "path", "allowed"),
        [
            ("GET", "/v2/models/echo/infer", "POST"),
            ("DELETE", "/v2", "GET, HEAD"),
            ("POST", "/v2/health/live", "GET, HEAD"),
            ("PUT", "/v2/repository/models/echo/load", "POST"),
            ("OPTIONS", "/metrics", "GET, HEAD"),
        ],
    )
    async def test_a_wrong_method_is_405_and_says_which_is_right(
        self, house: House, method: str, path: str, allowed: str
    ) -> None:
        reply = await house.ask(method, path)
        assert (reply.status, reply.headers["allow"]) == (405, allowed)
        assert method in reply.error

    async def test_an_unknown_model_starts_with_tritons_words(self, house: House) -> None:
        reply = await house.ask("POST", "/v2/models/nope/infer", infer_json())
        assert reply.status == 404
        assert reply.error.startswith("Request for unknown model")

    @pytest.mark.parametrize(
        ("code", "status"),
        [
            (ErrorCode.INVALID_ARGUMENT, 400),
            (ErrorCode.SUPERSEDED, 409),
            (ErrorCode.RESOURCE_EXHAUSTED, 429),
            (ErrorCode.ENGINE_FAULT, 500),
            (ErrorCode.UNSUPPORTED, 501),
            (ErrorCode.UNAVAILABLE, 503),
            (ErrorCode.DEADLINE_EXCEEDED, 504),
        ],
    )
    @pytest.mark.parametrize("when", ["refusal", "failure"])
    async def test_an_error_has_its_status_and_tells_when_to_come_back(
        self, house: House, code: ErrorCode, status: int, when: str
    ) -> None:
        setattr(house.service, when, ApplianceError(code, "why", retry_after_s=0.02 if status in (429, 503) else None))
        reply = await house.infer(infer_json())
        assert (reply.status, reply.error) == (status, "why")
        assert reply.headers.get("retry-after") == ("1" if status in (429, 503) else None)

    async def test_a_long_wait_is_rounded_up(self, house: House) -> None:
        house.service.refusal = ApplianceError(ErrorCode.UNAVAILABLE, "later", retry_after_s=2.2)
        assert (await house.infer(infer_json())).headers["retry-after"] == "3"

    async def test_a_wait_that_nobody_named_is_the_configured_one(self, bare: House) -> None:
        await bare.start(default_retry_after_s=7.0)
        bare.service.refusal = ApplianceError(ErrorCode.RESOURCE_EXHAUSTED, "full")
        assert (await bare.infer(infer_json())).headers["retry-after"] == "7"

    async def test_a_bug_of_ours_is_500_with_a_number_that_the_log_has(
        self, house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(**_: Any) -> None:
            raise KeyError("/secret/path")

        monkeypatch.setattr(house.service, "index", broken)
        client = await house.connect()
        reply = await client.ask("POST", "/v2/repository/index", b"")
        (record,) = [record for record in caplog.records if record.message == "http.bug"]
        assert reply.status == 500
        assert vars(record)["fields"]["incident"] in reply.error
        assert "secret" not in reply.error
        assert (await client.ask("GET", "/v2")).status == 200


class TestRepository:
    async def test_the_index_takes_an_empty_body_and_a_wish(self, house: House) -> None:
        entry = {"name": "echo", "version": "1", "state": "READY", "reason": ""}
        assert (await house.ask("POST", "/v2/repository/index")).json == [entry]
        assert (await house.ask("POST", "/v2/repository/index", b'{"ready":true}')).json == [entry]
        house.service.loaded = False
        assert (await house.ask("POST", "/v2/repository/index", b'{"ready":true}')).json == []

    async def test_load_and_unload_answer_200_with_nothing(self, house: House) -> None:
        unloaded = await house.ask("POST", "/v2/repository/models/echo/unload", b'{"parameters":{}}')
        assert (unloaded.status, unloaded.body, house.service.loaded) == (200, b"", False)
        loaded = await house.ask("POST", "/v2/repository/models/echo/load")
        assert (loaded.status, loaded.body, house.service.loaded) == (200, b"", True)

    async def test_a_load_that_fails_says_so_in_tritons_words(self, house: House) -> None:
        reply = await house.ask("POST", "/v2/repository/models/nope/load", b"")
        assert reply.status == 404
        assert reply.error.startswith("failed to load 'nope'")

    async def test_a_bug_while_loading_is_an_answer_too(
        self, house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def broken(_: ModelName) -> None:
            raise KeyError("oops")

        monkeypatch.setattr(house.service, "load", broken)
        assert (await house.ask("POST", "/v2/repository/models/echo/load")).status == 500
        assert "http.bug" in caplog.messages

    async def test_a_named_repository_is_unsupported(self, house: House) -> None:
        assert (await house.ask("POST", "/v2/repository/mine/index")).status == 501
        assert (await house.ask("POST", "/v2/repository/mine/models/echo/load")).status == 501

    async def test_a_body_that_is_too_large_or_no_json_is_refused(self, house: House) -> None:
        assert (await house.ask("POST", "/v2/repository/index", b" " * 100_000)).status == 413
        assert (await house.ask("POST", "/v2/repository/index", b"[" * 60_000)).status == 400
        assert (
            await house.ask("POST", "/v2/repository/models/echo/load", b'{"parameters":{"config":"{}"}}')
        ).status == 501


class TestSharedMemory:
    @pytest.mark.parametrize("kind", ["system", "cuda"])
    async def test_nothing_is_registered_and_unregistering_nothing_works(self, house: House, kind: str) -> None:
        for where in ("", "/region/r"):
            status = await house.ask("GET", f"/v2/{kind}sharedmemory{where}/status")
            assert (status.status, status.json) == (200, [])
            gone = await house.ask("POST", f"/v2/{kind}sharedmemory{where}/unregister", b"")
            assert (gone.status, gone.body) == (200, b"")

    async def test_registering_is_unsupported(self, house: House) -> None:
        body = json.dumps({"key": "/a", "offset": 0, "byte_size": 4}).encode()
        reply = await house.ask("POST", "/v2/systemsharedmemory/region/r/register", body)
        assert reply.status == 501


class TestGovernor:
    async def test_a_hold_is_taken_shown_and_released(self, house: House) -> None:
        body = b'{"level": "HOT", "seconds": 600, "reason": "the fan is being changed"}'
        held = await house.ask("POST", "/v2/appliance/governor/hold", body)
        assert (held.status, json.loads(held.body)) == (200, {"level": "HOT"})
        assert json.loads((await house.ask("GET", "/v2/appliance/governor")).body) == {"level": "HOT"}
        released = await house.ask("POST", "/v2/appliance/governor/release", b"")
        assert (released.status, house.service.held) == (200, None)

    @pytest.mark.parametrize(
        "body",
        [b"", b"[]", b"{}", b'{"level": "HOT"}', b'{"level": "HOT", "seconds": "10", "reason": "x"}', b"\xff",
         b'{"level": "HOT", "seconds": 10, "reason": "x", "for": 1}', b'{"level": "NOMINAL", "seconds": 10, "reason": "x"}',
         b'{"level": "HOT", "seconds": 1e999, "reason": "x"}'],
    )  # fmt: skip
    async def test_what_is_no_hold_is_an_invalid_argument(self, house: House, body: bytes) -> None:
        reply = await house.ask("POST", "/v2/appliance/governor/hold", body)
        assert (reply.status, house.service.held) == (400, None)

    @pytest.mark.parametrize("path", ["/v2/appliance/governor/hold", "/v2/appliance/governor/release"])
    async def test_a_web_page_of_another_site_may_not(self, house: House, path: str) -> None:
        assert (await house.ask("POST", path, b"{}", Origin="http://evil.example")).status == 403
        assert (await house.ask("GET", path)).status == 405


class TestOrigin:
    @pytest.mark.parametrize(
        ("origin", "host"),
        [
            ("http://evil.example", "127.0.0.1:8000"),
            ("http://evil.example:8000", "evil.example:8000"),  # its own name, made to resolve to us
            ("http://127.0.0.1:9000", "127.0.0.1:8000"),
            ("null", "127.0.0.1:8000"),
            ("http://[", "127.0.0.1:8000"),
            ("http://a:b@127.0.0.1:8000", "127.0.0.1:8000"),
            ("", ""),
        ],
    )
    async def test_a_page_of_another_origin_cannot_unload(self, house: House, origin: str, host: str) -> None:
        reply = await house.ask("POST", "/v2/repository/models/echo/unload", b"", Origin=origin, Host=host)
        assert (reply.status, house.service.loaded) == (403, True)

    @pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "[::1]:8000", "192.168.1.7"])
    async def test_a_page_of_this_machine_can(self, house: House, host: str) -> None:
        reply = await house.ask("POST", "/v2/repository/models/echo/unload", b"", Origin=f"http://{host}", Host=host)
        assert reply.status == 200

    async def test_reading_and_inferring_need_no_origin(self, house: House) -> None:
        assert (await house.ask("GET", "/v2", Origin="http://evil.example")).status == 200
        assert (await house.infer(infer_json(), Origin="http://evil.example")).status == 200


async def test_many_paths_do_not_fill_the_memory(house: House) -> None:
    client = await house.connect()
    for number in range(3000):
        client.request("GET", f"/v2/models/m{number}")
    for _ in range(3000):
        assert (await client.reply()).status == 404
    assert len(house.transport.application._routes) <= 1024


async def test_a_refusal_by_the_service_before_a_model_is_known_keeps_the_connection(house: House) -> None:
    house.service.refusal = not_found("gone")
    client = await house.connect()
    assert (await client.ask("POST", "/v2/models/echo/infer", infer_json())).status == 404
    house.service.refusal = None
    assert (await client.ask("POST", "/v2/models/echo/infer", infer_json())).status == 200
