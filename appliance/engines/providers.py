"""Which of ONNX Runtime's execution providers run a model, and whether they really do.

The device in a manifest is a contract. The library itself falls back to the CPU with a line in its log and answers ten times
slower; here that is an error that names what is missing, unless the manifest asks for the fallback.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import onnxruntime as ort

from appliance.core.manifest import OnnxRuntimeManifest

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
MIB = 1 << 20
PACKAGES = ("onnxruntime", "onnxruntime-gpu")


def wanted(device: str, manifest: OnnxRuntimeManifest) -> list[Any]:
    """The providers for a device, with options for a box that runs for years.

    CUDA: memory grows by what is asked for, not by doubling; convolutions are chosen by heuristics instead of trying all at the
    first run of every shape; TF32 only if asked for. The CPU stands behind it for the operators that CUDA has not.
    """
    if device == "cpu":
        return [CPU]
    options = {
        "device_id": device.partition(":")[2] or "0",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "cudnn_conv_use_max_workspace": "0",
        "do_copy_in_default_stream": "1",
        "use_tf32": "1" if manifest.tf32 else "0",
    }
    if manifest.gpu_memory_limit_mb:
        options["gpu_mem_limit"] = str(manifest.gpu_memory_limit_mb * MIB)
    return [(CUDA, options), CPU]


def missing(device: str) -> str:
    """Why a device cannot be used before anything is loaded, in words; empty if nothing speaks against it."""
    if device == "cpu":
        return ""
    installed = [name for name in PACKAGES if _installed(name)]
    if len(installed) > 1:
        return (
            "both onnxruntime and onnxruntime-gpu are installed; they share one folder and the later one wins: "
            "pip uninstall both, then install onnxruntime-gpu"
        )
    if CUDA not in ort.get_available_providers():
        return (
            f"{installed[0] if installed else 'onnxruntime'} {ort.__version__} has no CUDA provider: "
            "install appliance[gpu] instead of appliance[cpu]"
        )
    return _unloadable()


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _unloadable() -> str:
    """The library that the CUDA provider lacks, in the words of the system's loader; empty if it loads."""
    if hasattr(ort, "preload_dlls"):
        # takes CUDA and cuDNN from their Python packages, where they are
        # what it misses is said below, in the loader's words; here it would be printed onto our standard output
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()
    provider = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    for name in ("libcuda.so.1", str(provider)):
        try:
            ctypes.CDLL(name)
        except OSError as error:
            words = str(error).replace(f"{provider.parent}/", "")
            if "undefined symbol" in words:
                # it is meant to be loaded by the runtime's own loader, which comes first; its libraries were found
                continue
            return f"the CUDA provider cannot be loaded: {words}"
    return ""


def device(session: Any, asked: str) -> str:
    """Where a session really runs: on the GPU that was asked for if its provider is first in line, else on the processor."""
    if session.get_providers()[0] != CUDA:
        return "cpu"
    return f"cuda:{asked.partition(':')[2] or '0'}"


def copies(session: Any) -> bool:
    """Whether the library copies inputs to another device; on the processor it runs with them where they lie."""
    return any(provider != CPU for provider in session.get_providers())


def refused(session: Any, device: str) -> str:
    """Why a session does not run on the device after all, in words; empty if at least one node really does."""
    if device == "cpu":
        return ""
    nodes = node_counts(session)
    if CUDA in session.get_providers() and (nodes.get(CUDA) or not nodes):
        return ""
    return _unloadable() or "no operator of the model runs there; the library's own log has its reasons"


def node_counts(session: Any) -> dict[str, int]:
    """How many of the graph's nodes, as optimized, each provider runs."""
    counts: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        counts[part.ep_name] += len(part.get_nodes())
    return dict(counts)
