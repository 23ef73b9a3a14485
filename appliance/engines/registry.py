"""From an engine's name to its loader: an explicit table. Each module, and with it its library, is imported on first use."""

from __future__ import annotations

from appliance.engines.base import Engine, EngineError, EngineOptions


def load(options: EngineOptions) -> Engine:
    """Load a model with the engine it names. EngineError: not loadable, with the library's own words."""
    if options.engine == "onnxruntime":
        from appliance.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(options)
    if options.engine == "loopback":
        from appliance.engines.loopback import LoopbackEngine

        return LoopbackEngine(options)
    if options.engine in ("tensorrt", "tensorrt_rtx"):
        from appliance.engines.tensorrt import TensorRtEngine

        return TensorRtEngine(options)
    raise EngineError(
        f"unknown engine {options.engine!r}; this build has onnxruntime, tensorrt, tensorrt_rtx and loopback"
    )


def preload() -> None:
    """Import what is slow to import, before the first fork. A missing library is reported by the load that needs it."""
    try:
        import appliance.engines.onnxruntime
    except ImportError:
        return
    del appliance.engines.onnxruntime
