"""The execution contexts of a TensorRT engine, and the CUDA graphs recorded from them.

One common context runs whatever comes. Shapes that come again get a context of their own, whose work is recorded and from then on
launched: a graph points into what its context holds, so that context never sees other shapes. All share one block of activation
memory, since runs do not overlap. It knows no batch and copies nothing. Driven by `tensorrt`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from appliance.core.tensor import Shape
from appliance.engines import tensorrt_library as library
from appliance.engines.base import DeviceFaultError, EngineError
from appliance.engines.cuda import Device
from appliance.engines.tensorrt_plan import Plan

KEPT_SHAPES = 32
"""Contexts with a graph: as many as the row counts of a default batch. The least recently used goes first."""

REMEMBERED_SHAPES = 256

Shapes = tuple[Shape, ...]
HostTensors = Sequence[tuple[str, int]]


class Execution:
    """A context as it is set now: its input shapes, the output shapes that follow (-1 where they depend on data), its graph."""

    def __init__(self, context: Any) -> None:
        self.context = context
        self.shapes: Shapes | None = None
        self.outputs: Shapes = ()
        self.graph = 0
        self.own = False


class Executions:
    """All contexts of one engine. `open` first; `close` works after half an `open`, and before the engine goes."""

    def __init__(self, engine: Any, plan: Plan, device: Device, messages: library.Messages, *, graphs: bool) -> None:
        self._engine = engine
        self._plan = plan
        self._device = device
        self._messages = messages
        self._graphs = graphs and not plan.has_shape_tensors
        self._scratch_nbytes = int(engine.device_memory_size_v2)
        self._scratch = 0
        self._common: Execution | None = None
        self._own: OrderedDict[Shapes, Execution] = OrderedDict()
        self._seen: OrderedDict[Shapes, bool] = OrderedDict()  # whether a graph may be tried
        self._addresses: dict[str, int] = {}
        self._allocators: dict[str, Any] = {}
        self.captured = 0
        self.refused = 0
        self.refusal = ""
        self._news = False

    @property
    def scratch_nbytes(self) -> int:
        """The activation memory, shared by all contexts."""
        return self._scratch_nbytes

    def open(self) -> None:
        """Take the activation memory and make the common context. EngineError: no room, or the library's words."""
        if self._scratch_nbytes:
            self._scratch = self._device.allocate(self._scratch_nbytes)
        self._common = self._create()

    def _create(self) -> Execution:
        with self._messages.collecting():
            strategy = library.trt.ExecutionContextAllocationStrategy.USER_MANAGED
            context = self._engine.create_execution_context(strategy)
            if context is None:
                raise self.failure("no execution context could be made")
            if self._scratch:
                context.set_device_memory(self._scratch, self._scratch_nbytes)
        execution = Execution(context)
        self._point(execution)
        return execution

    def _point(self, execution: Execution) -> None:
        for name, address in self._addresses.items():
            if not execution.context.set_tensor_address(name, address):
                raise EngineError(self._messages.said(f"the address of {name!r} was refused"))

    def failure(self, otherwise: str) -> EngineError:
        """What the library refused, in its words; a DeviceFaultError if the device is lost, whatever the library says of it."""
        said = self._messages.said(otherwise)
        try:
            self._device.synchronize()
        except DeviceFaultError as fault:
            return DeviceFaultError(f"{fault}; TensorRT: {said}")
        except EngineError as error:
            return self._messages.failure(f"{said}; {error}")
        return self._messages.failure(said)

    def point_to(self, addresses: dict[str, int]) -> None:
        """Where inputs and outputs lie on the device from now on. Recorded graphs knew the old places and are dropped."""
        self._drop_own()
        self._addresses = dict(addresses)
        if self._common is not None:
            self._common.shapes = None
            self._point(self._common)

    def allocate_with(self, allocators: dict[str, Any]) -> None:
        """Outputs whose size depends on the data: who allocates them. There are no graphs with such outputs."""
        assert self._common is not None
        self._graphs = False
        self._allocators = allocators
        for name, allocator in allocators.items():
            if not self._common.context.set_output_allocator(name, allocator):
                raise EngineError(self._messages.said(f"the allocator of {name!r} was refused"))

    def prepare(self, shapes: Shapes, host_tensors: HostTensors = ()) -> Execution:
        """A context set for inputs of these shapes. `host_tensors`: names and addresses of shape tensors, read at once.

        EngineError: no profile holds them, or the library's words.
        """
        execution = self._own.get(shapes)
        if execution is not None:
            self._own.move_to_end(shapes)
            return execution
        if self._graphs:
            execution = self._promote(shapes)
            if execution is not None:
                return execution
        assert self._common is not None
        if self._common.shapes != shapes or host_tensors:
            self._set(self._common, shapes, host_tensors)
        return self._common

    def _promote(self, shapes: Shapes) -> Execution | None:
        """A context of their own for shapes that came before, unless that was refused."""
        allowed = self._seen.get(shapes)
        if allowed is None:
            self._seen[shapes] = True
            if len(self._seen) > REMEMBERED_SHAPES:
                self._seen.popitem(last=False)
            return None
        self._seen.move_to_end(shapes)
        if not allowed:
            return None
        try:
            execution = self._create()
            self._set(execution, shapes, ())
        except DeviceFaultError:
            raise
        except EngineError as error:
            # no room for one more context, say: the common one has served these shapes already
            self._refuse(shapes, str(error))
            return None
        execution.own = True
        self._own[shapes] = execution
        if len(self._own) > KEPT_SHAPES:
            _, oldest = self._own.popitem(last=False)
            self._release(oldest)
        return execution

    def _set(self, execution: Execution, shapes: Shapes, host_tensors: HostTensors) -> None:
        execution.shapes = None
        profile = self._plan.profile_for(shapes)
        context = execution.context
        with self._messages.collecting():
            if context.active_optimization_profile != profile:
                if not context.set_optimization_profile_async(profile, self._device.stream_handle):
                    raise self.failure(f"profile {profile} was refused")
                self._point(execution)
            for tensor, shape in zip(self._plan.inputs, shapes, strict=True):
                if not context.set_input_shape(tensor.spec.name, shape):
                    raise self.failure(f"shape {list(shape)} of input {tensor.spec.name!r} was refused")
            for name, address in host_tensors:
                if not context.set_tensor_address(name, address):
                    raise self.failure(f"the address of {name!r} was refused")
            try:
                missing = context.infer_shapes()
            except RuntimeError as error:
                raise self.failure(str(error)) from error
            if missing:
                raise self.failure(f"no shapes could be inferred without {', '.join(missing)}")
        execution.outputs = tuple(
            tuple(int(size) for size in context.get_tensor_shape(tensor.spec.name)) for tensor in self._plan.outputs
        )
        execution.shapes = shapes

    def enqueue(self, execution: Execution) -> None:
        """Queue the work on the device's stream: the graph, if there is one. EngineError or DeviceFaultError with all words."""
        if execution.graph:
            self._device.launch(execution.graph)
            return
        with self._messages.collecting():
            if not execution.context.execute_async_v3(self._device.stream_handle):
                raise self.failure("the library refused to run the batch and gave no reason")

    def settle(self, execution: Execution) -> bool:
        """After a run that has ended well: record it, if it was the first of an own context. Whether `summary` has changed."""
        if execution.own and not execution.graph:
            self._record(execution)
        news, self._news = self._news, False
        return news

    def _record(self, execution: Execution) -> None:
        shapes = execution.shapes
        assert shapes is not None
        try:
            execution.graph = self._capture(execution)
        except DeviceFaultError:
            raise
        except EngineError as error:
            self._refuse(shapes, str(error))
            self._release(self._own.pop(shapes))
            self._device.synchronize()
        else:
            self.captured += 1
            self._news = True

    def _capture(self, execution: Execution) -> int:
        context, stream = execution.context, self._device.stream_handle
        # only the RTX flavour has it: it compiles kernels behind the scenes and knows when they are all there
        if hasattr(context, "is_stream_capturable") and not context.is_stream_capturable(stream):
            raise EngineError("the library says that this network cannot be recorded")

        def enqueue() -> None:
            if not context.execute_async_v3(stream):
                raise EngineError(self._messages.said("the library refused to be recorded"))

        with self._messages.collecting():
            return self._device.capture(enqueue)

    def _refuse(self, shapes: Shapes, reason: str) -> None:
        self._seen[shapes] = False
        self.refused += 1
        self.refusal = reason
        self._news = True

    def _release(self, execution: Execution) -> None:
        if execution.graph:
            self.captured -= 1
            graph, execution.graph = execution.graph, 0
            self._device.destroy(graph)
        execution.context = None

    def _drop_own(self) -> None:
        while self._own:
            self._release(self._own.popitem()[1])

    def summary(self) -> str:
        """For people: how many graphs there are and how many shapes go without."""
        if not self._graphs:
            return "off"
        words = f"{self.captured} captured, {self.refused} refused"
        return f"{words} ({self.refusal[:200]})" if self.refusal else words

    def close(self) -> None:
        """Graphs first, then contexts. The activation memory goes with the device."""
        try:
            self._drop_own()
        finally:
            self._own.clear()
            self._common = None
            self._allocators = {}
            self._engine = None


def output_allocator(device: Device) -> Any:
    """A library's `IOutputAllocator` that keeps one growing buffer on the device: `address`, `shape` after a run, `problem`."""
    trt = library.trt

    class Allocator(trt.IOutputAllocator):  # type: ignore[misc, name-defined, unused-ignore]  # untyped where the library is absent
        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self.address = 0
            self.nbytes = 0
            self.shape: Shape = ()
            self.problem: EngineError | None = None

        def reallocate_output_async(self, tensor_name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            if size <= self.nbytes and self.address:
                return self.address
            try:
                if self.address:
                    address, self.address, self.nbytes = self.address, 0, 0
                    device.free(address)
                self.address = device.allocate(size)
                self.nbytes = size
            except EngineError as error:
                # an exception would be printed and lost on its way through the library; 0 tells it to fail
                self.problem = error
                return 0
            return self.address

        def notify_shape(self, tensor_name: str, shape: Any) -> None:
            self.shape = tuple(int(size) for size in shape)

    return Allocator()
