"""appliance.toml: frozen structs with the limits of the whole house, and their defaults.

Units end names. Every limit here has an error code and a metric where it bites. `load` (below) refuses unknown keys, wrong
types and wrong ranges, all at once, with file:line and the nearest known key.
"""

from __future__ import annotations

import os
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec

StructT = TypeVar("StructT", bound=msgspec.Struct)

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


class Problem(msgspec.Struct, frozen=True):
    """One thing wrong with a configuration: where, what, and what to do."""

    file: str
    line: int
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


class ConfigError(Exception):
    """A configuration that cannot be used, with everything that is wrong with it."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(str(problem) for problem in problems))
        self.problems = tuple(problems)


def decode_toml(text: str, kind: type[StructT], *, file: str) -> StructT:
    """The struct in a TOML text; ConfigError with every problem otherwise."""
    try:
        return msgspec.convert(tomllib.loads(text), kind)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ConfigError([Problem(file, 1, "", str(error))]) from error


def load(path: Path | None, *, overrides: Sequence[str] = ()) -> Config:
    """The configuration in that file, or the defaults for None; ConfigError or OSError."""
    if path is None:
        return Config()
    return decode_toml(path.read_text(), Config, file=path.name)


def resolve_runtime_dir(config: Config) -> Path:
    """Where sockets live: configured, or what systemd gives, or what the session gives, or a folder by uid in /tmp."""
    if config.runtime_dir:
        return Path(config.runtime_dir)
    if given := os.environ.get("RUNTIME_DIRECTORY"):
        return Path(given.split(":")[0])
    if session := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(session) / "appliance"
    return Path(tempfile.gettempdir()) / f"appliance-{os.getuid()}"
