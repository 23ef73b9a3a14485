"""The half of the stand-in for `tensorrt` that makes plans: ONNX in, a plan for `tensorrt_runtime` out, which runs it on the CPU.

Same names and parameters as the real library's, and its rules: a profile for inputs with free sizes, a monitor that can end the
build. A build waits while the file named by TENSORRT_FAKE_HOLD exists, so that tests see it under way.
"""

from __future__ import annotations

import base64
import json
import os
import time
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any

from tests.fakes.tensorrt_runtime import Dims, ILogger, __version__

STEPS = 20
ELEMENT_TYPES = {1: "FLOAT", 2: "UINT8", 3: "INT8", 6: "INT32", 7: "INT64", 9: "BOOL", 10: "HALF", 16: "BF16"}


class MemoryPoolType(Enum):
    WORKSPACE = 0
    TACTIC_DRAM = 4


class ProfilingVerbosity(Enum):
    LAYER_NAMES_ONLY = 0


class BuilderFlag(IntEnum):
    TF32 = 6


class IProgressMonitor:
    def __init__(self) -> None:
        self._made = True


class IOptimizationProfile:
    def __init__(self) -> None:
        self._shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:  # noqa: A002  the real names
        self._shapes[input] = [list(min), list(opt), list(max)]


class ITensor:
    def __init__(self, value: Any) -> None:
        kind = value.type.tensor_type
        self.name = value.name
        self.shape = Dims([d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim])
        self.dtype = ELEMENT_TYPES[kind.elem_type]
        self._shape = list(self.shape)

    @property
    def is_shape_tensor(self) -> bool:
        return False


class INetworkDefinition:
    def __init__(self) -> None:
        self._inputs: list[ITensor] = []
        self._outputs: list[ITensor] = []
        self._onnx = b""

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    def get_input(self, index: int) -> ITensor:
        return self._inputs[index]

    def get_output(self, index: int) -> ITensor:
        return self._outputs[index]


class ITimingCache:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def serialize(self) -> bytes:
        return self._data or b"timings"


class IBuilderConfig:
    def __init__(self) -> None:
        self.builder_optimization_level = 3
        self.max_aux_streams = 0
        self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
        self.progress_monitor: Any = None
        self._profiles: list[IOptimizationProfile] = []
        self._cache: ITimingCache | None = None

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        assert pool_size > 0

    def clear_flag(self, flag: BuilderFlag) -> None:
        assert flag is BuilderFlag.TF32

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: Any) -> ITimingCache:
        return ITimingCache(bytes(serialized_timing_cache))

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._cache


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network = network
        self._logger = logger

    @property
    def num_errors(self) -> int:
        return 0

    def get_error(self, index: int) -> Any:
        raise IndexError(index)

    def parse_from_file(self, model: str) -> bool:
        import onnx

        parsed = onnx.load(model)
        constants = {one.name for one in parsed.graph.initializer}
        self._network._inputs = [ITensor(value) for value in parsed.graph.input if value.name not in constants]
        self._network._outputs = [ITensor(value) for value in parsed.graph.output]
        self._network._onnx = parsed.SerializeToString()
        return True


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
        monitor = config.progress_monitor
        free = [tensor.name for tensor in network._inputs if -1 in tensor._shape]
        if free and not config._profiles:
            self.logger.log(ILogger.Severity.ERROR, f"Network has dynamic inputs {free} and no optimization profile")
            return None
        monitor.phase_start("Building Engine", None, STEPS)
        for step in range(STEPS):
            while step == STEPS // 2 and _held():
                if not monitor.step_complete("Building Engine", step):
                    return None
                time.sleep(0.01)
            if not monitor.step_complete("Building Engine", step):
                return None
        monitor.phase_finish("Building Engine")
        document = {
            "version": __version__,
            "onnx": base64.b64encode(network._onnx).decode(),
            "off_by": float(os.environ.get("TENSORRT_FAKE_OFF_BY", "0")),
            "tensors": [
                {"name": tensor.name, "mode": mode, "dtype": tensor.dtype, "shape": tensor._shape}
                for mode, tensors in (("input", network._inputs), ("output", network._outputs))
                for tensor in tensors
            ],
            "profiles": [profile._shapes for profile in config._profiles],
        }
        return json.dumps(document).encode()


def _held() -> bool:
    place = os.environ.get("TENSORRT_FAKE_HOLD")
    return bool(place) and Path(place).exists()
