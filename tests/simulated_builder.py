"""A stand-in for the building half of `tensorrt` on a board: it notes what it is asked and plans nothing.

A graph's layers are those its file names; a plan is the engine's name. With simulated_tensorrt's runtime the plugins'
self-test runs on the CPU. It shows order, arguments and refusals; it says nothing of what a board builds.
"""

from __future__ import annotations

import json
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from simulated_cuda import SimulatedCuda
from simulated_tensorrt import Logger, Runtime, SimulatedGraph, simulated_module

TYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT8": np.int8, "INT64": np.int64}


class HostMemory(bytes):
    @property
    def nbytes(self):
        return len(self)


@dataclass
class SimulatedBoard:
    """What the stand-in was asked (`events`, `configs`), and how it should misbehave."""

    cuda: SimulatedCuda = field(default_factory=SimulatedCuda)
    version: str = "10.3.0"
    plugin_answer: Any = None  # (op, attributes, inputs) → output; what the plugin library computes
    creators: tuple[str, ...] = ("VQLinear", "VQEmbedding")
    loads: bool = True
    dropped: tuple[str, ...] = ()  # layers that are in the network and not in the engine
    probes: tuple[str, ...] = ()  # what plugins say of types they are asked about
    fails: str = ""  # the network that no implementation is found for
    registered: bool = False  # the creators, by a library that was loaded
    events: list[str] = field(default_factory=list)
    configs: list[Config] = field(default_factory=list)
    graphs: dict[str, SimulatedGraph] = field(default_factory=dict)

    def module(self):
        module = simulated_module(self.graphs, self.cuda, self.version)
        module.Builder = lambda log: Builder(self, log)
        module.OnnxParser = Parser
        module.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
        module.ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
        module.MemoryPoolType = SimpleNamespace(WORKSPACE="workspace", TACTIC_DRAM="tactic")
        module.LayerInformationFormat = SimpleNamespace(JSON="json")
        module.IProgressMonitor = type("IProgressMonitor", (), {"__init__": lambda self: None})
        module.DataType = SimpleNamespace(**TYPES)
        module.PluginField = lambda name, value, kind: (name, weakref.ref(value))  # it points into the array
        module.PluginFieldType = SimpleNamespace(INT32="int32")
        module.PluginFieldCollection = list
        module.TensorRTPhase = SimpleNamespace(BUILD="build")
        module.get_plugin_registry = lambda: self
        runtime = module.Runtime
        module.Runtime = lambda log: InspectedRuntime(self, runtime(log))
        return module

    def load_library(self, path):
        self.events.append(f"load {Path(path).name}")
        if self.registered or not self.loads:  # as NvInferRuntimeCommon.h says of creators that are there already
            return None
        self.registered = True
        return object()

    def get_creator(self, name, version, namespace):
        assert (version, namespace) == ("1", "")
        if not self.registered or name not in self.creators:
            return None

        def create_plugin(case, fields, phase):
            return name, {key: int(number()[0]) for key, number in fields}

        return SimpleNamespace(create_plugin=create_plugin)


class InspectedRuntime:
    """The simulated runtime, and for graphs an engine that can only be inspected."""

    def __init__(self, board: SimulatedBoard, runtime: Runtime) -> None:
        self.board, self.runtime = board, runtime

    def deserialize_cuda_engine(self, content):
        name = bytes(content).decode()
        if name in self.board.graphs:
            return self.runtime.deserialize_cuda_engine(content)
        layers = [layer for layer in json.loads(name)["layers"] if layer not in self.board.dropped]
        inspector = SimpleNamespace(get_engine_information=lambda form: json.dumps({"Layers": layers}))
        return SimpleNamespace(num_io_tensors=0, create_engine_inspector=lambda: inspector)


class Builder:
    def __init__(self, board: SimulatedBoard, log) -> None:
        self.board, self.log = board, log

    def create_network(self, flags):
        assert flags == 1 << 1, "strongly typed"
        return Network(self.board)

    def create_builder_config(self):
        config = Config()
        self.board.configs.append(config)
        return config

    def create_optimization_profile(self):
        return SimpleNamespace(shapes={}, set_shape=lambda name, *shapes: None)

    def build_serialized_network(self, network, config):
        monitor = config.progress_monitor
        monitor.phase_start("tactics", None, 2)
        going = monitor.step_complete("tactics", 0)
        monitor.phase_finish("tactics")
        for text in self.board.probes:
            self.log.log(Logger.Severity.INFO, text)
        if network.name == self.board.fails:
            self.log.log(Logger.Severity.ERROR, "no implementation")
        if not going or network.name == self.board.fails:
            return None
        config.cache.content += b"+" + network.name.encode()
        self.board.events.append(f"build {network.name}")
        if network.name == "selftest":
            self.board.graphs["selftest"] = network.graph()
            return HostMemory(b"selftest")
        return HostMemory(json.dumps({"layers": [layer.name for layer in network.layers]}).encode())


class Config:
    def __init__(self) -> None:
        self.pools, self.profiles, self.cache = {}, [], SimpleNamespace(content=b"")
        self.offered: list[bytes] = []

    def set_memory_pool_limit(self, pool, limit):
        self.pools[pool] = limit

    def add_optimization_profile(self, profile):
        self.profiles.append(profile)

    def create_timing_cache(self, content):
        self.offered.append(content)
        return SimpleNamespace(content=content)

    def set_timing_cache(self, cache, ignore_mismatch):
        assert not ignore_mismatch
        if cache.content.startswith(b"other device"):
            return False
        self.cache = cache
        return True

    def get_timing_cache(self):
        return SimpleNamespace(serialize=lambda: HostMemory(self.cache.content))


class Network:
    """A parsed file of layers, or the self-test's nodes."""

    def __init__(self, board: SimulatedBoard) -> None:
        self.board, self.name, self.layers = board, "selftest", []
        self.inputs: dict[str, tuple] = {}
        self.nodes: list[tuple] = []

    num_inputs = 0

    @property
    def num_layers(self):
        return len(self.layers)

    def get_layer(self, index):
        return self.layers[index]

    def add_input(self, name, dtype, shape):
        self.inputs[name] = (np.dtype(dtype), tuple(shape))
        return name

    def add_plugin_v3(self, inputs, shape_inputs, plugin):
        output = SimpleNamespace(name="")
        self.nodes.append((*plugin, inputs, output))
        return SimpleNamespace(get_output=lambda index: output)

    def mark_output(self, output):
        pass

    def graph(self) -> SimulatedGraph:
        def compute(feeds):
            return {
                output.name: self.board.plugin_answer(op, fields, [feeds[name] for name in names])
                for op, fields, names, output in self.nodes
            }

        outputs = {output.name: (np.dtype(np.float32), (-1,)) for *_, output in self.nodes}
        return SimulatedGraph(self.inputs, outputs, (), compute)


class Parser:
    """Reads {"plugins": [...], "others": [...]} for an ONNX file."""

    def __init__(self, network: Network, log) -> None:
        self.network = network

    def parse_from_file(self, path):
        data = json.loads(Path(path).read_text())
        self.network.name = Path(path).stem
        named = [*((name, "LayerType.PLUGIN_V3") for name in data["plugins"])]
        named += [(name, "LayerType.CAST") for name in data["others"]]
        self.network.layers = [SimpleNamespace(name=name, type=kind) for name, kind in named]
        return True


__all__ = ["Logger", "SimulatedBoard"]
