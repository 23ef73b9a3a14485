"""Programs that GPU tests run in processes of their own: a device that is lost, or a library that is loaded, is so for good.

Each takes a plan file and the flavour, and prints one line of JSON.
"""

from __future__ import annotations

PRELUDE = """
import json, sys
import numpy as np
import appliance
from appliance.core.manifest import OnnxRuntimeManifest
from appliance.engines import cuda, registry
from appliance.engines.base import DeviceFaultError, EngineBatch, EngineOptions, EngineTensor

def load(graphs="true"):
    options = EngineOptions(sys.argv[2], sys.argv[1], "cuda", 0, 1, OnnxRuntimeManifest(), {"cuda_graphs": graphs})
    return registry.load(options)

def tensor(spec, array):
    return EngineTensor(
        spec.name, spec.datatype, array.shape, memoryview(array).cast("B"), array.__array_interface__["data"][0]
    )

def bound(engine, rows, seed=0):
    make = np.random.default_rng(seed)
    inputs = [make.random((rows, *spec.shape[1:]), np.float32) for spec in engine.traits.inputs]
    outputs = [np.zeros((rows, *spec.shape[1:]), np.float32) for spec in engine.traits.outputs]
    places = [tuple(map(tensor, specs, arrays)) for specs, arrays in
              ((engine.traits.inputs, inputs), (engine.traits.outputs, outputs))]
    return EngineBatch((rows, seed), rows, *places), inputs, outputs
"""

GRAPHS_ON_AND_OFF = (
    PRELUDE
    + """
worst, noted = 0.0, {}
results = {}
for graphs in ("true", "false"):
    engine = load(graphs)
    for rows in (1, 3, 8):
        batch, inputs, outputs = bound(engine, rows)
        for turn in range(5):
            for output in outputs:
                output[:] = np.nan
            assert engine.run(batch) is None
            first = results.setdefault((rows, 0), [output.copy() for output in outputs])
            worst = max(worst, *(float(np.abs(a - b).max()) for a, b in zip(first, outputs)))
    noted[graphs] = engine.traits.details["cuda_graphs"]
    engine.close()
print(json.dumps({"worst": worst, "true": noted["true"], "false": noted["false"]}))
"""
)

MEMORY_COMES_BACK = (
    PRELUDE
    + """
watch = cuda.Device(0)
watch.open()
used = []
for turn in range(int(sys.argv[3])):
    engine = load()
    batch, _, _ = bound(engine, 4)
    for _ in range(4):
        engine.run(batch)
    engine.close()
    free, total = watch.memory_info()
    used.append(total - free)
watch.close()
print(json.dumps(used))
"""
)

TRAP = (
    PRELUDE
    + """
# a kernel that does nothing but fault; PTX is compiled by the driver, so no toolkit is needed
PTX = b".version 6.4\\n.target sm_75\\n.address_size 64\\n.visible .entry fault() { trap; }\\n\\0"
from cuda.bindings import driver

engine = load()
batch, _, _ = bound(engine, 2)
engine.run(batch)
error, module = driver.cuModuleLoadData(PTX)
assert not error, error
error, kernel = driver.cuModuleGetFunction(module, b"fault")
assert not error, error
driver.cuLaunchKernel(kernel, 1, 1, 1, 1, 1, 1, 0, engine._device.stream_handle, 0, 0)
words = []
for _ in range(2):
    try:
        engine.run(batch)
    except DeviceFaultError as fault:
        words.append(str(fault))
print(json.dumps(words), flush=True)
import os
os._exit(75 if len(words) == 2 else 1)
"""
)

BOGUS_ADDRESS = (
    PRELUDE
    + """
from appliance.engines.base import EngineError
engine = load()
batch, inputs, outputs = bound(engine, 2)
engine.run(batch)
expected = [output.copy() for output in outputs]
host = inputs[0].__array_interface__["data"][0]
try:
    engine._device.upload(64, host, 64)
    said = ""
except EngineError as error:
    said = str(error)
lost = False
try:
    engine.run(batch)
except DeviceFaultError:
    lost = True
same = not lost and all(np.array_equal(a, b) for a, b in zip(expected, outputs))
print(json.dumps({"said": said, "lost": lost, "same": same}), flush=True)
import os
os._exit(0)
"""
)
