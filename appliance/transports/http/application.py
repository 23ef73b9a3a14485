"""What each URL means: routes to use cases, use cases to documents.

Knows the service and the codecs, and of HTTP only methods, paths and header lines. One function answers each route; what takes
longer (load, unload, much compression) runs in tasks owned here.
"""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import msgspec

from appliance.config import HttpConfig
from appliance.core.description import ModelDescription
from appliance.core.errors import ApplianceError, ErrorCode, invalid, not_found, unsupported
from appliance.core.request import InferenceRequest, InferenceResponse, ModelName, Version
from appliance.core.tensor import Buffer
from appliance.observability.requests import RequestLog
from appliance.protocols import kserve
from appliance.protocols.kserve_binary import Limits, ReplyFormat, decode_infer, encode_infer
from appliance.transports.http import compression, pages, streams
from appliance.transports.http.exchange import JSON_HEAD, Exchange
from appliance.transports.http.origin import check_origin
from appliance.transports.http.records import RecordRoutes

if TYPE_CHECKING:
    from appliance.service import InferenceService, Records, Ticket

log = logging.getLogger(__name__)

METRICS_HEAD = b"Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
BINARY_HEAD = b"Content-Type: application/octet-stream\r\nInference-Header-Content-Length: %d\r\n"

KNOWN_PATHS = 1024
"""Paths whose meaning is remembered; clients use a handful."""

SMALL_BODY_BYTES = 64 << 10
"""What a request other than an inference may carry, inflated or not."""

MODEL_PATH = re.compile(r"/v2/models/([^/]+)(?:/versions/([0-9]+))?(?:/(infer|ready|config|stats))?")
VERIFICATION_PATH = re.compile(r"/v2/appliance/models/([^/]+)(?:/versions/([0-9]+))?/verification")
REPOSITORY_PATH = re.compile(r"/v2/repository(?:/([^/]+))?/(?:(index)|models/([^/]+)/(load|unload))")
MEMORY_PATH = re.compile(r"/v2/(?:system|cuda)sharedmemory(?:/region/[^/]+)?/(status|register|unregister)")
AUTHORITY = re.compile(r"[a-z][a-z0-9+.-]*://[^/?]*", re.IGNORECASE)

Handler = Callable[[Exchange, "Route"], None]


class Route(msgspec.Struct, frozen=True):
    """What a path means: which method it takes, who answers, and the names in it."""

    method: str
    handler: Handler
    model: ModelName = ModelName("")
    version: Version = Version("")
    action: str = ""
    changes: bool = False


class HoldRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a hold on the governor."""

    level: str
    seconds: float
    reason: str


class HttpApplication:
    """The routes and their answers."""

    def __init__(
        self,
        service: InferenceService,
        config: HttpConfig,
        metrics: Callable[[], bytes],
        records: Records | None = None,
    ) -> None:
        self._service = service
        self._config = config
        self._metrics = metrics
        self._records = RecordRoutes(records)
        self._limits = Limits(config.max_json_bytes, config.max_json_depth)
        self._routes: dict[str, Route | None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._pages = pages.Pages()
        self._unreadable = RequestLog("request.refused")
        self._fixed: dict[str, Route] = {
            "/v2": Route("GET", self._server),
            "/v2/": Route("GET", self._server),
            "/v2/health/live": Route("GET", self._live),
            "/v2/health/ready": Route("GET", self._ready),
            "/v2/models/stats": Route("GET", self._statistics),
            "/metrics": Route("GET", self._serve_metrics),
            "/v2/appliance/status": Route("GET", self._status),
            "/v2/appliance/snapshot": Route("GET", self._status),
            "/v2/appliance/workers": Route("GET", self._workers),
            "/v2/appliance/governor": Route("GET", self._governor),
            "/v2/appliance/governor/hold": Route("POST", self._hold, changes=True),
            "/v2/appliance/governor/release": Route("POST", self._release, changes=True),
            "/v2/appliance/events": Route("GET", self._events),
            "/v2/appliance/stream": Route("GET", self._stream),
            "/v2/appliance/history": Route("GET", self._recorded, action="history"),
            "/v2/appliance/energy": Route("GET", self._recorded, action="energy"),
            "/v2/appliance/audit": Route("GET", self._recorded, action="audit"),
        }

    # --- the connection's calls ---

    def check(self, exchange: Exchange) -> int:
        """The bytes that the body may have. An unknown path, a wrong method and a foreign page are answered at once."""
        try:
            route = self._route(exchange.path)
            if route is None:
                raise not_found("Not Found")
            if exchange.method != route.method and not (exchange.method == "HEAD" and route.method == "GET"):
                _wrong_method(exchange, route.method)
            elif route.changes:
                check_origin(exchange.headers)
        except ApplianceError as error:
            self.fail(exchange, error)
            return 0
        return self._config.max_body_bytes if route.action == "infer" else SMALL_BODY_BYTES

    def handle(self, exchange: Exchange) -> None:
        """Answer, now or later. Nothing raised here reaches the connection."""
        route = self._route(exchange.path)
        assert route is not None
        try:
            route.handler(exchange, route)
        except Exception as error:
            self.fail(exchange, error)

    def fail(self, exchange: Exchange, error: Exception) -> None:
        """Answer with an error; one that is not ours is logged, and the client gets its number."""
        known = error if isinstance(error, ApplianceError) else self.bug()
        if not exchange.replied:
            more = (
                b"Accept-Encoding: gzip, deflate\r\n"
                if isinstance(error, compression.UnsupportedEncodingError)
                else b""
            )
            exchange.reply_error(known, more)

    def bug(self) -> ApplianceError:
        """An exception that nobody expected is being handled: log it, and give what the client may know."""
        number = uuid.uuid4().hex[:12]
        log.exception("http.bug", extra={"fields": {"incident": number}})
        return ApplianceError(ErrorCode.INTERNAL, f"internal error {number}; the appliance's log says more")

    # --- paths ---

    def _route(self, path: str) -> Route | None:
        """The meaning of a path; its query is ignored."""
        try:
            return self._routes[path]
        except KeyError:
            pass
        route = self._parse(path)
        if len(path) <= 1024:
            if len(self._routes) >= KNOWN_PATHS:
                self._routes.clear()
            self._routes[path] = route
        return route

    def _parse(self, target: str) -> Route | None:
        if not target.startswith("/"):  # the absolute form, as sent to a proxy
            target = AUTHORITY.sub("", target, count=1)
        path = target.partition("?")[0].partition("#")[0]
        fixed = self._fixed.get(path)
        if fixed is not None:
            return fixed
        if self._pages.knows(path):
            return Route("GET", self._page, action=path)
        if match := MODEL_PATH.fullmatch(path):
            return self._model_route(ModelName(unquote(match[1])), Version(match[2] or ""), match[3] or "")
        if match := VERIFICATION_PATH.fullmatch(path):
            return Route("GET", self._verification, ModelName(unquote(match[1])), Version(match[2] or ""))
        if match := REPOSITORY_PATH.fullmatch(path):
            if match[1]:
                return Route("POST", _named_repository)
            if match[2]:
                return Route("POST", self._index)
            return Route("POST", self._control, ModelName(unquote(match[3])), action=match[4], changes=True)
        if match := MEMORY_PATH.fullmatch(path):
            return Route("GET" if match[1] == "status" else "POST", _shared_memory, action=match[1])
        return None

    def _model_route(self, model: ModelName, version: Version, action: str) -> Route:
        handlers: dict[str, tuple[str, Handler]] = {
            "": ("GET", self._model),
            "infer": ("POST", self._infer),
            "ready": ("GET", self._model_ready),
            "config": ("GET", self._model_config),
            "stats": ("GET", self._statistics),
        }
        method, handler = handlers[action]
        return Route(method, handler, model, version, action)

    # --- inference ---

    def _infer(self, exchange: Exchange, route: Route) -> None:
        headers = exchange.headers
        length = headers.get("Inference-Header-Content-Length")
        header_length = None if length is None else _length(length)
        if not compression.encoded(headers.get("Content-Encoding")):
            self._infer_plain(exchange, route, header_length, exchange.body)
            return
        limit = self._config.max_json_bytes if header_length is None else self._config.max_body_bytes
        self._inflated(exchange, limit, lambda body: self._infer_plain(exchange, route, header_length, body))

    def _infer_plain(self, exchange: Exchange, route: Route, header_length: int | None, body: Buffer) -> None:
        def describe() -> ModelDescription:
            return self._service.describe_model(route.model, route.version)

        view = memoryview(body)
        try:
            request, form = decode_infer(view, header_length, route.model, route.version, self._limits, describe)
        except ApplianceError as error:
            self._unreadable.add(error, model=route.model)
            raise
        InferExchange(self, exchange, form).submit(self._service, request)

    def answer(self, exchange: Exchange, response: InferenceResponse, form: ReplyFormat) -> None:
        """Write an inference's answer."""
        header_length, parts = encode_infer(response, form)
        if header_length is None:
            self._send(exchange, 200, parts, JSON_HEAD)
        else:
            self._send(exchange, 200, parts, BINARY_HEAD % header_length, tensors=True)

    # --- bodies, compressed or not ---

    def _send(
        self, exchange: Exchange, status: int, parts: Sequence[Buffer], head: bytes, *, tensors: bool = False
    ) -> None:
        """Reply, compressed if the client asked for it and it is worth it."""
        accept = exchange.headers.get("Accept-Encoding")
        if accept is not None:
            size = sum(map(len, parts))
            encoding = compression.choose(accept, tensors=tensors) if size >= compression.MINIMUM_BYTES else ""
            if encoding:
                head += b"Content-Encoding: %b\r\nVary: Accept-Encoding\r\n" % encoding.encode()
                pieces = compression.compress(parts, encoding)
                if size <= compression.STEP_BYTES:
                    exchange.reply(status, list(pieces), head)
                else:
                    self._spawn(exchange, _reply_in_steps(exchange, status, pieces, head), "http-compress")
                return
        exchange.reply(status, parts, head)

    def _inflated(self, exchange: Exchange, limit: int, then: Callable[[Buffer], None]) -> None:
        """Go on with the inflated body: at once if it is small, else step by step between other people's requests."""
        inflation = compression.Inflation(exchange.body, exchange.headers.get("Content-Encoding", ""), limit)
        done = inflation.step()
        exchange.reserve(inflation.nbytes)
        if done:
            then(inflation.data)
            return

        async def rest() -> None:
            done = False
            while not done:
                await asyncio.sleep(0)
                before = inflation.nbytes
                done = inflation.step()
                exchange.reserve(inflation.nbytes - before)
            then(inflation.data)

        task = self._spawn(exchange, rest(), "http-inflate")

        def gone() -> None:
            task.cancel()

        exchange.on_gone = gone

    def _plain(self, exchange: Exchange) -> bytes:
        """The body of a small request."""
        encoding = exchange.headers.get("Content-Encoding")
        if encoding is None or not compression.encoded(encoding):
            return bytes(exchange.body)
        inflation = compression.Inflation(exchange.body, encoding, SMALL_BODY_BYTES)
        while not inflation.step():  # at most twice: the limit is below one step
            pass
        return inflation.data

    # --- documents ---

    def _json(self, exchange: Exchange, document: Any, status: int = 200) -> None:
        self._send(exchange, status, [msgspec.json.encode(document)], JSON_HEAD)

    def _server(self, exchange: Exchange, route: Route) -> None:
        self._json(exchange, kserve.server_document(self._service.describe_server()))

    def _live(self, exchange: Exchange, route: Route) -> None:
        live = self._service.live()
        self._json(exchange, {"live": live}, 200 if live else 503)

    def _ready(self, exchange: Exchange, route: Route) -> None:
        ready = self._service.ready()
        self._json(exchange, {"live": self._service.live(), "ready": ready}, 200 if ready else 503)

    def _model(self, exchange: Exchange, route: Route) -> None:
        self._json(exchange, kserve.model_document(self._service.describe_model(route.model, route.version)))

    def _model_ready(self, exchange: Exchange, route: Route) -> None:
        ready = self._service.model_ready(route.model, route.version)
        self._json(exchange, {"name": route.model, "ready": ready}, 200 if ready else 503)

    def _model_config(self, exchange: Exchange, route: Route) -> None:
        self._json(exchange, kserve.config_document(self._service.describe_model(route.model, route.version)))

    def _statistics(self, exchange: Exchange, route: Route) -> None:
        self._json(exchange, kserve.statistics_document(self._service.statistics(route.model, route.version)))

    def _index(self, exchange: Exchange, route: Route) -> None:
        ready_only = kserve.decode_index_request(self._plain(exchange))
        self._json(exchange, kserve.index_document(self._service.index(ready_only=ready_only)))

    def _serve_metrics(self, exchange: Exchange, route: Route) -> None:
        self._send(exchange, 200, [self._metrics()], METRICS_HEAD)

    def _status(self, exchange: Exchange, route: Route) -> None:
        self._json(exchange, self._service.snapshot())

    def _workers(self, exchange: Exchange, route: Route) -> None:
        self._json(exchange, self._service.workers())

    def _governor(self, exchange: Exchange, route: Route) -> None:
        self._json(exchange, self._service.governor())

    def _hold(self, exchange: Exchange, route: Route) -> None:
        try:
            wanted = msgspec.json.decode(self._plain(exchange), type=HoldRequest)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            example = '{"level": "HOT", "seconds": 600, "reason": "…"}'
            raise invalid(f"expected {example}: {error}") from error
        self._json(exchange, self._service.hold_governor(wanted.level, wanted.seconds, wanted.reason))

    def _release(self, exchange: Exchange, route: Route) -> None:
        self._json(exchange, self._service.release_governor())

    # --- what takes longer ---

    def _control(self, exchange: Exchange, route: Route) -> None:
        kserve.check_control_request(self._plain(exchange))
        work = self._service.load if route.action == "load" else self._service.unload

        async def run() -> None:
            await work(route.model)
            exchange.reply(200, [], JSON_HEAD)

        # a client that goes away does not stop it
        self._spawn(exchange, run(), f"http-{route.action}")

    def _verification(self, exchange: Exchange, route: Route) -> None:
        async def run() -> None:
            self._json(exchange, await self._service.verification(route.model, route.version))

        self._spawn(exchange, run(), "http-verification")

    def _events(self, exchange: Exchange, route: Route) -> None:
        """What happens, from now on; or, if the query asks for it, what was recorded."""
        if exchange.method != "HEAD" and RecordRoutes.wants_events(exchange.path):
            self._recorded(exchange, msgspec.structs.replace(route, action="events"))
        else:
            streams.lines(exchange, self._service)

    def _stream(self, exchange: Exchange, route: Route) -> None:
        streams.page(exchange, self._service)

    def _page(self, exchange: Exchange, route: Route) -> None:
        file = self._pages.kept(route.action)
        if file is not None:
            pages.send(exchange, file)
            return

        async def read() -> None:
            pages.send(exchange, await asyncio.to_thread(self._pages.read, route.action))

        self._spawn(exchange, read(), "http-page")

    def _recorded(self, exchange: Exchange, route: Route) -> None:
        """A question to the recorder: it reads a file, so a thread asks."""
        question = self._records.question(route.action, exchange.path)

        async def run() -> None:
            self._json(exchange, await self._records.ask(question))

        self._spawn(exchange, run(), f"http-{route.action}")

    def _spawn(self, exchange: Exchange, work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        """Run what ends in an answer; its errors are answers too."""

        async def run() -> None:
            try:
                await work
            except Exception as error:
                self.fail(exchange, error)

        task = asyncio.create_task(run(), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """End what still runs."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class InferExchange:
    """One inference between its admission and its answer."""

    __slots__ = ("_application", "_exchange", "_form", "_service", "_ticket")

    _service: InferenceService
    _ticket: Ticket

    def __init__(self, application: HttpApplication, exchange: Exchange, form: ReplyFormat) -> None:
        self._application = application
        self._exchange = exchange
        self._form = form

    def submit(self, service: InferenceService, request: InferenceRequest) -> None:
        """Admit the request; from then on a client that goes away cancels it."""
        self._service = service
        self._ticket = service.submit(request, self.done)
        self._exchange.on_gone = self.gone

    def done(self, outcome: InferenceResponse | ApplianceError) -> None:
        """The one answer."""
        exchange = self._exchange
        exchange.on_gone = None
        try:
            if isinstance(outcome, ApplianceError):
                self._application.fail(exchange, outcome)
            else:
                self._application.answer(exchange, outcome, self._form)
        except Exception as error:
            self._application.fail(exchange, error)

    def gone(self) -> None:
        """The client hung up: nobody waits for this any more."""
        self._service.cancel(self._ticket)


async def _reply_in_steps(exchange: Exchange, status: int, pieces: compression.Pieces, head: bytes) -> None:
    parts = []
    for piece in pieces:
        parts.append(piece)
        await asyncio.sleep(0)
    exchange.reply(status, parts, head)


def _named_repository(exchange: Exchange, route: Route) -> None:
    raise unsupported("repositories have no names here; use /v2/repository/…")


def _shared_memory(exchange: Exchange, route: Route) -> None:
    """Clients ask for the status and unregister everything before they begin: both are true of nothing."""
    if route.action == "register":
        raise unsupported("shared memory is not offered; send the data in the request")
    exchange.reply(200, [b"[]"] if route.action == "status" else [], JSON_HEAD)


def _wrong_method(exchange: Exchange, allowed: str) -> None:
    message = f"{exchange.method} is not allowed here; use {allowed}"
    listed = "GET, HEAD" if allowed == "GET" else allowed
    exchange.reply(405, [kserve.error_document(message)], JSON_HEAD + f"Allow: {listed}\r\n".encode())


def _length(value: str) -> int:
    if not value.isascii() or not value.isdecimal() or len(value) > 12:
        raise invalid(f"Inference-Header-Content-Length must be a number of bytes, {value[:40]!r} came")
    return int(value)
