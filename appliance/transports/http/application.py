"""What each URL means: routes to use cases, use cases to documents.

Knows the service and the codecs, and of HTTP only methods, paths and header lines. One function answers each route; slow ones
(load, unload, events) run as tasks owned here.
"""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections import deque
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import msgspec

from appliance.config import HttpConfig
from appliance.core.description import ModelDescription
from appliance.core.errors import ApplianceError, ErrorCode, invalid, not_found, unsupported
from appliance.core.request import InferenceResponse, ModelName, Version
from appliance.protocols import kserve
from appliance.protocols.kserve_binary import JSON_REPLY, Limits, ReplyFormat, decode_infer, encode_infer
from appliance.transports.http import compression
from appliance.transports.http.connection import Exchange

if TYPE_CHECKING:
    from appliance.service import Event, InferenceService, Ticket

log = logging.getLogger(__name__)

JSON_HEAD = b"Content-Type: application/json\r\n"
METRICS_HEAD = b"Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n"

KNOWN_PATHS = 1024
"""Paths whose meaning is remembered; clients use a handful."""

EVENT_BACKLOG = 256
"""Events that wait for a client of /v2/appliance/events; whoever falls further behind is cut off and may come again."""

SMALL_BODY_BYTES = 64 << 10
"""What a request other than an inference may carry."""

MODEL_PATH = re.compile(r"^/v2/models/([^/]+)(?:/versions/([0-9]+))?(?:/(infer|ready|config|stats))?$")
REPOSITORY_PATH = re.compile(r"^/v2/repository(?:/([^/]+))?/(?:(index)|models/([^/]+)/(load|unload))$")
MEMORY_PATH = re.compile(r"^/v2/(?:system|cuda)sharedmemory(?:/region/[^/]+)?/(status|register|unregister)$")

Handler = Callable[[Exchange, "Route"], None]


class Route(msgspec.Struct, frozen=True):
    """What a path means: which method it takes, who answers, and the names in it."""

    method: str
    handler: Handler
    model: ModelName = ModelName("")
    version: Version = Version("")
    action: str = ""
    changes: bool = False


class HttpApplication:
    """The routes and their answers."""

    def __init__(self, service: InferenceService, config: HttpConfig, metrics: Callable[[], bytes]) -> None:
        self._service = service
        self._config = config
        self._metrics = metrics
        self._limits = Limits(config.max_json_bytes, config.max_json_depth)
        self._routes: dict[str, Route | None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
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
            "/v2/appliance/events": Route("GET", self._events),
        }

    # --- the connection's calls ---

    def check(self, exchange: Exchange) -> None:
        """Refuse by the head alone what needs no body: an unknown path, a wrong method, a foreign page."""
        route = self._route(exchange.path)
        if route is None:
            raise not_found("Not Found")
        if exchange.method not in (route.method, "HEAD" if route.method == "GET" else route.method):
            return  # answered by `handle`, which can name the method to use
        if route.changes:
            _check_origin(exchange)
        if route.action != "infer" and int(exchange.headers.get("Content-Length") or 0) > SMALL_BODY_BYTES:
            raise kserve.too_large("the body", SMALL_BODY_BYTES)

    def handle(self, exchange: Exchange) -> None:
        """Answer, now or later. Nothing raised here reaches the connection."""
        try:
            route = self._route(exchange.path)
            if route is None:
                raise not_found("Not Found")
            if exchange.method != route.method and not (exchange.method == "HEAD" and route.method == "GET"):
                self._wrong_method(exchange, route)
                return
            route.handler(exchange, route)
        except ApplianceError as error:
            self._error(exchange, error)
        except Exception:
            self._bug(exchange)

    def _route(self, path: str) -> Route | None:
        """The meaning of a path; its query is ignored."""
        try:
            return self._routes[path]
        except KeyError:
            pass
        route = self._parse(path)
        if len(self._routes) >= KNOWN_PATHS:
            self._routes.clear()
        if len(path) <= 1024:
            self._routes[path] = route
        return route

    def _parse(self, target: str) -> Route | None:
        path = urlsplit(target).path if "://" in target.partition("?")[0] else target.partition("?")[0]
        fixed = self._fixed.get(path)
        if fixed is not None:
            return fixed
        if match := MODEL_PATH.match(path):
            return self._model_route(ModelName(unquote(match[1])), Version(match[2] or ""), match[3] or "")
        if match := REPOSITORY_PATH.match(path):
            if match[1]:
                return Route("POST", self._named_repository)
            if match[2]:
                return Route("POST", self._index)
            return Route("POST", self._control, ModelName(unquote(match[3])), action=match[4], changes=True)
        if match := MEMORY_PATH.match(path):
            method = "GET" if match[1] == "status" else "POST"
            return Route(method, self._shared_memory, action=match[1])
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
        body = exchange.body
        encoding = headers.get("Content-Encoding")
        if encoding is not None:
            body = compression.inflate(body, encoding, self._config.max_body_bytes)
        length = headers.get("Inference-Header-Content-Length")
        header_length = None if length is None else _length(length)
        model, version = route.model, route.version

        def describe() -> ModelDescription:
            return self._service.describe_model(model, version)

        request, form = decode_infer(memoryview(body), header_length, model, version, self._limits, describe)
        InferExchange(self, exchange, form).submit(self._service, request)

    def answer(self, exchange: Exchange, response: InferenceResponse, form: ReplyFormat) -> None:
        """Write an inference's answer."""
        header_length, parts = encode_infer(response, form)
        if header_length is None:
            head = JSON_HEAD
        else:
            head = b"Content-Type: application/octet-stream\r\nInference-Header-Content-Length: %d\r\n" % header_length
        self._send(exchange, 200, parts, head)

    def _send(self, exchange: Exchange, status: int, parts: list[bytes], head: bytes) -> None:
        """Reply, compressed if the client asked for it and it is worth it."""
        accept = exchange.headers.get("Accept-Encoding")
        if accept is not None and sum(map(len, parts)) >= compression.MINIMUM_BYTES:
            encoding = compression.choose(accept)
            if encoding:
                parts = [compression.deflate(b"".join(parts), encoding)]
                head += f"Content-Encoding: {encoding}\r\nVary: Accept-Encoding\r\n".encode()
        exchange.reply(status, parts, head)

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

    def _plain(self, exchange: Exchange) -> bytes:
        return compression.inflate(exchange.body, exchange.headers.get("Content-Encoding", ""), SMALL_BODY_BYTES)

    def _named_repository(self, exchange: Exchange, route: Route) -> None:
        raise unsupported("repositories have no names here; use /v2/repository/…")

    def _shared_memory(self, exchange: Exchange, route: Route) -> None:
        if route.action == "register":
            raise unsupported("shared memory is not offered; send the data in the request")
        if route.action == "status":
            self._json(exchange, [])
        else:
            exchange.reply(200, [b""], JSON_HEAD)

    def _serve_metrics(self, exchange: Exchange, route: Route) -> None:
        self._send(exchange, 200, [self._metrics()], METRICS_HEAD)

    def _status(self, exchange: Exchange, route: Route) -> None:
        self._json(exchange, self._service.snapshot())

    def _workers(self, exchange: Exchange, route: Route) -> None:
        self._json(exchange, self._service.workers())

    # --- what takes longer ---

    def _control(self, exchange: Exchange, route: Route) -> None:
        kserve.check_control_request(self._plain(exchange))
        work = self._service.load if route.action == "load" else self._service.unload

        async def run() -> None:
            try:
                await work(route.model)
            except ApplianceError as error:
                self._error(exchange, error)
            except Exception:
                self._bug(exchange)
            else:
                exchange.reply(200, [b""], JSON_HEAD)

        self._own(run(), f"{route.action}-{route.model}")

    def _events(self, exchange: Exchange, route: Route) -> None:
        """Events as JSON lines, from now on, until the client goes or falls behind."""
        limit = _query_number(exchange.path, "limit")
        write = exchange.begin_stream("application/x-ndjson")
        waiting: deque[bytes] = deque()
        sent = 0

        def tell(event: Event) -> None:
            nonlocal sent
            waiting.append(msgspec.json.encode(event) + b"\n")
            keeps_up = True
            while waiting and keeps_up:
                keeps_up = write(waiting.popleft())
            sent += 1
            if len(waiting) > EVENT_BACKLOG or (limit and sent >= limit):
                end()
                exchange.close_stream()

        end = self._service.subscribe(tell)
        exchange.on_gone = end

    def _own(self, coroutine: Coroutine[None, None, None], name: str) -> None:
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """End what still runs."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- errors ---

    def _error(self, exchange: Exchange, error: ApplianceError) -> None:
        if exchange.replied:
            return
        if error.code is ErrorCode.UNSUPPORTED and "Content-Encoding" in error.message:
            exchange.reply(
                501, [kserve.error_document(error.message)], JSON_HEAD + b"Accept-Encoding: gzip, deflate\r\n"
            )
            return
        exchange.reply_error(error, self._config.default_retry_after_s)

    def _wrong_method(self, exchange: Exchange, route: Route) -> None:
        message = f"{exchange.method} is not allowed here; use {route.method}"
        exchange.reply(405, [kserve.error_document(message)], JSON_HEAD + f"Allow: {route.method}\r\n".encode())

    def _bug(self, exchange: Exchange) -> None:
        """An exception of ours: logged once with a number that the client gets too."""
        number = uuid.uuid4().hex[:12]
        log.exception("http.bug", extra={"fields": {"request": number, "method": exchange.method}})
        if not exchange.replied:
            exchange.reply(500, [kserve.error_document(f"internal error {number}; the log has the details")], JSON_HEAD)


class InferExchange:
    """One inference between its admission and its answer."""

    __slots__ = ("_application", "_exchange", "_form", "_service", "_ticket")

    def __init__(self, application: HttpApplication, exchange: Exchange, form: ReplyFormat = JSON_REPLY) -> None:
        self._application = application
        self._exchange = exchange
        self._form = form
        self._ticket: Ticket | None = None
        self._service: InferenceService | None = None

    def submit(self, service: InferenceService, request: Any) -> None:
        """Admit the request; from then on a client that goes away cancels it."""
        self._service = service
        self._ticket = service.submit(request, self.done)
        self._exchange.on_gone = self.gone

    def done(self, outcome: InferenceResponse | ApplianceError) -> None:
        """The one answer."""
        exchange = self._exchange
        exchange.on_gone = None
        if exchange.replied:
            return
        try:
            if isinstance(outcome, ApplianceError):
                self._application._error(exchange, outcome)
            else:
                self._application.answer(exchange, outcome, self._form)
        except ApplianceError as error:
            self._application._error(exchange, error)
        except Exception:
            self._application._bug(exchange)

    def gone(self) -> None:
        """The client hung up: nobody waits for this any more."""
        if self._service is not None and self._ticket is not None:
            self._service.cancel(self._ticket)


def _length(value: str) -> int:
    if not value.isascii() or not value.isdecimal() or len(value) > 12:
        raise invalid(f"Inference-Header-Content-Length must be a number of bytes, {value[:40]!r} came")
    return int(value)


def _query_number(path: str, name: str) -> int:
    match = re.search(rf"[?&]{name}=([0-9]{{1,9}})(?:&|$)", path)
    return int(match[1]) if match else 0


def _check_origin(exchange: Exchange) -> None:
    """A web page of another site must not load or unload models through somebody's browser (DNS rebinding, CSRF)."""
    origin = exchange.headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc != exchange.headers.get("Host", ""):
        raise ApplianceError(ErrorCode.PERMISSION_DENIED, "a page of another origin may not change anything here")
