"""Right in every release."""

from __future__ import annotations

from typing import Any

from appliance.engines import tensorrt_library as library


def infer(engine: library.trt.ICudaEngine, stream: int) -> bool:
    context = engine.create_execution_context(library.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    context.set_input_shape("x", (1, 3))
    context.set_tensor_address("x", 123)
    return context.execute_async_v3(stream_handle=stream)


def configure(config: library.trt.IBuilderConfig) -> None:
    config.set_memory_pool_limit(library.trt.MemoryPoolType.WORKSPACE, 1 << 20)
    if hasattr(library.trt.BuilderFlag, "FP16"):
        config.set_flag(library.trt.BuilderFlag.FP16)
    if hasattr(config, "max_num_tactics"):
        config.max_num_tactics = 4


def untyped(context: Any, anything: Any) -> int:
    context.set_tensor_address("x", 1)
    return int(anything.get_tensor_name(0))


def aim(config: Any) -> None:
    """TensorRT-RTX is told what to build for."""
    config.num_compute_capabilities = 1
    config.set_compute_capability(library.trt.ComputeCapability.SM89, 0)  # type: ignore[attr-defined]


class Allocator(library.trt.IOutputAllocator):  # type: ignore[misc]
    def __init__(self) -> None:
        library.trt.IOutputAllocator.__init__(self)

    def notify_shape(self, tensor_name: str, shape: Any) -> None:
        del tensor_name, shape
