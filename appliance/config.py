"""appliance.toml: frozen structs with the limits of the whole house, and their defaults.

Units end names. Every limit here has an error code and a metric where it bites. `load` (below) refuses unknown keys, wrong
types and wrong ranges, all at once, with file:line and the nearest known key.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]


class HttpConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The HTTP face. `unix_socket` empty: `http.sock` in the runtime directory; "none" switches it off."""

    enabled: bool = True
    host: str = "127.0.0.1"
    port: Port = 8000
    unix_socket: str = ""
    header_timeout_s: Seconds = 10.0
    body_timeout_s: Seconds = 30.0
    idle_timeout_s: Seconds = 75.0
    write_timeout_s: Seconds = 10.0
    max_connections: Positive = 1024
    max_body_bytes: Positive = 64 << 20
    max_json_bytes: Positive = 2 << 20
    max_json_depth: Annotated[int, msgspec.Meta(ge=8, le=512)] = 64
    max_bytes_in_flight: Positive = 512 << 20
    default_retry_after_s: Seconds = 1.0


class ZmqConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The ZeroMQ face. Empty endpoints: `infer.ipc` / `events.ipc` in the runtime directory. "none" switches one off."""

    enabled: bool = True
    ipc: str = ""
    tcp: str = "tcp://127.0.0.1:5570"
    events_ipc: str = ""
    events_tcp: str = "tcp://127.0.0.1:5571"
    max_message_bytes: Positive = 64 << 20
    max_header_bytes: Positive = 64 << 10
    max_frames: Annotated[int, msgspec.Meta(ge=2, le=1024)] = 66
    receive_hwm: Positive = 64
    send_hwm: Positive = 64
    outbox_bytes: Positive = 64 << 20
    handshake_timeout_ms: Positive = 1500
    max_peer_in_flight: Positive = 256
    max_bytes_in_flight: Positive = 512 << 20
    event_heartbeat_s: Seconds = 1.0


class RepositoryConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where models live, and which are loaded at start: all of them, or those listed in `models`.

    `required`: readiness waits for these (empty: for all that are loaded at start).
    """

    path: str = "models"
    load: Literal["all", "listed"] = "all"
    models: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    parallel_loads: Annotated[int, msgspec.Meta(ge=1, le=32)] = 2


class WorkersConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Supervision of worker processes: how often one may die, and how restarts back off.

    A model whose workers die `crash_limit` times within `crash_window_s` is quarantined until somebody loads it again.
    """

    crash_limit: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 5
    crash_window_s: Seconds = 60.0
    backoff_initial_s: Seconds = 0.05
    backoff_max_s: Seconds = 5.0
    max_arena_bytes: Positive = 1 << 30


class LogConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Logs go to stderr. `auto`: human on a terminal, JSON elsewhere."""

    format: Literal["auto", "json", "human"] = "auto"
    level: Literal["debug", "info", "warning", "error"] = "info"


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole file. `runtime_dir` empty: $RUNTIME_DIRECTORY, else appliance/ in $XDG_RUNTIME_DIR, else in /tmp by uid."""

    runtime_dir: str = ""
    drain_timeout_s: Seconds = 30.0
    http: HttpConfig = HttpConfig()
    zmq: ZmqConfig = ZmqConfig()
    repository: RepositoryConfig = RepositoryConfig()
    workers: WorkersConfig = WorkersConfig()
    log: LogConfig = LogConfig()
