"""The composition root: the only place that chooses implementations. Start, signals, reload, drain, exit codes.

`run` is the whole life of the front process. Nothing imports this but the command line.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from appliance.config import Config, recorder_path, resolve_runtime_dir
from appliance.core.watchdog import Watchdog
from appliance.host import reload, systemd
from appliance.host.allocator import keep_freed_memory
from appliance.host.listeners import Listeners
from appliance.host.sandbox import Sandbox
from appliance.observability import logs
from appliance.reloading import Reloading
from appliance.workers.link import WorkerLink
from appliance.workers.supervisor import Supervisor

if TYPE_CHECKING:
    from appliance.health import Health
    from appliance.lifecycle.leaks import LeakWatch
    from appliance.lifecycle.manager import Manager
    from appliance.lifecycle.memory import ModelMemory
    from appliance.observability.events import EventBus
    from appliance.observability.metrics import Metrics
    from appliance.recording.recorder import Recorder
    from appliance.scheduling.governor import Governor
    from appliance.sensors.monitor import Monitor
    from appliance.service import Records, Service
    from appliance.transports.http import HttpTransport
    from appliance.transports.zmq import ZmqTransport

log = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_BUG = 70
EXIT_DEVICE = 75
EXIT_CONFIG = 78

GPU_NODES = ("dev/nvidiactl", "dev/nvhost-ctrl-gpu")
"""Device files that NVIDIA's drivers make."""

DRIVER_PATIENCE_S = 10.0
"""How long the start waits for NVIDIA's driver to say how much memory there is; one that hangs must not keep us from serving."""

HIDDEN_BY_SYSTEMD = ("/home/", "/root/", "/run/user/")

LAME_DUCK_S = 0.1
"""How long new requests are still answered UNAVAILABLE after the last accepted one was answered."""

EXTENSION_S = 30
"""What systemd is asked for, each second, while models load."""

LAST_REQUEST_S = 0.25
"""How long clients that keep a connection may ask once more when the listeners stay for the next process."""

HOLD_S = 15.0
"""How long clients that wait at listeners which outlived the last process wait on for models to load; then they are told."""


class Daemon:
    """The running appliance."""

    def __init__(
        self,
        config: Config,
        config_path: Path | None,
        overrides: Sequence[str],
        supervisor: Supervisor,
        runtime_dir: Path,
        listeners: Listeners,
    ) -> None:
        self._given = config
        self._config_path = config_path
        self._overrides = overrides
        self._supervisor = supervisor
        self._runtime_dir = runtime_dir
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._manager: Manager | None = None
        self._service: Service | None = None
        self._governor: Governor | None = None
        self._leaks: LeakWatch | None = None
        self._http: HttpTransport | None = None
        self._zmq: ZmqTransport | None = None
        self._tick: asyncio.Task[None] | None = None
        self._recorder: Recorder | None = None
        self._monitor: Monitor | None = None
        self._stop_reason = "bug"
        self._listeners = listeners
        self._watchdog = Watchdog(config.workers.stall_limit_s)
        self._stalled = ""
        self._reload_wanted = asyncio.Event()
        self._reloading: Reloading | None = None

    @property
    def _config(self) -> Config:
        """What is in force."""
        return self._given if self._reloading is None else self._reloading.config

    async def serve(self) -> int:
        """Start, serve until a signal, drain, stop; the exit code."""
        begun = time.monotonic()
        try:
            await self._start(begun)
        except OSError as error:
            log.error("daemon.start_failed", extra={"fields": {"reason": str(error)}})
            self._stop_reason = f"start failed: {error}"
            systemd.failed(str(error), error.errno or 0)
            await self._close()
            return _status_of(error)
        try:
            await self._stop.wait()
        finally:
            try:
                await self._drain()
            except OSError as error:
                # what cannot be closed in good order is no reason to stay down
                log.exception("daemon.drain_failed")
                self._stalled = self._stalled or f"the end was not in good order: {error}"
        if self._stalled:
            systemd.failed(self._stalled)
            return EXIT_BUG
        return EXIT_OK

    async def _start(self, begun: float) -> None:
        from appliance.core.slope import SlopePolicy
        from appliance.lifecycle.compilation import ModelCompiler, engines_path
        from appliance.lifecycle.leaks import LeakWatch
        from appliance.lifecycle.manager import Manager
        from appliance.lifecycle.repository import Repository
        from appliance.observability.events import EventBus
        from appliance.scheduling.governor import Governor, policy_of
        from appliance.service import Service

        config = self._config
        _say_what_is_given_up(wanted=config.workers.sandbox)
        # first of all: the record may be kept in it, and a folder made for that would hide that the disk is missing
        _see_models_folder(Path(config.repository.path))
        self._supervisor.watch()
        self._install_signals()
        events = EventBus()
        records = self._record(events) if config.recorder.enabled else None
        if config.governor.enabled:
            self._governor = Governor(policy_of(config.governor), events)
        health = await self._watch(events)
        self._manager = Manager(
            Repository(Path(config.repository.path)),
            self._supervisor,
            events,
            config=config.repository,
            workers=config.workers,
            drain_timeout_s=config.drain_timeout_s,
            compiler=(
                ModelCompiler(engines_path(config), config.engines, self._governor, sandbox=config.workers.sandbox)
                if config.engines.enabled
                else None
            ),
            governor=self._governor,
            memory=self._memory(events, health) if config.memory.enabled else None,
        )
        self._service = Service(self._manager, events, self._governor, health)
        health.attach(self._manager.generations, self._service.figures)
        self._leaks = LeakWatch(
            self._manager.generations, events, SlopePolicy(limit_bytes_per_h=config.memory.leak_mb_per_h * (1 << 20))
        )
        metrics = self._measure(self._service, health)
        names = self._manager.start()
        systemd.status(f"loading {len(names)} models")
        if self._listeners.inherited:
            await self._settle(HOLD_S)
        await self._listen(metrics, records, events)
        self._refuse_strays()
        self._tick = asyncio.create_task(self._ticks(), name="tick")
        log.info(
            "daemon.listening",
            extra={"fields": {"addresses": self.addresses, "models": list(names), "pid": os.getpid()}},
        )
        await self._settle()
        _settle_memory()
        self._reloading = Reloading(
            config,
            self._config_path,
            self._runtime_dir,
            overrides=self._overrides,
            wanted=self._reload_wanted,
            manager=self._manager,
            service=self._service,
            settle=self._settle,
            tell=self._tell,
        )
        self._reloading.start()
        systemd.ready(self._service.status_line())
        log.info(
            "daemon.ready",
            extra={"fields": {"seconds": round(time.monotonic() - begun, 3), "status": self._service.status_line()}},
        )
        if sys.stderr.isatty():
            self._greet()

    async def _listen(self, metrics: Metrics, records: Records | None, events: EventBus) -> None:
        """Open both faces, as far as they are configured."""
        assert self._service is not None
        config = self._config
        if config.http.enabled:
            from appliance.transports.http import HttpTransport

            path = _endpoint(config.http.unix_socket, str(self._runtime_dir / "http.sock"))
            given = self._listen_http(path)
            self._http = HttpTransport(
                self._service,
                config.http,
                unix_socket=None if given else path,
                sockets=given,
                metrics=metrics.render,
                records=records,
            )
            metrics.http = self._http
            await self._http.start()
        if config.zmq.enabled:
            from appliance.transports.zmq import ZmqTransport

            self._zmq = ZmqTransport(
                self._service,
                config.zmq,
                ipc=_endpoint(config.zmq.ipc, f"ipc://{self._runtime_dir}/infer.ipc"),
                tcp=_endpoint(config.zmq.tcp, ""),
                events_ipc=_endpoint(config.zmq.events_ipc, f"ipc://{self._runtime_dir}/events.ipc"),
                events_tcp=_endpoint(config.zmq.events_tcp, ""),
                report=lambda topic, data: events.publish(topic, **data),
                listen=self._listeners.for_endpoint if self._listeners.survive else None,
            )
            counters = self._zmq.counters
            metrics.zmq = lambda: msgspec.structs.asdict(counters)
            await self._zmq.start()
        self._service.endpoints = {
            "http": self._http.addresses if self._http is not None else [],
            "inference": self._zmq.request_endpoints if self._zmq is not None else [],
            "events": self._zmq.event_endpoints if self._zmq is not None else [],
        }

    def _memory(self, events: EventBus, health: Health) -> ModelMemory:
        """The ledger in which models are booked before they are loaded, with what host and GPUs have now."""
        from appliance.core.memory_budget import HOST, MemoryBudget
        from appliance.lifecycle.compilation import engines_path
        from appliance.lifecycle.memory import ModelMemory, host_capacity, host_most

        host_mb, gpu_mb = self._config.memory.host_reserve_mb, self._config.memory.gpu_reserve_mb

        def room(since_s: float = 0.0) -> dict[str, int]:
            return {HOST: host_capacity(host_mb)} | health.gpu_capacity(gpu_mb, since_s)

        return ModelMemory(
            MemoryBudget(room(), {HOST: host_most(host_mb)} | health.gpu_most(gpu_mb)),
            events,
            peaks=engines_path(self._config) / "memory-peaks.json",
            measure=health.measure,
            integrated=health.integrated(),
            room=room,
        )

    def _measure(self, service: Service, health: Health) -> Metrics:
        """What `/metrics` reads, as far as it exists; the faces are added when they listen."""
        from appliance.observability.metrics import Metrics

        metrics = Metrics(service)
        metrics.readings = lambda: health.latest
        metrics.energy = health.energy
        metrics.xids = health.xids
        governor, recorder = self._governor, self._recorder
        if governor is not None:
            metrics.governor = lambda: governor.judgement
            metrics.hold_s = governor.hold_s
        if recorder is not None:
            metrics.recorder = lambda: recorder.state
            service.recorder = lambda: msgspec.structs.asdict(recorder.state)
        return metrics

    def _record(self, events: EventBus) -> Records:
        """Open the recorder and let it hear everything; what reads its file."""
        from appliance import __version__
        from appliance.recording import bridge
        from appliance.recording.reader import RecordReader
        from appliance.recording.recorder import Recorder

        recorder = self._recorder = Recorder(
            recorder_path(self._config), max_bytes=self._config.recorder.max_size_mb << 20
        )
        recorder.start()
        recorder.record_event("daemon.start", "info", {"release": __version__, "pid": os.getpid()})
        events.subscribe(bridge.listener(recorder))
        return RecordReader(recorder.path, is_anothers=lambda: recorder.is_anothers)

    async def _watch(self, events: EventBus) -> Health:
        """Begin to look at GPUs, host and processes. Where there is a GPU its memory must be known before a model is loaded."""
        from appliance.health import Health
        from appliance.lifecycle.compilation import engines_path
        from appliance.sensors.monitor import Monitor

        config = self._config
        folders = {"models": Path(config.repository.path), "engines": engines_path(config)}
        folders["record"] = recorder_path(config).parent
        self._monitor = Monitor(
            interval_s=config.sensors.interval_s,
            deadline_s=config.sensors.deadline_s,
            root=Path(config.sensors.root),
            folders=folders,
            processes=lambda: health.processes(),
        )
        health = Health(self._monitor, events, governor=self._governor, record=self._recorder)
        self._monitor.start()
        if any((Path(config.sensors.root) / node).exists() for node in GPU_NODES):
            await self._monitor.first(DRIVER_PATIENCE_S)
        return health

    def _listen_http(self, path: str | None) -> list[socket.socket]:
        """Listeners that outlive us, where there is somebody to keep them; none otherwise."""
        if not self._listeners.survive:
            return []
        from appliance.transports.http.transport import remove_stale

        listeners = self._listeners.tcp(self._config.http.host, self._config.http.port)
        if path is not None:
            if not self._listeners.holds(path):
                remove_stale(Path(path))
            listeners.append(self._listeners.unix(path))
        return listeners

    def _refuse_strays(self) -> None:
        """A socket unit that listens where the configuration does not: its clients would wait for ever."""
        if stray := self._listeners.left_over():
            raise StrayListenerError(
                f"systemd listens on {', '.join(stray)} for us, and no endpoint in the configuration has that address: "
                "change appliance.socket (systemctl edit) or the configuration"
            )

    async def _settle(self, limit_s: float = math.inf) -> None:
        """Wait until every model of the start has come up or failed; systemd is told that we are at it."""
        begun = said = time.monotonic()
        systemd.extend_timeout(EXTENSION_S)
        while not self._settled() and not self._stop.is_set():
            await asyncio.sleep(0.01)
            now = time.monotonic()
            if now - begun > limit_s:
                return
            if now - said > 1.0:
                said = now
                systemd.extend_timeout(EXTENSION_S)

    @property
    def addresses(self) -> list[str]:
        """Where we listen."""
        found: list[str] = []
        if self._http is not None:
            found += self._http.addresses
        if self._zmq is not None:
            found += self._zmq.endpoints
        return found

    def _settled(self) -> bool:
        """Every model of the start has either come up or failed."""
        assert self._manager is not None
        return self._manager.settled

    def _greet(self) -> None:
        from appliance.host import banner

        assert self._service is not None
        entries = [(entry.name, entry.version, entry.state) for entry in self._service.index()]
        print(banner.render(self.addresses, entries), file=sys.stderr)  # noqa: T201  a greeting for a person, no log

    def _install_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._asked_to_stop, "SIGTERM")
        loop.add_signal_handler(signal.SIGINT, self._asked_to_stop, "SIGINT")
        loop.add_signal_handler(signal.SIGHUP, self.reload)

    def _asked_to_stop(self, name: str) -> None:
        """The first time: drain. The second time: now."""
        if self._stop.is_set():
            self._hurry.set()
        log.info("daemon.stopping", extra={"fields": {"signal": name, "hurry": self._hurry.is_set()}})
        self._stop_reason = name
        self._stop.set()

    def reload(self) -> None:
        """Read the configuration again; on any error keep the old one and say why. Too late once it has been told to stop."""
        if not self._stop.is_set():
            self._reload_wanted.set()

    def _tell(self, kind: str, severity: str = "info", **fields: Any) -> None:
        """Record something of the daemon's own."""
        if self._recorder is not None:
            self._recorder.record_event(kind, severity, fields)

    async def _ticks(self) -> None:
        """Once a second: the request rate, the status line, the watchdog."""
        assert self._service is not None
        last = ""
        while True:
            now = time.monotonic()
            self._service.tick(now)
            if self._leaks is not None:
                self._leaks.tick(now)
            self._stalled = self._stalled or self._watchdog.look(now, self._service.pulses())
            if not self._stalled:
                systemd.watchdog()
            elif not self._stop.is_set():
                self._begin_anew()
            line = self._service.status_line()
            if line != last:
                systemd.status(line)
                last = line
            await asyncio.sleep(1.0)

    def _begin_anew(self) -> None:
        """A required model answers nobody: end in good order, so that systemd starts us again. Without it, go on and complain.

        The watchdog is not fed any more: should the orderly end hang, too, it ends us.
        """
        log.error("watchdog.stalled", extra={"fields": {"reason": self._stalled}})
        if systemd.watchdog_s():
            systemd.status(self._stalled)
            self._stop.set()
        else:
            self._stalled = ""
            self._watchdog = Watchdog(self._config.workers.stall_limit_s)

    async def _hand_over(self) -> None:
        """Let go of listeners that outlive us before anything is refused: who comes now waits for the next process."""
        if self._http is not None:
            await self._http.drain(LAST_REQUEST_S)
        if self._zmq is not None:
            await self._zmq.hand_over(self._config.drain_timeout_s)

    async def _drain(self) -> None:
        """Refuse what is new, answer what was accepted, unload, close."""
        begun = time.monotonic()
        timeout_s = self._config.drain_timeout_s
        if self._stalled:
            timeout_s = min(timeout_s, systemd.watchdog_s() / 2)
        systemd.stopping()
        systemd.extend_timeout(EXTENSION_S + math.ceil(timeout_s))
        if self._listeners.survive and not self._stalled and not self._hurry.is_set():
            await self._hand_over()
        if self._service is not None:
            self._service.draining = True
        if self._leaks is not None:
            await self._leaks.close()
        if self._manager is not None:
            closing = asyncio.create_task(self._manager.close(timeout_s), name="drain")
            hurry = asyncio.create_task(self._hurry.wait(), name="hurry")
            done, _ = await asyncio.wait({closing, hurry}, return_when=asyncio.FIRST_COMPLETED)
            hurry.cancel()
            if closing not in done:
                closing.cancel()
            await asyncio.gather(closing, return_exceptions=True)
        if self._service is not None and not self._hurry.is_set() and not self._listeners.survive:
            # who was answered a moment ago may have asked again: tell them rather than hang up on them
            await asyncio.sleep(LAME_DUCK_S)
        await self._close()
        log.info("daemon.stopped", extra={"fields": {"seconds": round(time.monotonic() - begun, 3)}})

    async def _close(self) -> None:
        """Close what was opened; works after half a start."""
        if self._tick is not None:
            self._tick.cancel()
        if self._reloading is not None:
            await self._reloading.close()
        if self._http is not None:
            await self._http.drain()
            await self._http.close()
        if self._zmq is not None:
            await self._zmq.drain(1.0)
            await self._zmq.close()
        self._supervisor.close()
        if self._monitor is not None:
            hanging = await self._monitor.close()
            if hanging:
                log.warning("sensors.hanging", extra={"fields": {"threads": hanging}})
        reload.forget(self._runtime_dir)
        if self._recorder is not None:
            self._tell("daemon.stop", reason=self._stop_reason)
            await asyncio.to_thread(self._recorder.close)


class StrayListenerError(OSError):
    """A socket unit and the configuration contradict each other."""


class ModelsFolderError(OSError):
    """The models cannot be seen, in words. Their disk may be mounted a moment later: no configuration is wrong for good."""


def _see_models_folder(path: Path) -> None:
    try:
        with os.scandir(path) as entries:
            next(entries, None)
    except OSError as error:
        what = f"the models folder {path} cannot be read: {error.strerror}"
        if os.path.realpath(path).startswith(HIDDEN_BY_SYSTEMD) and systemd.supervised():
            raise ModelsFolderError(
                f"{what}; ProtectHome= hides /home, /root and /run/user from the service"
            ) from error
        if isinstance(error, FileNotFoundError):
            what = f"the models folder {path} is not there"
        raise ModelsFolderError(f"{what}; is its disk mounted, or repository.path wrong?") from error


def _status_of(error: OSError) -> int:
    """78 if only another configuration can mend it; else 75, since what is short now may be there at the next start."""
    wrong = FileNotFoundError | NotADirectoryError | PermissionError | StrayListenerError
    return EXIT_CONFIG if isinstance(error, wrong) else EXIT_DEVICE


def _endpoint(configured: str, default: str) -> str | None:
    """The endpoint to bind: the configured one, the default for an empty one, None for "none"."""
    if configured == "none":
        return None
    return configured or default or None


def run(config: Config, config_path: Path | None = None, overrides: Sequence[str] = ()) -> int:
    """Serve with this configuration until told to stop; the exit code for the process (0, 70, 75, 78).

    A reload reads the same file, under the same overrides.
    """
    logs.configure(config.log.format, config.log.level)
    faulthandler.enable()  # a watchdog's SIGABRT leaves in the journal where the loop hung
    keep_freed_memory()
    listeners = Listeners.from_environment()
    runtime_dir = resolve_runtime_dir(config)
    supervisor = Supervisor(
        max_arena_bytes=config.workers.max_arena_bytes,
        on_worker_lost=_worker_ended,
        sandbox=config.workers.sandbox,
    )
    try:
        runtime_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
        # the template imports its libraries while we import ours
        supervisor.start()
        import uvloop

        async def main() -> int:
            return await Daemon(config, config_path, overrides, supervisor, runtime_dir, listeners).serve()

        return int(uvloop.run(main()))
    except OSError as error:
        log.error("daemon.failed", extra={"fields": {"reason": str(error)}})
        systemd.failed(str(error), error.errno or 0)
        return _status_of(error)
    except Exception:
        log.exception("daemon.bug")
        return EXIT_BUG
    finally:
        supervisor.close()


def _say_what_is_given_up(*, wanted: bool) -> None:
    """Once in a life: what workers and builds cannot do, and what this kernel lets them do that they should not."""
    sandbox = Sandbox.of_this_kernel()
    limits = sandbox.limits if wanted else ["switched off: workers.sandbox"]
    fields = {"in_force": sandbox.description if wanted else "none", "missing": limits}
    log.log(logging.WARNING if limits else logging.INFO, "workers.sandbox", extra={"fields": fields})


def _settle_memory() -> None:
    """What the start made stays for years: the collector need not look at it again, nor as often at what requests leave behind.

    Requests leave no cycles behind (a test holds them to it), so a rarer collection costs no memory.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def _worker_ended(link: WorkerLink, reason: str) -> None:
    log.debug("worker.ended", extra={"fields": {"pid": link.pid, "reason": reason}})
