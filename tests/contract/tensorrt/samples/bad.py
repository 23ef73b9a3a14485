"""Wrong in TensorRT 11, line by line; some of it was right in 10.3."""

from __future__ import annotations

from typing import Any

from appliance.engines import tensorrt_library as library


def infer(engine: library.trt.ICudaEngine, stream: int) -> bool:
    engine.create_execution_context_without_device_memory()
    context = engine.create_execution_context()
    context.execute_async_v2(bindings=[1], stream_handle=stream)
    return context.execute_async_v3(stream=stream)


def configure(config: library.trt.IBuilderConfig) -> None:
    config.set_flag(library.trt.BuilderFlag.FP16)
    if hasattr(config, "max_num_tacticss"):
        config.max_num_tacticss = 4
    config.set_memory_pool_limit(library.trt.MemoryPool.WORKSPACE, 1)


def untyped(context: Any, anything: Any) -> int:
    context.execute_async_v4(1)
    anything.get_tensor_profile_shape(0)
    return int(anything.device_memory_size)


class Allocator(library.trt.IOutputAllocator):  # type: ignore[misc]
    def notify_shapes(self, tensor_name: str, shape: Any) -> None:
        del tensor_name, shape
