"""Another precision for the same network: the graph is converted, since engines take the precision that the file has.

FP16 by ONNX Runtime's own converter, INT8 by its static quantization (QDQ, symmetric, weights per channel): both are kept by the
people whose engine must run the result, and work without a GPU or another framework. BF16 takes the converter's FP16 graph and
retypes it, so that where to cast stays the converter's decision. Inputs and outputs keep their datatypes.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from appliance.engines.wording import clean

OnStep = Callable[[str, float], None]
"""Told the phase, and its share done from 0 to 1."""

QUANTIZED_OPERATORS = (
    "Conv",
    "ConvTranspose",
    "Gemm",
    "MatMul",
    "Add",
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "Concat",
)
"""What gains from INT8 and what may stay in INT8 between; softmaxes and norms keep their floats, which cost little and matter."""

METHODS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}

SINGLE_FILE_BYTES = 1 << 30
"""A larger result keeps its weights in a file beside it: protobuf reads no message of 2 GiB."""

FLOAT, FLOAT16, BFLOAT16 = 1, 10, 16


class PrecisionError(Exception):
    """The graph cannot be brought to that precision; the text says why and what to do."""


def convert(
    source: Path,
    target: Path,
    precision: str,
    *,
    samples: Iterable[dict[str, Any]] = (),
    method: str = "minmax",
    on_step: OnStep = lambda _phase, _share: None,
) -> None:
    """Write `source` in that precision to `target`: "fp16", "bf16", "int8" (which needs `samples`: feeds by input name).

    PrecisionError for models that are already of it, or that the converter refuses; OSError, as on a full disk, as it is.
    """
    if precision == "int8":
        _to_int8(source, target, samples, method, on_step)
    elif precision in ("fp16", "bf16"):
        on_step("converting", 0.0)
        _save(_to_half(_read(source), bfloat=precision == "bf16"), target)
        on_step("converting", 1.0)
    else:
        raise PrecisionError(f"nothing converts to {precision!r}; known are fp16, bf16 and int8")


def _read(source: Path) -> Any:
    import onnx

    try:
        return onnx.load(source)
    except OSError:
        raise
    except Exception as error:  # onnx raises protobuf's errors and its checker's for a bad file
        raise PrecisionError(f"the model cannot be read: {_words(error)}") from error


def _save(model: Any, target: Path) -> None:
    import onnx

    large = model.ByteSize() >= SINGLE_FILE_BYTES
    onnx.save(model, target, save_as_external_data=large, location=f"{target.name}.data" if large else None)


def stored_types(model: Any) -> set[int]:
    """The element types of a graph's weights, in ONNX's numbers."""
    return {int(weight.data_type) for weight in model.graph.initializer}


def _to_half(model: Any, *, bfloat: bool) -> Any:
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    name = "bf16" if bfloat else "fp16"
    operators = {node.op_type for node in model.graph.node}
    if operators & {"QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul"}:
        raise PrecisionError(f'the model is quantized already: serve it with precision = "as-is", not {name!r}')
    if stored_types(model) & {FLOAT16, BFLOAT16}:
        raise PrecisionError('the model holds 16-bit weights already: serve it with precision = "as-is"')
    if FLOAT not in stored_types(model) and not _constants(model):
        raise PrecisionError(f'the model has no FP32 weights, so {name} would change nothing: use precision = "as-is"')
    originals = {weight.name: weight for weight in model.graph.initializer}
    exact = {key: _array(weight) for key, weight in originals.items() if bfloat and weight.data_type == FLOAT}
    try:
        with warnings.catch_warnings(), _quiet():
            # values beyond FP16's range are clipped: whether that matters is for the verification to say, with numbers
            warnings.simplefilter("ignore")
            converted = convert_float_to_float16(model, keep_io_types=True)
            wrapped = OnnxModel(converted)
            wrapped.topological_sort()
    except (MemoryError, OSError):
        raise
    except Exception as error:  # the converter raises whatever it stumbles over
        raise PrecisionError(f"the converter refuses this model: {_words(error)}") from error
    if bfloat:
        _retype(converted, exact)
    return converted


def _constants(model: Any) -> bool:
    return any(
        attribute.HasField("t") and attribute.t.data_type == FLOAT
        for node in model.graph.node
        for attribute in node.attribute
    )


def _array(weight: Any) -> Any:
    from onnx import numpy_helper

    return numpy_helper.to_array(weight)


def _retype(model: Any, exact: dict[str, Any]) -> None:
    """FP16 to BF16 everywhere, weights from their FP32 values: BF16 has FP32's range, so nothing is clipped."""
    for graph in _graphs(model.graph):
        for weight in graph.initializer:
            if weight.data_type == FLOAT16:
                _to_bfloat(weight, exact.get(weight.name))
        for value in (*graph.value_info, *graph.input, *graph.output):
            if value.type.tensor_type.elem_type == FLOAT16:
                value.type.tensor_type.elem_type = BFLOAT16
        for node in graph.node:
            for attribute in node.attribute:
                if node.op_type == "Cast" and attribute.name == "to" and attribute.i == FLOAT16:
                    attribute.i = BFLOAT16
                if attribute.HasField("t") and attribute.t.data_type == FLOAT16:
                    _to_bfloat(attribute.t, None)


def _to_bfloat(tensor: Any, exact: Any) -> None:
    """Round to nearest even, as IEEE 754 conversions do; NaN stays NaN."""
    values = np.ascontiguousarray(exact if exact is not None else _array(tensor), np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = np.where(np.isnan(values), 0x7FC0, rounded)
    for field in ("float_data", "int32_data", "raw_data"):
        tensor.ClearField(field)
    tensor.data_type = BFLOAT16
    tensor.raw_data = rounded.astype("<u2").tobytes()


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
            for inner in attribute.graphs:
                yield from _graphs(inner)


class _Reader:
    """Calibration data as the quantizer asks for it; counts what it gives."""

    def __init__(self, samples: Iterable[dict[str, Any]], on_step: OnStep) -> None:
        self._samples = iter(samples)
        self._on_step = on_step
        self.given = 0

    def get_next(self) -> dict[str, Any] | None:
        """The next feeds, or None at the end."""
        sample = next(self._samples, None)
        if sample is not None:
            self.given += 1
            self._on_step("calibrating", 1 - 0.5 ** (self.given / 64))
        return sample

    def __iter__(self) -> _Reader:
        return self

    def __next__(self) -> dict[str, Any]:
        sample = self.get_next()
        if sample is None:
            raise StopIteration
        return sample


def _to_int8(source: Path, target: Path, samples: Iterable[dict[str, Any]], method: str, on_step: OnStep) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    model = _read(source)
    if {node.op_type for node in model.graph.node} & {"QuantizeLinear", "QLinearConv", "QLinearMatMul"}:
        raise PrecisionError('the model is quantized already: serve it with precision = "as-is"')
    if not {node.op_type for node in model.graph.node} & set(QUANTIZED_OPERATORS):
        raise PrecisionError(
            f"the model has none of the operators that gain from int8: {', '.join(QUANTIZED_OPERATORS)}"
        )
    prepared = target.with_name(f"prepared-{target.name}")
    # the preparation looks for external data where there is none: it gets one file with everything
    whole = target.with_name(f"prepared-{target.name}.whole")
    reader = _Reader(samples, on_step)
    try:
        with warnings.catch_warnings(), _quiet(), _temporary_files(target.parent):
            warnings.simplefilter("ignore")
            on_step("preparing", 0.0)
            _save(model, whole)
            quant_pre_process(str(whole), str(prepared), skip_symbolic_shape=True)
            on_step("calibrating", 0.0)
            quantize_static(
                str(prepared),
                str(target),
                reader,
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
                op_types_to_quantize=list(QUANTIZED_OPERATORS),
                calibrate_method=getattr(CalibrationMethod, METHODS[method]),
                extra_options={
                    "ActivationSymmetric": True,
                    "WeightSymmetric": True,
                    # TensorRT refuses biases in INT32 (RTX 1.7); floats cost 17 % on a CPU with VNNI, and serve on both
                    "QuantizeBias": False,
                },
            )
    except (PrecisionError, MemoryError, OSError):
        # a full disk says nothing against the model
        raise
    except Exception as error:  # whatever the quantizer stumbles over; an error of our own samples keeps its words
        if type(error).__name__ == "SampleError":
            raise PrecisionError(str(error)) from error
        raise PrecisionError(f"the quantizer refuses this model: {_words(error)}") from error
    finally:
        for left in target.parent.glob(f"prepared-{target.name}*"):
            left.unlink()
    if not reader.given:
        raise PrecisionError("int8 needs calibration samples, and none came")
    on_step("calibrating", 1.0)


@contextlib.contextmanager
def _temporary_files(folder: Path) -> Iterator[None]:
    """The quantizer keeps several copies of the model: they go where the engine will lie, and with it."""
    before = tempfile.tempdir
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The converters print and log at will; a build process speaks on its standard output."""
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.getLogger().setLevel(level)


def _words(error: Exception) -> str:
    return clean(" ".join(str(error).split()))[:500] or type(error).__name__
