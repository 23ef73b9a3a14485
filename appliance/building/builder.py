"""ONNX to a TensorRT plan: parse, profile, configure, build; every failure with the library's own words, no paths.

Runs in a build process only. The network is strongly typed: precision is a property of the ONNX file, and no flag here changes a
number but TF32, which is off unless the manifest wants it. What an engine is found by, and where it is kept, is not known here.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from appliance.building.orders import BuildError, Target
from appliance.building.phases import Phases
from appliance.building.pinned import PinnedFile
from appliance.building.profiles import InputRange, described, profile
from appliance.building.stopping import Stop
from appliance.building.store import StoreError
from appliance.engines import tensorrt_library
from appliance.engines.base import EngineError
from appliance.engines.wording import clean

RECIPE = "1: strongly typed, no auxiliary streams, layer names"
"""What is fixed in here and shapes the plan. Part of every plan's key: raised with each change to it."""

MIB = 1 << 20
FIRST_STRONGLY_TYPED_ONLY = 11
"""From this major version on there is no other kind of network, and no flag to ask for one."""

NO_DRIVER = re.compile(r"cudaError (35|100)\b")
"""Without a driver every operation of a cross build complains of that; it is no reason why one failed."""


class Plan(msgspec.Struct, frozen=True):
    """What was built, and what is to be said about it."""

    data: bytes
    inputs: dict[str, str]
    outputs: dict[str, str]
    log: tuple[str, ...]


class PlanBuilder:
    """Builds one plan for a target. `timing_cache` None: none is kept (TensorRT-RTX has none)."""

    def __init__(
        self, target: Target, on_percent: Callable[[float], None], stop: Stop, timing_cache: PinnedFile | None = None
    ) -> None:
        self._target = target
        self._on_percent = on_percent
        self._stop = stop
        self._timing_cache = timing_cache if target.engine == "tensorrt" else None
        self._said: list[str] = []
        self._alive: list[Any] = []

    @property
    def log(self) -> tuple[str, ...]:
        """Everything that the library said so far, for build.log: also after a failure."""
        return tuple(self._said)

    def build(self, source: Path) -> Plan:
        """From that ONNX file. BuildError with all that the library said against it; SystemExit if it was asked to stop."""
        try:
            tensorrt_library.use(self._target.engine)
        except EngineError as error:
            raise BuildError(str(error)) from error
        trt = _library()
        messages = tensorrt_library.Messages()
        with messages.collecting():
            builder = trt.Builder(messages.logger)
            self._heard(messages)
            if builder is None:
                raise BuildError(f"{self._target.engine} gives no builder: {_reason(messages.errors)}")
        network = self._parse(builder, messages, source)
        inputs = [network.get_input(index) for index in range(network.num_inputs)]
        outputs = [network.get_output(index) for index in range(network.num_outputs)]
        config = self._configure(builder, messages, inputs)
        with messages.collecting(), self._stop.polled():
            serialized = builder.build_serialized_network(network, config)
            self._heard(messages)
        if serialized is None:
            raise BuildError(f"{self._target.engine} could not build it: {_reason(messages.errors)}")
        self._keep_timings(config)
        return Plan(
            bytes(memoryview(serialized)),
            {tensor.name: _described(tensor) for tensor in inputs},
            {tensor.name: _described(tensor) for tensor in outputs},
            self.log,
        )

    def _heard(self, messages: tensorrt_library.Messages) -> None:
        self._said += [clean(line) for line in messages.lines]

    def _parse(self, builder: Any, messages: tensorrt_library.Messages, source: Path) -> Any:
        trt = _library()
        flags = 0
        if int(trt.__version__.split(".")[0]) < FIRST_STRONGLY_TYPED_ONLY and self._target.engine == "tensorrt":
            # its bit has moved between the versions: by name only
            flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        with messages.collecting():
            network = builder.create_network(flags)
            parser = trt.OnnxParser(network, messages.logger)
            parsed = parser.parse_from_file(str(source))
            self._heard(messages)
        problems = [_parser_words(parser.get_error(index)) for index in range(parser.num_errors)]
        if not parsed or problems:
            words = "; ".join(dict.fromkeys(problems)) or _reason(messages.errors)
            raise BuildError(f"{self._target.engine} cannot read the model: {words}")
        # the weights that a network refers to are the parser's
        self._alive.append(parser)
        return network

    def _configure(self, builder: Any, messages: tensorrt_library.Messages, inputs: list[Any]) -> Any:
        trt = _library()
        manifest = self._target.manifest
        for tensor in inputs:
            if tensor.is_shape_tensor:
                raise BuildError(
                    f"input {tensor.name!r} decides shapes by its values; make it a constant, or serve by onnxruntime"
                )
        ranges = profile([(tensor.name, tuple(tensor.shape)) for tensor in inputs], manifest)
        config = builder.create_builder_config()
        with messages.collecting():
            if manifest.build.workspace_mb:
                config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, manifest.build.workspace_mb * MIB)
            if manifest.build.tactic_memory_mb:
                config.set_memory_pool_limit(trt.MemoryPoolType.TACTIC_DRAM, manifest.build.tactic_memory_mb * MIB)
            config.builder_optimization_level = manifest.build.optimization_level
            config.max_aux_streams = 0
            config.profiling_verbosity = trt.ProfilingVerbosity.LAYER_NAMES_ONLY
            if not manifest.onnxruntime.tf32:
                config.clear_flag(trt.BuilderFlag.TF32)
            if self._target.engine == "tensorrt_rtx":
                self._aim(config)
            if ranges:
                self._add_profile(builder, config, messages, ranges)
            self._use_timings(config)
            self._heard(messages)
        # the library calls it without owning it
        self._alive.append(_monitor(self._on_percent, self._stop))
        config.progress_monitor = self._alive[-1]
        return config

    def _aim(self, config: Any) -> None:
        """TensorRT-RTX builds for the GPU that it is told, which need not be here."""
        trt = _library()
        wanted = self._target.device.compute_capability
        known = {name for name in dir(trt.ComputeCapability) if name.startswith("SM")}
        name = f"SM{wanted.replace('.', '')}"
        if not wanted:
            raise BuildError("tensorrt_rtx must know the GPU's compute capability, and none is known: is there a GPU?")
        if name not in known:
            offered = ", ".join(sorted(f"{n[2:-1]}.{n[-1]}" for n in known))
            raise BuildError(
                f"tensorrt_rtx {trt.__version__} builds for compute capability {offered}, not for {wanted}"
            )
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, name), 0)

    def _add_profile(
        self, builder: Any, config: Any, messages: tensorrt_library.Messages, ranges: tuple[InputRange, ...]
    ) -> None:
        made = builder.create_optimization_profile()
        self._said.append(f"profile: {described({item.name: item for item in ranges})}")
        for item in ranges:
            made.set_shape(item.name, item.min, item.opt, item.max)
        if config.add_optimization_profile(made) < 0:
            raise BuildError(f"{self._target.engine} does not take these shapes: {_reason(messages.errors)}")

    def _use_timings(self, config: Any) -> None:
        """Go on from what earlier builds measured, so that tactics stay the same and the build is short."""
        if self._timing_cache is None:
            return
        kept = self._timing_cache.read()
        cache = config.create_timing_cache(kept)
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            if kept:
                self._timing_cache.set_aside("the library does not take it")
                self._said.append("the kept timing cache does not fit this library or GPU and was set aside")
            config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)

    def _keep_timings(self, config: Any) -> None:
        if self._timing_cache is None:
            return
        cache = config.get_timing_cache()
        serialized = cache.serialize() if cache is not None else None
        if serialized is None:
            return
        try:
            self._timing_cache.write(bytes(memoryview(serialized)))
        except StoreError as error:
            # the engine is good without it; the next build only takes longer
            self._said.append(str(error))


def _library() -> Any:
    """The flavour in use; untyped here, since `use` chooses it when this runs."""
    return vars(tensorrt_library)["trt"]


def _monitor(on_percent: Callable[[float], None], stop: Stop) -> Any:
    trt = _library()
    phases = Phases()

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]  # a base chosen at run time
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            # anything but True ends the build, an exception too
            on_percent(phases.step(phase_name, step))
            return not stop.asked

        def phase_finish(self, phase_name: str) -> None:
            # a build that is stopped closes its phases, too
            if not stop.asked:
                on_percent(phases.finish(phase_name))

    return Monitor()


def _parser_words(error: Any) -> str:
    code = str(error.code()).rpartition(".")[2]
    operator, node = error.node_operator(), error.node_name()
    where = f"operator {operator}" + (f", node {node!r}" if node else "") if operator else ""
    if code == "MODEL_DESERIALIZE_FAILED":
        return "it is not ONNX, or is cut off"
    words = clean(error.desc())
    if "Plugin not found" in words:
        words = "no such operator, and no plugin of that name"
    return f"{where}: {words} ({code})" if where else f"{words} ({code})"


def _reason(errors: list[str]) -> str:
    """The errors in words: each once, without the library's source places, the missing driver's only if alone."""
    words = list(dict.fromkeys(clean(text) for text in errors if not NO_DRIVER.search(text)))
    return "; ".join(words or dict.fromkeys(map(clean, errors))) or "it did not say why"


def _described(tensor: Any) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = str(tensor.dtype).rpartition(".")[2]
    return f"{kind} {list(tensor.shape)}"
