"""TensorRT as an engine: runs a plan file, for both flavours of the library and every version from 10.3 on.

A batch is copied from the worker's memory to the device, run, and copied back to where the worker wants it; that memory is
pinned, so copies need no help of the CPU. From the second run of a batch size on, the work is launched as a CUDA graph. A plan is
native code: it is loaded from the appliance's own store only, and its embedded host code stays forbidden.
"""

from __future__ import annotations

import contextlib
import mmap
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from appliance.core.assembly import align
from appliance.core.tensor import Shape
from appliance.engines import cuda
from appliance.engines import tensorrt_library as library
from appliance.engines.base import (
    DeviceFaultError,
    EngineBatch,
    EngineError,
    EngineOptions,
    EngineOutput,
    EngineTensor,
    EngineTraits,
    OutOfMemoryError,
    OutputMismatchError,
)
from appliance.engines.tensorrt_execution import Execution, Executions, output_allocator
from appliance.engines.tensorrt_plan import nbytes, read

KEPT_BINDINGS = 128

PRODUCTS = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}

Copy = tuple[int, int, int]


class Staging:
    """A pinned block that grows, for tensors that do not lie in pinned memory themselves."""

    def __init__(self, device: cuda.Device) -> None:
        self._device = device
        self._memory: cuda.PinnedMemory | None = None

    @property
    def nbytes(self) -> int:
        """How large it is now."""
        return self._memory.nbytes if self._memory is not None else 0

    def grow(self, size: int) -> None:
        """Become so large, at another place. EngineError: no room; then there is no block at all."""
        if self._memory is not None:
            memory, self._memory = self._memory, None
            self._device.free_pinned(memory)
        self._memory = self._device.allocate_pinned(size)

    def at(self, offset: int, size: int) -> tuple[int, memoryview]:
        """Address of and view on a part of it."""
        assert self._memory is not None
        return self._memory.address + offset, self._memory.view[offset : offset + size]


class Binding(msgspec.Struct):
    """What one run moves: CPU copies into and out of staging, and the device's own copies; all fixed while places are."""

    shapes: tuple[Shape, ...]
    host_tensors: tuple[tuple[str, int], ...] = ()
    before: list[tuple[memoryview, memoryview]] = []
    uploads: list[Copy] = []
    downloads: list[Copy] = []
    after: list[tuple[memoryview, memoryview]] = []
    outputs: list[EngineOutput] | None = None


class TensorRtEngine:
    """One plan on one device."""

    def __init__(self, options: EngineOptions) -> None:
        self._device = cuda.Device(_index(options.device))
        # without a driver the library itself may end the process
        facts = cuda.facts(self._device.index)
        library.use(options.engine)
        self._messages = library.Messages()
        self._buffers: dict[str, tuple[int, int]] = {}
        self._bindings: OrderedDict[Hashable, Binding] = OrderedDict()
        self._allocators: dict[str, Any] = {}
        self._arena = (0, 0)
        self._runtime: Any = None
        self._engine: Any = None
        self._executions: Executions | None = None
        self._in, self._out = Staging(self._device), Staging(self._device)
        try:
            self._device.open()
            self._deserialize(options.model_file)
            self._plan = read(self._engine)
            wanted = options.parameters.get("cuda_graphs", "true") != "false"
            self._executions = Executions(self._engine, self._plan, self._device, self._messages, graphs=wanted)
            self._executions.open()
            self._take_memory()
        except BaseException:
            # the first failure is the one to report; on a lost device everything after it fails the same way
            with contextlib.suppress(EngineError):
                self.close()
            raise
        self.traits = self._describe(options, facts)

    def _deserialize(self, model_file: str) -> None:
        with self._messages.collecting():
            self._runtime = library.trt.Runtime(self._messages.logger)
            try:
                with Path(model_file).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    self._engine = self._runtime.deserialize_cuda_engine(data)
            except (OSError, ValueError) as error:
                said = error.strerror if isinstance(error, OSError) else "it is empty"
                raise EngineError(f"the plan cannot be read: {said}") from error
            if self._engine is None:
                lines = "; ".join(self._messages.lines) or "the library gives no reason"
                self._device.synchronize()
                refused = self._messages.failure(f"there is no room to load this plan now ({lines})")
                if isinstance(refused, OutOfMemoryError):
                    raise refused
                raise EngineError(
                    f"this plan cannot be loaded here ({lines}); plans fit one version of TensorRT and one kind of GPU: "
                    "have it built anew"
                )

    def _take_memory(self) -> None:
        """Room on the device for the largest inputs and outputs of any profile, so that running out of it shows now."""
        executions = self._executions
        sizes: dict[str, int] = {}
        assert executions is not None
        dependent: list[str] = []
        for profile in self._plan.profiles:
            shapes = tuple(
                profile.shapes[tensor.spec.name][1] if profile.shapes else tensor.spec.shape
                for tensor in self._plan.inputs
            )
            values = {
                tensor.spec.name: np.array(
                    profile.values.get(tensor.spec.name, ((), ()))[1], tensor.spec.datatype.numpy
                )
                for tensor in self._plan.inputs
                if tensor.on_host
            }
            host_tensors = [(name, int(array.__array_interface__["data"][0])) for name, array in values.items()]
            try:
                execution = executions.prepare(shapes, host_tensors)
            except DeviceFaultError:
                raise
            except EngineError:
                if not values:
                    raise
                # the largest values of shape tensors need not fit the largest shapes: room is made when a batch needs it
                continue
            everything = (*zip(self._plan.inputs, shapes, strict=True), *self._output_shapes(execution))
            for tensor, shape in everything:
                name = tensor.spec.name
                if min(shape, default=0) < 0:
                    dependent.append(name)
                elif not tensor.on_host:
                    sizes[name] = max(sizes.get(name, 1), nbytes(tensor.spec.datatype, shape))
        self._allocators = {name: output_allocator(self._device) for name in dict.fromkeys(dependent)}
        self._reserve({name: size for name, size in sizes.items() if name not in self._allocators})
        if self._allocators:
            executions.allocate_with(self._allocators)

    def _output_shapes(self, execution: Execution) -> list[tuple[Any, Shape]]:
        return list(zip(self._plan.outputs, execution.outputs, strict=True))

    def _reserve(self, sizes: dict[str, int]) -> bool:
        """Device buffers of at least these sizes. True if some lie elsewhere now; what was recorded or bound is void then."""
        short = {name: size for name, size in sizes.items() if self._buffers.get(name, (0, 0))[1] < size}
        if not short:
            return False
        assert self._executions is not None
        self._bindings.clear()
        self._executions.point_to({})
        for name, size in short.items():
            if name in self._buffers:
                self._device.free(self._buffers.pop(name)[0])
            self._buffers[name] = (self._device.allocate(size), size)
        self._executions.point_to({name: address for name, (address, _) in self._buffers.items()})
        return True

    def _stage(self, staging: Staging, size: int) -> None:
        """Room in a staging block. A larger one lies elsewhere, so what was bound is void."""
        if staging.nbytes < size:
            self._bindings.clear()
            staging.grow(size)

    def _describe(self, options: EngineOptions, facts: cuda.DeviceFacts) -> EngineTraits:
        assert self._executions is not None
        reason = self._plan.unbatched_reason(list(self._allocators))
        rows = 1 if reason else min(self._plan.max_rows(), options.max_batch_size or self._plan.max_rows())
        if not reason and rows == 1:
            reason = "max_batch_size is 1" if options.max_batch_size == 1 else "the plan was built for one row"
        version = library.trt.__version__
        return EngineTraits(
            platform="tensorrt_plan",
            backend="tensorrt",
            device=f"cuda:{self._device.index}",
            provider=f"{PRODUCTS[options.engine]} {'.'.join(version.split('.')[:3])}",
            inputs=tuple(tensor.spec for tensor in self._plan.inputs),
            outputs=tuple(tensor.spec for tensor in self._plan.outputs),
            batched=not reason,
            max_batch_size=rows,
            unbatched_reason=reason,
            details={
                "device": f"cuda:{self._device.index} {facts.name}, compute capability {facts.compute_capability}",
                "cuda": facts.cuda,
                options.engine: version,
                "profiles": self._plan.ranges(),
                "activation_memory": f"{self._executions.scratch_nbytes} bytes",
                "buffers": f"{sum(size for _, size in self._buffers.values())} bytes",
                "host_memory": "staged",
                "cuda_graphs": self._executions.summary(),
            },
        )

    def _note(self, **details: str) -> None:
        self.traits = msgspec.structs.replace(self.traits, details={**self.traits.details, **details})

    def attach_memory(self, address: int, size: int) -> None:
        """Pin the arena, so that the device copies from and to it directly; where that is refused, go through staging."""
        self._bindings.clear()
        if self._arena[1]:
            start, self._arena = self._arena[0], (0, 0)
            self._device.unregister(start)
        refused = self._device.register(address, size)
        if not refused:
            self._arena = (address, address + size)
        self._note(host_memory=f"staged ({refused})" if refused else "pinned")

    def run(self, batch: EngineBatch) -> Sequence[EngineOutput] | None:
        """Run one batch. Afterwards, whatever the outcome, the device does not touch the batch's memory any more."""
        assert self._executions is not None
        try:
            binding = self._bindings.get(batch.key) if batch.key is not None else None
            if binding is None:
                binding, execution = self._bind(batch)
            else:
                execution = self._executions.prepare(binding.shapes)
            return self._execute(binding, execution)
        except DeviceFaultError:
            raise
        except EngineError:
            self._device.synchronize()
            raise

    def _execute(self, binding: Binding, execution: Execution) -> Sequence[EngineOutput] | None:
        device, executions = self._device, self._executions
        assert executions is not None
        for target, source in binding.before:
            target[:] = source
        for copy in binding.uploads:
            device.upload(*copy)
        if self._allocators:
            return self._run_dependent(execution)
        executions.enqueue(execution)
        for copy in binding.downloads:
            device.download(*copy)
        device.synchronize()
        for target, source in binding.after:
            target[:] = source
        if executions.settle(execution):
            self._note(cuda_graphs=executions.summary())
        return binding.outputs

    def _bind(self, batch: EngineBatch) -> tuple[Binding, Execution]:
        """Find out what a batch needs, and fix it. OutputMismatchError if its outputs will have other shapes than expected."""
        assert self._executions is not None
        shapes = tuple(tensor.shape for tensor in batch.inputs)
        pairs = list(zip(self._plan.inputs, batch.inputs, strict=True))
        binding = Binding(shapes, tuple((tensor.name, tensor.address) for known, tensor in pairs if known.on_host))
        execution = self._executions.prepare(shapes, binding.host_tensors)
        _expect(batch.outputs, execution.outputs)
        sizes = {known.spec.name: len(tensor.view) for known, tensor in pairs if not known.on_host}
        for known, shape in self._output_shapes(execution):
            if known.spec.name not in self._allocators and not known.on_host:
                if min(shape, default=0) < 0:
                    raise EngineError(
                        f"the size of output {known.spec.name!r} depends on data and on shape tensors at once"
                    )
                sizes[known.spec.name] = nbytes(known.spec.datatype, shape)
        moved = self._reserve(sizes)
        self._bind_inputs(binding, [tensor for known, tensor in pairs if not known.on_host])
        if not self._allocators:
            self._bind_outputs(binding, batch.outputs, execution.outputs)
        if moved or len(binding.host_tensors):
            execution = self._executions.prepare(shapes, binding.host_tensors)
        if batch.key is not None and not binding.host_tensors:
            self._bindings[batch.key] = binding
            if len(self._bindings) > KEPT_BINDINGS:
                self._bindings.popitem(last=False)
        return binding, execution

    def _direct(self, tensor: EngineTensor) -> bool:
        start, end = self._arena
        return start <= tensor.address and tensor.address + len(tensor.view) <= end

    def _bind_inputs(self, binding: Binding, tensors: Sequence[EngineTensor]) -> None:
        self._stage(self._in, sum(align(len(tensor.view)) for tensor in tensors if not self._direct(tensor)))
        offset = 0
        for tensor in tensors:
            size, address = len(tensor.view), tensor.address
            if not size:
                continue
            if not self._direct(tensor):
                address, view = self._in.at(offset, size)
                binding.before.append((view, tensor.view))
                offset += align(size)
            binding.uploads.append((self._buffers[tensor.name][0], address, size))

    def _bind_outputs(self, binding: Binding, wanted: Sequence[EngineTensor] | None, shapes: Sequence[Shape]) -> None:
        """Where outputs go: straight to their places, or to staging and from there; with `wanted` None they stay in staging."""
        known = [tensor.spec for tensor in self._plan.outputs]
        sizes = [nbytes(spec.datatype, shape) for spec, shape in zip(known, shapes, strict=True)]
        if wanted is None or not all(map(self._direct, wanted)):
            self._stage(self._out, max(sum(map(align, sizes)), 1))
        outputs, offset = [], 0
        for index, (spec, shape, size) in enumerate(zip(known, shapes, sizes, strict=True)):
            target = wanted[index] if wanted is not None else None
            if target is not None and self._direct(target):
                address = target.address
            else:
                address, view = self._out.at(offset, size)
                offset += align(size)
                outputs.append(EngineOutput(shape, view))
                if target is not None:
                    binding.after.append((target.view, view))
            if size and self._plan.outputs[index].on_host:
                binding.host_tensors = (*binding.host_tensors, (spec.name, address))
            elif size:
                binding.downloads.append((address, self._buffers[spec.name][0], size))
        binding.outputs = outputs if wanted is None else None

    def _run_dependent(self, execution: Execution) -> list[EngineOutput]:
        """A run whose output sizes are known when it is over; then they are fetched, in a second step."""
        assert self._executions is not None
        for allocator in self._allocators.values():
            allocator.problem = None
        try:
            self._executions.enqueue(execution)
        except EngineError as error:
            problem = next((found.problem for found in self._allocators.values() if found.problem is not None), None)
            if problem is None or isinstance(error, DeviceFaultError):
                raise
            raise problem from error
        self._device.synchronize()
        found: list[tuple[int, Shape, int]] = []
        for tensor, known in self._output_shapes(execution):
            allocator = self._allocators.get(tensor.spec.name)
            shape = known if allocator is None else allocator.shape
            address = self._buffers[tensor.spec.name][0] if allocator is None else allocator.address
            found.append((address, shape, nbytes(tensor.spec.datatype, shape)))
        self._stage(self._out, max(sum(align(size) for _, _, size in found), 1))
        outputs, offset = [], 0
        for address, shape, size in found:
            host, view = self._out.at(offset, size)
            if size:
                self._device.download(host, address, size)
            outputs.append(EngineOutput(shape, view))
            offset += align(size)
        self._device.synchronize()
        return outputs

    def close(self) -> None:
        """Give everything back, in the order the library wants: graphs, contexts, engine, runtime, then the memory."""
        self._bindings.clear()
        try:
            if self._executions is not None:
                self._executions.close()
        finally:
            self._allocators = {}
            self._executions = None
            self._engine = None
            self._runtime = None
            self._device.close()


def _index(device: str) -> int:
    kind, _, number = device.partition(":")
    if kind != "cuda":
        raise EngineError(f'a plan runs on an NVIDIA GPU only, not on "{device}": set device = "cuda" in model.toml')
    return int(number or 0)


def _expect(wanted: Sequence[EngineTensor] | None, shapes: Sequence[Shape]) -> None:
    if wanted is None:
        return
    for tensor, shape in zip(wanted, shapes, strict=True):
        if tensor.shape != shape:
            raise OutputMismatchError(
                f"output {tensor.name!r} has shape {list(shape)}, expected was {list(tensor.shape)}"
            )
