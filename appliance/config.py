"""appliance.toml: frozen structs with the limits of the whole house, and their defaults.

Units end names. Every limit here has an error code and a metric where it bites. `load` (below) refuses unknown keys, wrong
types and wrong ranges, all at once, with file:line and the nearest known key.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import stat
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

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

    A model whose workers die `crash_limit` times within `crash_window_s` is quarantined until somebody loads it again. A required
    model that is READY and has answered nobody for `stall_limit_s`, though asked or without a worker, makes a supervised
    appliance restart itself. `sandbox`: workers and builds give up files that are not theirs, the network and other programs.
    """

    crash_limit: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 5
    crash_window_s: Seconds = 60.0
    backoff_initial_s: Seconds = 0.05
    backoff_max_s: Seconds = 5.0
    stall_limit_s: Seconds = 300.0
    max_arena_bytes: Positive = 1 << 30
    sandbox: bool = True


class EnginesConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Engines that are built on this box. Megabytes are 2**20 bytes.

    `path` empty: engines/ in $STATE_DIRECTORY, else .engines/ in the repository. Beyond `max_size_mb` the least recently used
    are removed. `memory_limit_mb` ends a build that takes more (0: no limit).
    """

    enabled: bool = True
    path: str = ""
    max_size_mb: Positive = 20_480
    memory_limit_mb: Annotated[int, msgspec.Meta(ge=0)] = 0


class RecorderConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The flight recorder. Megabytes are 2**20 bytes.

    `path` empty: recorder.sqlite3 in $STATE_DIRECTORY, else .recorder/recorder.sqlite3 in the repository. A year of 60 readings
    takes about 75 MB; when `max_size_mb` is used up, the oldest is dropped.
    """

    enabled: bool = True
    path: str = ""
    max_size_mb: Annotated[int, msgspec.Meta(ge=8)] = 256


class GovernorConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Heat. Margins are degrees below the slowdown temperature, and fall from `warm_margin_c` to `critical_margin_c`.

    WARM holds back background builds, HOT refuses priorities from `low_priority` on, then narrows concurrency and batches,
    CRITICAL serves only priorities up to `critical_priority`, or nobody.
    """

    enabled: bool = True
    warm_margin_c: Annotated[float, msgspec.Meta(gt=0, le=60)] = 12.0
    hot_margin_c: Annotated[float, msgspec.Meta(gt=0, le=60)] = 7.0
    critical_margin_c: Annotated[float, msgspec.Meta(gt=0, le=60)] = 2.0
    hysteresis_c: Annotated[float, msgspec.Meta(gt=0, le=30)] = 3.0
    dwell_s: Seconds = 20.0
    max_dwell_s: Seconds = 900.0
    lookahead_s: Annotated[float, msgspec.Meta(ge=0, le=600)] = 20.0
    blind_s: Seconds = 30.0
    assumed_limit_c: Annotated[float, msgspec.Meta(ge=40, le=150)] = 90.0
    low_priority: Annotated[int, msgspec.Meta(ge=2, le=16)] = 9
    critical: Literal["highest-class", "stop"] = "highest-class"
    critical_priority: Annotated[int, msgspec.Meta(ge=1, le=15)] = 1


class MemoryConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Memory of the models: reserved before a load, corrected after it. What does not fit waits until there is room, or is
    refused for good if there never will be. Megabytes are 2**20 bytes."""

    enabled: bool = True
    host_reserve_mb: Annotated[int, msgspec.Meta(ge=0)] = 256
    gpu_reserve_mb: Annotated[int, msgspec.Meta(ge=0)] = 256
    leak_mb_per_h: Annotated[float, msgspec.Meta(gt=0)] = 8.0


class SensorsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the box measures of itself. What hardly changes is read at most once a second, whatever the interval."""

    interval_s: Annotated[float, msgspec.Meta(ge=0.1, le=60.0)] = 1.0
    deadline_s: Seconds = 2.0
    root: str = "/"


class LogConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Logs go to stderr. `auto`: human on a terminal, fields in systemd's journal, JSON elsewhere."""

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
    engines: EnginesConfig = EnginesConfig()
    recorder: RecorderConfig = RecorderConfig()
    governor: GovernorConfig = GovernorConfig()
    memory: MemoryConfig = MemoryConfig()
    sensors: SensorsConfig = SensorsConfig()
    log: LogConfig = LogConfig()


class Problem(msgspec.Struct, frozen=True):
    """One thing wrong with a configuration: where (line 0: nowhere in the file), which key, what, and what to do."""

    file: str
    line: int
    key: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.message}" + (f" ({self.hint})" if self.hint else "")


class ConfigError(Exception):
    """A configuration that cannot be used, with everything that is wrong with it."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(str(problem) for problem in problems))
        self.problems = tuple(problems)


SEARCH = (Path("appliance.toml"), Path("/etc/appliance/appliance.toml"))
"""Where a configuration is looked for when none is named; the first that exists counts."""


class UnreadableError(OSError):
    """A configuration file that is missing or that this user may not read: number, reason and path as of any OSError."""


def find() -> Path | None:
    """The configuration file to use: $APPLIANCE_CONFIG, or the first of SEARCH, or none (defaults).

    One in a folder that is closed to this user counts: to go on with the defaults would be to look at another appliance.
    """
    if named := os.environ.get("APPLIANCE_CONFIG"):
        return Path(named)
    return next((path for path in SEARCH if _is_there(path)), None)


def _is_there(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except PermissionError:
        # a current folder that may not even be entered (root's, after `runuser`) holds no configuration of ours
        return path.is_absolute()
    except OSError:
        return False


CREDENTIAL = "credential:"
"""A text that begins so stands for the contents of a file that the service manager gives to this process alone."""


def credentials_dir() -> Path | None:
    """Where systemd lays this service's credentials (LoadCredential=); None if it gave none."""
    given = os.environ.get("CREDENTIALS_DIRECTORY")
    return Path(given) if given else None


def load(
    path: Path | None, *, overrides: Sequence[str] = (), credentials: Path | Literal["named"] | None = "named"
) -> Config:
    """The configuration in that file (None: defaults), changed by `key.path=value` overrides.

    `credentials` is where `credential:NAME` is looked up; "named" leaves such a text as it stands, so that whoever only looks at
    the configuration neither needs the secrets nor can show them. ConfigError with every problem at once; UnreadableError if
    the file cannot be read.
    """
    data: dict[str, Any] = {}
    problems: list[Problem] = []
    lines: dict[str, int] = {}
    name = "configuration"
    if path is not None:
        name = path.name
        text = _text(path)
        lines = _lines(text)
        data = _parse(text, name)
    for override in overrides:
        problems += _override(data, override)
    problems += check(data, Config, file=name, lines=lines)
    # checked before they are looked up: no complaint about a value can show a secret
    if credentials != "named":
        problems += _look_up(data, credentials, Problem(name, 0, "", ""), lines)
    if problems:
        raise ConfigError(problems)
    config = msgspec.convert(data, Config)
    problems = [Problem(name, lines.get(key, 0), key, message) for key, message in _contradictions(config)]
    if problems:
        raise ConfigError(problems)
    return config


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise UnreadableError(error.errno, error.strerror, str(path)) from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        message = f"not UTF-8 text: {error.reason}"
        raise ConfigError([Problem(path.name, line, "", message, "TOML is always UTF-8: save it so")]) from error


def decode_toml(text: str, kind: type[StructT], *, file: str) -> StructT:
    """The struct in a TOML text; ConfigError with every problem otherwise."""
    data = _parse(text, file)
    problems = check(data, kind, file=file, lines=_lines(text))
    if problems:
        raise ConfigError(problems)
    return msgspec.convert(data, kind)


def _parse(text: str, file: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        match = re.search(r"\(at line (\d+)", str(error))
        # the parser says "at end of document" where a bracket or quote was never closed
        line = int(match[1]) if match else text.count("\n") + 1
        raise ConfigError([Problem(file, line, "", f"not valid TOML: {error}")]) from error


def check(
    data: Mapping[str, Any], kind: type[Any], *, file: str, lines: Mapping[str, int], prefix: str = ""
) -> list[Problem]:
    """Everything wrong with a table, key by key: unknown names with the nearest known one, types, ranges."""
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    problems = []
    for key, value in data.items():
        path = f"{prefix}{key}"
        line = lines.get(path, lines.get(prefix.rstrip("."), 0))
        field = fields.get(key)
        if field is None:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(fields)}"
            problems.append(Problem(file, line, path, f"unknown key {path!r}", hint))
        elif isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            if isinstance(value, Mapping):
                problems += check(value, field.type, file=file, lines=lines, prefix=f"{path}.")
            else:
                problems.append(Problem(file, line, path, f"{path!r} must be a table, written [{path}]"))
        else:
            problems += _check_value(value, field.type, Problem(file, line, path, ""))
    return problems


def _check_value(value: Any, kind: Any, at: Problem) -> list[Problem]:
    if _not_finite(value):
        return [msgspec.structs.replace(at, message=f"{at.key!r} is {value!r:.60}: expected finite numbers")]
    try:
        # strict: TOML has types, and "8000" is no port
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        message = re.sub(r" - at `\$.*?`$", "", str(error))
        return [msgspec.structs.replace(at, message=f"{at.key!r} is {value!r:.60}: {message[:1].lower()}{message[1:]}")]
    return []


def _not_finite(value: Any) -> bool:
    """TOML has nan and inf; no key here means anything by them, and JSON could not hand them on to another process."""
    if isinstance(value, Mapping):
        return any(map(_not_finite, value.values()))
    if isinstance(value, list):
        return any(map(_not_finite, value))
    return isinstance(value, float) and not math.isfinite(value)


def _look_up(
    table: dict[str, Any], directory: Path | None, at: Problem, lines: Mapping[str, int], prefix: str = ""
) -> list[Problem]:
    """Put the contents of credentials into the places of their names."""
    problems = []
    for key, value in table.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            problems += _look_up(value, directory, at, lines, f"{path}.")
        elif isinstance(value, str) and value.startswith(CREDENTIAL):
            name = value.removeprefix(CREDENTIAL)
            try:
                table[key] = _credential(directory, name)
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else str(error)
                problems.append(
                    msgspec.structs.replace(
                        at,
                        line=lines.get(path, 0),
                        key=path,
                        message=f"{path!r} names the credential {name!r:.60}, which cannot be had: {reason}",
                        hint=f"give it to the service: LoadCredential={name}:/path/of/the/file",
                    )
                )
    return problems


def _credential(directory: Path | None, name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,255}", name) or name in (".", ".."):
        raise ValueError("a name has letters, digits, '.', '_' and '-' only")
    if directory is None:
        raise ValueError("this process was given none ($CREDENTIALS_DIRECTORY is not set)")
    with (directory / name).open("rb") as file:
        data = file.read(MAX_CREDENTIAL_BYTES + 1)
    if len(data) > MAX_CREDENTIAL_BYTES:
        raise ValueError(f"it is longer than {MAX_CREDENTIAL_BYTES} bytes")
    return data.decode().removesuffix("\n")


MAX_CREDENTIAL_BYTES = 64 << 10


def _override(data: dict[str, Any], text: str) -> list[Problem]:
    """Put one `key.path=value` into the tables; the value is TOML, or a bare string."""
    path, separator, value = text.partition("=")
    if not separator or not path.strip():
        return [Problem("--set", 0, text, f"{text!r} is not of the form key.path=value")]
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    *tables, key = path.strip().split(".")
    table = data
    for name in tables:
        inner = table.setdefault(name, {})
        if not isinstance(inner, dict):
            return [Problem("--set", 0, path, f"{name!r} is no table")]
        table = inner
    table[key] = parsed
    return []


def _contradictions(config: Config) -> list[tuple[str, str]]:
    """What is wrong only together."""
    found = []
    if config.http.max_json_bytes > config.http.max_body_bytes:
        found.append(
            ("http.max_json_bytes", "http.max_json_bytes is larger than http.max_body_bytes: no such body arrives")
        )
    free = config.zmq.tcp.endswith((":*", ":0"))
    if (
        config.zmq.enabled
        and config.zmq.tcp not in ("", "none")
        and config.zmq.tcp == config.zmq.events_tcp
        and not free
    ):
        found.append(("zmq.events_tcp", "zmq.tcp and zmq.events_tcp are the same endpoint"))
    heat = config.governor
    if not heat.warm_margin_c > heat.hot_margin_c > heat.critical_margin_c:
        found.append(("governor.hot_margin_c", "the governor's margins must fall: warm, then hot, then critical"))
    if heat.critical_priority >= heat.low_priority:
        found.append(
            (
                "governor.critical_priority",
                "governor.critical_priority must be a smaller number than governor.low_priority",
            )
        )
    if heat.dwell_s > heat.max_dwell_s:
        found.append(("governor.dwell_s", "governor.dwell_s is larger than governor.max_dwell_s"))
    if config.workers.backoff_initial_s > config.workers.backoff_max_s:
        found.append(("workers.backoff_initial_s", "workers.backoff_initial_s is larger than workers.backoff_max_s"))
    if config.repository.load == "all" and config.repository.models:
        found.append(("repository.models", 'repository.models is only used with load = "listed"'))
    if not config.http.enabled and not config.zmq.enabled:
        found.append(("http.enabled", "neither http nor zmq is enabled: nobody could ask anything"))
    return found


_TABLE = re.compile(r"^\s*\[\[?\s*([A-Za-z0-9_.\"' -]+?)\s*\]\]?")
_KEY = re.compile(r"^\s*([A-Za-z0-9_.\"'-]+)\s*=")


def _lines(text: str) -> dict[str, int]:
    """The line of each table and key, by dotted path; good enough to point at, never an error."""
    found: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if match := _TABLE.match(line):
            table = re.sub(r"[\"' ]", "", match[1])
            found.setdefault(table, number)
        elif match := _KEY.match(line):
            key = re.sub(r"[\"' ]", "", match[1])
            found.setdefault(f"{table}.{key}" if table else key, number)
    return found


def schema() -> dict[str, Any]:
    """The JSON schema of the file, for editors."""
    return msgspec.json.schema(Config)


def resolve_runtime_dir(config: Config) -> Path:
    """Where sockets live: configured, or what systemd gives, or what the session gives, or a folder by uid in /tmp."""
    if config.runtime_dir:
        return Path(config.runtime_dir)
    if given := os.environ.get("RUNTIME_DIRECTORY"):
        return Path(given.split(":")[0])
    if session := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(session) / "appliance"
    return Path(tempfile.gettempdir()) / f"appliance-{os.getuid()}"


def recorder_path(config: Config) -> Path:
    """The recorder's file: configured, or in what systemd gives for state, or in `.recorder` in the model repository."""
    if config.recorder.path:
        return Path(config.recorder.path)
    if given := os.environ.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0]) / "recorder.sqlite3"
    return Path(config.repository.path).resolve() / ".recorder" / "recorder.sqlite3"
