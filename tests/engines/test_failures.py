"""What ONNX Runtime raises, told apart by its words: a lost device, want of memory, or a batch that is refused."""

from __future__ import annotations

import pytest

from appliance.engines import onnxruntime
from appliance.engines.base import DeviceFaultError, EngineError, OutOfMemoryError

PLACE = " ; GPU=0 ; hostname=line-4 ; file=/build/onnxruntime/core/providers/cuda/cuda_call.cc ; line=162 ; expr=cudaMemcpy(x)"


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("CUDA failure 700: an illegal memory access was encountered" + PLACE, DeviceFaultError),
        ("CUDA failure 719: unspecified launch failure" + PLACE, DeviceFaultError),
        ("CUDA failure 2: out of memory" + PLACE, OutOfMemoryError),
        ("Failed to allocate memory for requested buffer of size 1048576", OutOfMemoryError),
        ("std::bad_alloc", OutOfMemoryError),
        ("CUDA failure 1: invalid argument" + PLACE, EngineError),
        ("Got invalid dimensions for input", EngineError),
    ],
)
def test_the_words_of_the_library_decide_what_a_failure_is(said: str, kind: type[EngineError]) -> None:
    error = RuntimeError(said)
    assert type(onnxruntime._failure(error, onnxruntime._words(error))) is kind


def test_a_clients_message_names_no_host_and_no_place_in_the_source() -> None:
    words = onnxruntime._words(RuntimeError("CUDA failure 2: out of memory" + PLACE))
    assert words == "CUDA failure 2: out of memory ; expr=cudaMemcpy(x)"
