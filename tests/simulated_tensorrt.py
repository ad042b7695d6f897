"""A stand-in for TensorRT's runtime: engines that compute a graph on the CPU from and to the addresses they are given.

It refuses what TensorRT refuses: addresses that are not aligned or not allocated, shapes outside the profile, a capture
right after shapes changed, and what TensorRT would answer wrongly: a graph whose context has had other shapes since it
was captured. It shows that the runtime feeds and binds engines rightly; it says nothing of a GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
from simulated_cuda import ALIGNMENT, SimulatedCuda

Feeds = dict[str, np.ndarray]


@dataclass(frozen=True)
class SimulatedGraph:
    """What an engine computes: tensors' types and shapes (-1 is free), profiles, a function of named arrays."""

    inputs: dict[str, tuple[np.dtype, tuple[int, ...]]]
    outputs: dict[str, tuple[np.dtype, tuple[int, ...]]]
    profiles: Sequence[Mapping[str, Sequence[Sequence[int]]]]
    compute: Callable[[Feeds], Feeds]
    memory_bytes: int = 4096


class Logger:
    class Severity:
        INTERNAL_ERROR, ERROR, WARNING, INFO = range(4)

    def __init__(self) -> None:
        pass


def simulated_module(graphs: Mapping[str, SimulatedGraph], cuda: SimulatedCuda, version: str = "10.3.0"):
    """The module `tensorrt` as far as running engines goes. An engine's plan is its graph's name."""
    return SimpleNamespace(
        __version__=version,
        ILogger=Logger,
        Builder=object,
        Runtime=lambda log: Runtime(graphs, cuda, log),
        TensorLocation=SimpleNamespace(DEVICE="device", HOST="host"),
        TensorIOMode=SimpleNamespace(INPUT="input", OUTPUT="output"),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user"),
        nptype=lambda dtype: dtype,
    )


class Runtime:
    def __init__(self, graphs, cuda, log) -> None:
        self.graphs, self.cuda, self.log = graphs, cuda, log

    def deserialize_cuda_engine(self, content):
        name = bytes(content).decode()
        if name not in self.graphs:
            self.log.log(Logger.Severity.ERROR, f"{name}: magic number mismatch")
            return None
        return Engine(self.graphs[name], self.cuda)


class Engine:
    def __init__(self, graph: SimulatedGraph, cuda: SimulatedCuda) -> None:
        self.graph, self.cuda = graph, cuda
        self.tensors = graph.inputs | graph.outputs
        self.names = list(self.tensors)
        self.num_io_tensors = len(self.names)
        self.num_optimization_profiles = max(1, len(graph.profiles))
        self.device_memory_size_v2 = graph.memory_bytes
        self.contexts: list[Context] = []

    def get_tensor_name(self, index):
        return self.names[index]

    def get_tensor_location(self, name):
        return "device"

    def get_tensor_dtype(self, name):
        return self.tensors[name][0]

    def get_tensor_mode(self, name):
        return "input" if name in self.graph.inputs else "output"

    def get_tensor_shape(self, name):
        return self.tensors[name][1]

    def get_tensor_profile_shape(self, name, profile):
        fixed = self.tensors[name][1]
        return self.graph.profiles[profile].get(name, [fixed] * 3) if self.graph.profiles else [fixed] * 3

    def create_execution_context(self, strategy):
        assert strategy == "user"
        self.contexts.append(Context(self))
        return self.contexts[-1]


@dataclass
class Context:
    engine: Engine
    profile: int = 0
    memory: int = 0
    shapes: dict = field(default_factory=dict)
    addresses: dict = field(default_factory=dict)
    changed: bool = True
    output_shapes: dict = field(default_factory=dict)
    told: int = 0  # how often a shape or an address was given

    def set_optimization_profile_async(self, index, stream):
        self.profile = index
        return index < self.engine.num_optimization_profiles

    def set_device_memory(self, pointer, size):
        assert size >= self.engine.graph.memory_bytes
        self.engine.cuda.check(pointer, size)
        self.memory = pointer

    def set_tensor_address(self, name, pointer):
        assert pointer % ALIGNMENT == 0, f"{name} at {pointer:#x}"
        self.told += 1
        self.addresses[name] = pointer
        return True

    def set_input_shape(self, name, shape):
        self.told += 1
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
        if len(shape) != len(low) or not all(a <= b <= c for a, b, c in zip(low, shape, high)):
            return False
        if self.shapes.get(name) != tuple(shape):
            self.shapes[name], self.changed = tuple(shape), True
        return True

    def get_tensor_shape(self, name):
        if name in self.shapes:
            return self.shapes[name]
        shapes = self._all_shapes()
        key = tuple(sorted(shapes.items()))
        if key not in self.output_shapes:
            zeros = {each: np.zeros(shape, self.engine.tensors[each][0]) for each, shape in shapes.items()}
            found = self.engine.graph.compute(zeros)
            self.output_shapes[key] = {each: array.shape for each, array in found.items()}
        return self.output_shapes[key][name]

    def execute_async_v3(self, stream):
        assert stream == 77
        assert self.memory, "no memory for activations"
        cuda = self.engine.cuda
        if cuda.recording is not None:
            assert not self.changed, "shapes changed since the last run: a capture would fail"
        self.changed = False
        shapes, addresses = self._all_shapes(), dict(self.addresses)

        def work():
            # What a context keeps on the device for its shapes is part of no graph.
            assert shapes == self._all_shapes(), "the context has had other shapes since this graph was captured"
            feeds = {name: self._view(name, addresses[name], shape).copy() for name, shape in shapes.items()}
            for name, array in self.engine.graph.compute(feeds).items():
                view = self._view(name, addresses[name], array.shape)
                assert view.dtype == array.dtype, name
                view[...] = array

        cuda.enqueue("run", work)
        return True

    def _all_shapes(self):
        fixed = {n: shape for n, (_, shape) in self.engine.graph.inputs.items() if -1 not in shape}
        return fixed | self.shapes

    def _view(self, name, address, shape):
        dtype = np.dtype(self.engine.tensors[name][0])
        size = int(np.prod(shape)) * dtype.itemsize
        if size == 0:
            return np.zeros(shape, dtype)
        self.engine.cuda.check(address, size)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)).view(dtype).reshape(shape)
