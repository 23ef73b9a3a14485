"""docs/configuration.md, made from the structs and what is written about each key here; a test holds the file to it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from appliance.config import Config
from appliance.core.manifest import ModelManifest

DESCRIPTIONS: dict[str, str] = {
    "runtime_dir": "Where sockets live. Empty: $RUNTIME_DIRECTORY, else appliance/ in $XDG_RUNTIME_DIR, else by uid in /tmp.",
    "drain_timeout_s": "How long SIGTERM, and an unload, wait for accepted requests before they are answered UNAVAILABLE.",
    "http.enabled": "Whether the HTTP face is on.",
    "http.host": "The address to listen on. There is no authentication: keep it on loopback unless a proxy stands before it.",
    "http.port": "The TCP port; 0 takes a free one.",
    "http.unix_socket": 'Path of the unix socket (mode 0660). Empty: http.sock in the runtime directory; "none": off.',
    "http.header_timeout_s": "A request whose headers are not whole by then is answered 408.",
    "http.body_timeout_s": "A request whose body is not whole by then is answered 408.",
    "http.idle_timeout_s": "A kept-alive connection without a request is closed after this.",
    "http.write_timeout_s": "A client that does not read its answer for this long is cut off.",
    "http.max_connections": "Further connections are answered 503 and closed.",
    "http.max_body_bytes": "Larger bodies, also after inflating, are answered 413; announced ones before they are read.",
    "http.max_json_bytes": "Larger JSON documents are answered 413: tensors of that size belong in binary.",
    "http.max_json_depth": "Deeper nesting is answered 400.",
    "http.max_bytes_in_flight": "Bodies being read on all connections together; beyond it requests are answered 429.",
    "http.default_retry_after_s": "What Retry-After says where nothing better is known.",
    "zmq.enabled": "Whether the ZeroMQ face is on.",
    "zmq.ipc": 'Endpoint for local programs. Empty: infer.ipc in the runtime directory; "none": off.',
    "zmq.tcp": 'Endpoint over TCP; "none": off. There is no authentication: keep it on loopback.',
    "zmq.events_ipc": 'Where events are published locally. Empty: events.ipc in the runtime directory; "none": off.',
    "zmq.events_tcp": 'Where events are published over TCP; "none": off.',
    "zmq.max_message_bytes": "Larger frames end the connection (ZMQ_MAXMSGSIZE); larger messages are answered PAYLOAD_TOO_LARGE.",
    "zmq.max_header_bytes": "Larger headers are answered PAYLOAD_TOO_LARGE.",
    "zmq.max_frames": "Messages of more frames are answered INVALID_ARGUMENT.",
    "zmq.receive_hwm": "Messages that libzmq holds per peer before we read them.",
    "zmq.send_hwm": "Messages that libzmq holds per peer before the outbox begins.",
    "zmq.outbox_bytes": "Answers held per peer that does not read; the oldest are dropped beyond it, counted and reported.",
    "zmq.handshake_timeout_ms": "A peer that has not finished its handshake by then is cut off.",
    "zmq.max_peer_in_flight": "Requests of one peer that may be unanswered; further ones are answered RESOURCE_EXHAUSTED.",
    "zmq.max_bytes_in_flight": "Requests of all peers that may be unanswered, in bytes.",
    "zmq.event_heartbeat_s": "How often the heartbeat event is published.",
    "repository.path": "The folder of model folders.",
    "repository.load": "Which models are loaded at start: all there are, or those listed.",
    "repository.models": 'The models to load with load = "listed".',
    "repository.required": "Readiness waits for these; empty: for all that are loaded at start.",
    "repository.parallel_loads": "Models that are loaded at the same time.",
    "workers.crash_limit": "Deaths of a version's workers within the window before it is quarantined.",
    "workers.crash_window_s": "The window for crash_limit.",
    "workers.backoff_initial_s": "Pause before the first replacement of a worker; doubled for each further one.",
    "workers.backoff_max_s": "The longest such pause.",
    "workers.stall_limit_s": "After so long without an answer of a READY, required model, a supervised appliance restarts.",
    "workers.max_arena_bytes": "Shared memory of one worker; larger batches are halved until they fit.",
    "workers.sandbox": "Workers and builds give up files that are not theirs, the network and other programs.",
    "engines.enabled": "Whether engines are built and used. Off: every model runs on ONNX Runtime as its file is.",
    "engines.path": "Where engines are kept. Empty: engines/ in $STATE_DIRECTORY, else .engines/ in the repository.",
    "engines.max_size_mb": "Beyond this the least recently used engines are removed; those in use stay.",
    "engines.memory_limit_mb": "A build that takes more memory than this fails, and says so; 0: no limit.",
    "recorder.enabled": "Whether readings, events, energy and operators' actions are recorded.",
    "recorder.path": "The file. Empty: recorder.sqlite3 in $STATE_DIRECTORY, else .recorder/recorder.sqlite3 in the repository.",
    "recorder.max_size_mb": "The most that the file, its WAL and the reserve beside it take; beyond it the oldest is dropped.",
    "governor.enabled": "Off: heat holds nothing back; the hardware slows down by itself.",
    "governor.warm_margin_c": "So near to its slowdown a device is WARM: background builds wait.",
    "governor.hot_margin_c": "HOT: low priorities are refused; half-way to CRITICAL also fewer and smaller batches run.",
    "governor.critical_margin_c": "CRITICAL: see `critical`.",
    "governor.hysteresis_c": "How much cooler than a margin it must be before its level may end.",
    "governor.dwell_s": "How long it must be that cool before CRITICAL ends; HOT takes twice, WARM three times as long.",
    "governor.max_dwell_s": "A level that comes back soon after it ended takes twice as long each time, up to this.",
    "governor.lookahead_s": "The trend of the temperature counts this far ahead, but never to CRITICAL; 0: not at all.",
    "governor.blind_s": "A sensor that gave readings and gives none for this long means WARM at least.",
    "governor.assumed_limit_c": "Where a device does not tell its slowdown or critical temperature.",
    "governor.low_priority": "Priorities from this number on are low: HOT refuses them. 1 is the highest, 16 the lowest.",
    "governor.critical": "What CRITICAL serves: the highest class, or nobody.",
    "governor.critical_priority": "The highest class: priorities up to this number.",
    "memory.enabled": "Off: nothing is reserved, and a model that does not fit ends as the kernel pleases.",
    "memory.host_reserve_mb": "What models leave free of the memory that was available at the start.",
    "memory.gpu_reserve_mb": "The same on each GPU that has memory of its own.",
    "memory.leak_mb_per_h": "A process whose memory grows so steadily for four hours is reported as leaking.",
    "worker.recycle": "Whether a worker that leaks is replaced at a quiet moment; no request is lost.",
    "worker.evictable": "Whether it may be unloaded, when idle, for another model that does not fit. It is loaded again by hand.",
    "sensors.interval_s": "How often GPUs are sampled: temperature, SM clock, power, load, throttle; the rest once a second.",
    "sensors.deadline_s": "A sensor that has not answered for this long is reported missing, with how long it has been silent.",
    "sensors.root": "Where the box has `/dev`, `/proc`, `/sys` and `/usr`: another folder than `/` in a container.",
    "log.format": "auto: readable on a terminal, JSON lines elsewhere.",
    "log.level": "What is logged.",
    "engine": "Empty: the fastest that this box has for the device; ONNX Runtime serves while TensorRT builds.",
    "description": "A sentence for people.",
    "device": "What the model must run on: cpu, cuda, cuda:1. It does not become READY elsewhere.",
    "fallback": "Where it may run instead if the device cannot be had; empty: nowhere.",
    "precision": "What the model's floats become before it is built; as-is changes nothing.",
    "labels": "File with one label a line, in class order. Empty: labels.txt, if there is one.",
    "build.workspace_mb": "Scratch memory that TensorRT may use, in MiB; 0: its own limit.",
    "build.tactic_memory_mb": "Memory for trying tactics while building, in MiB; 0: its own limit.",
    "build.optimization_level": "TensorRT's: 0 builds fast, 5 runs fast.",
    "build.time_budget_s": "A build that takes longer is given up.",
    "build.calibration": "Folder of pictures or .npz files for int8, beside model.toml.",
    "build.calibration_method": "How ranges are found for int8.",
    "build.calibration_samples": "How many of them are used.",
    "build.shapes": "Per input: min, opt and max sizes, batch axis first. Left out: batch 1 to max_batch_size.",
    "preprocessing.input": "The input that takes pictures; empty: the first.",
    "preprocessing.layout": "Empty: from the input's shape.",
    "preprocessing.channels": "Empty: L for one channel, RGB for three.",
    "preprocessing.resize": "How a picture is brought to the input's size.",
    "preprocessing.scale": "Factor on pixels 0 to 255; 0: 1/255 for floats, 1 for integers.",
    "preprocessing.mean": "Subtracted after scaling, per channel.",
    "preprocessing.std": "Divided by after that, per channel.",
    "verify.max_absolute": "Largest absolute error of any output value; 0: the precision's default.",
    "verify.mean_absolute": "Largest mean absolute error; 0: the precision's default.",
    "verify.max_relative": "Largest relative error; 0: the precision's default.",
    "verify.min_cosine": "Least cosine between an output and the reference's; 0: the precision's default.",
    "verify.mismatch": "Largest share of unequal elements in outputs that are no floats; 0: the precision's default.",
    "verify.metric_drop": "Largest loss of accuracy on labelled samples, as a share; 0: the precision's default.",
    "verify.ranges": "lowest and highest value of generated inputs by name: `ids = [0, 30521]`.",
    "verify.samples": "Folder with a subfolder per label, or an .npz, beside model.toml.",
    "verify.inputs": "Inputs to compare on, where the model brings no golden ones.",
    "batching.max_batch_size": "Rows of a batch at most; 0: 32 if the model's batch axis is free; 1: unbatched.",
    "batching.max_queue_delay_ms": "How long a request may wait for company while a worker is idle. Grain 1 ms.",
    "batching.max_queue_size": "Requests that may wait; further ones are answered RESOURCE_EXHAUSTED.",
    "batching.max_queue_bytes": "Bytes of requests that may wait.",
    "batching.only_paying_sizes": "Gather only to sizes that warm-up found faster per row.",
    "batching.default_priority": "Priority of requests that name none; 1 is the highest.",
    "batching.default_timeout_ms": "Deadline of requests that name none; 0: none.",
    "versions.latest": "How many of the newest versions are served.",
    "versions.all": "Serve every version.",
    "versions.specific": "Serve exactly these.",
    "worker.instances": "Worker processes of this version.",
    "worker.isolation": "version: processes of its own; device: one process for all models of the device that say so.",
    "worker.run_budget_ms": "A batch that runs longer ends its worker; its requests run once more, alone.",
    "worker.load_budget_ms": "Loading and warm-up together may take this long.",
    "worker.busy_poll_us": "How long worker and front poll before they sleep, when requests come densely; 0: never.",
    "worker.max_output_bytes": "What one batch may return beyond its slot.",
    "onnxruntime.intra_op_threads": "Threads of one operator; 0: one for short runs, the cores for long ones.",
    "onnxruntime.inter_op_threads": "Operators that run at the same time.",
    "onnxruntime.spinning": "Let idle threads spin: a little faster, at the price of a core (docs/performance.md).",
    "onnxruntime.graph_optimization": "How far ONNX Runtime rewrites the graph.",
    "onnxruntime.gpu_memory_limit_mb": "The most that the CUDA provider's arena may take; 0: no limit.",
    "onnxruntime.tf32": "Whether matrix products on a GPU may round their inputs to TF32.",
    "parameters": "For the engine; loopback reads datatype, shape, commands, delay_ms, batched and load.",
}


def render() -> str:
    """The page."""
    parts = [
        "# Configuration\n",
        "Made from the structs by `appliance config docs`; a test holds this file to them. Unknown keys, wrong types and",
        "values out of range are refused, all at once, with file and line. `appliance config check` tells without starting",
        "anything.\n",
        "## appliance.toml\n",
        "Looked for as `--config`, `$APPLIANCE_CONFIG`, `./appliance.toml`, `/etc/appliance/appliance.toml`; without any, the",
        "defaults hold. `--set http.port=9000` changes one key. SIGHUP rereads `[repository]`, `[log]` and `drain_timeout_s`;",
        "other changes need a restart, and the log says which.\n",
        *_tables(Config, ""),
        "\n## model.toml\n",
        "In a model's folder, beside its version folders `1`, `2`, …; optional, like every key in it.\n",
        *_tables(ModelManifest, ""),
    ]
    return "\n".join(parts) + "\n"


def _tables(kind: type[msgspec.Struct], prefix: str) -> list[str]:
    hints = get_type_hints(kind, include_extras=True)
    rows, inner = [], []
    for field in msgspec.structs.fields(kind):
        hint = hints[field.name]
        path = f"{prefix}{field.name}"
        if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
            inner += ["", f"### [{path}]\n", " ".join((hint.__doc__ or "").split()) + "\n", *_tables(hint, f"{path}.")]
        else:
            default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
            rows.append(f"| `{field.name}` | {_kind(hint)} | `{_value(default)}` | {DESCRIPTIONS[path]} |")
    head = ["| key | type | default | what it does |", "|---|---|---|---|"] if rows else []
    return [*head, *rows, *inner]


def _value(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _kind(hint: Any) -> str:
    """A type and its range, in words."""
    if get_origin(hint) is Annotated:
        base, meta = get_args(hint)[0], get_args(hint)[1]
        if meta.pattern is not None:
            return f"`{meta.pattern}`".replace("|", "\\|")
        low = meta.ge if meta.ge is not None else meta.gt
        bounds = []
        if low is not None:
            bounds.append(f"{'≥' if meta.ge is not None else '>'} {low:,}")
        if meta.le is not None:
            bounds.append(f"≤ {meta.le:,}")
        return f"{_kind(base)} {' '.join(bounds)}".strip()
    if get_origin(hint) is Literal:
        return " or ".join(f"`{choice!r}`".replace("'", '"') for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return f"list of {_kind(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        value = get_args(hint)[1]
        if isinstance(value, type) and issubclass(value, msgspec.Struct):
            return f"tables of {', '.join(field.name for field in msgspec.structs.fields(value))}"
        return f"table of {'pairs of numbers' if get_origin(value) is tuple else 'strings'}"
    return {bool: "true or false", int: "integer", float: "number", str: "string"}.get(hint, str(hint))
