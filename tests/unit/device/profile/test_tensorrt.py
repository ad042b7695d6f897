"""TensorRT's layer times, call by call. No engine runs: reports are made by hand, the profiler class is real."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from toolchain.device.profile import tensorrt as profile_tensorrt
from toolchain.device.profile.layers import LayerTime
from toolchain.device.profile.measure import GraphCall, PhaseRun, tallies_of
from toolchain.device.profile.tensorrt import EngineBackend, EngineRecording, LayerCollector, OwnedCuda, profiler_for
from toolchain.errors import EnvironmentMismatch


class PlainProfiler:
    """What `IProfiler` is to Python: a base class with a constructor."""


def collected(collector: LayerCollector) -> list:
    return list(zip(collector.calls, collector.layers()))


def test_layers_go_to_the_call_under_way():
    collector = LayerCollector()
    profiler = profiler_for(SimpleNamespace(IProfiler=PlainProfiler), collector)
    for graph, layers, ms in (("embed", [("e", 0.5)], 0.7), ("decoder", [("a", 1), ("b", 2.0)], 3.5)):
        collector.begin(graph)
        for name, each in layers:
            profiler.report_layer_time(name, each)
        collector.end(ms)
    assert collected(collector) == [
        (GraphCall("embed", 0.7), [LayerTime("e", 0.5)]),
        (GraphCall("decoder", 3.5), [LayerTime("a", 1.0), LayerTime("b", 2.0)]),
    ]


def test_a_layer_reported_late_belongs_to_the_last_call():
    collector = LayerCollector()
    collector.begin("vision")
    collector.end(1.0)
    collector.report("late", 0.25)
    assert collected(collector) == [(GraphCall("vision", 1.0), [LayerTime("late", 0.25)])]


def test_calls_that_overlap_or_never_began_are_refused():
    collector = LayerCollector()
    with pytest.raises(RuntimeError, match="has not begun"):
        collector.end(1.0)
    with pytest.raises(RuntimeError, match="before any graph"):
        collector.report("a", 1.0)
    collector.begin("embed")
    with pytest.raises(RuntimeError, match="embed has not ended"):
        collector.begin("decoder")


def test_a_graph_whose_layers_are_sometimes_missing_is_refused():
    collector = LayerCollector()
    for step in range(2):
        collector.begin("decoder")
        if step == 0:
            collector.report("a", 1.0)
        collector.end(1.0)
    with pytest.raises(EnvironmentMismatch, match="without CUDA graphs"):
        collector.layers()


class FakeBindings:
    """A recorded fake of CUDA's bindings: what is allocated and not freed."""

    def __init__(self) -> None:
        self.live: dict[int, int] = {}
        self.synchronizes = True
        self._next = 256

    def cudaStreamCreate(self):
        return 0, 1

    def cudaStreamSynchronize(self, stream):
        return (0 if self.synchronizes else 719,)

    def cudaError_t(self, status):
        return status

    def cudaGetErrorString(self, status):
        return 0, b"unspecified launch failure"

    def cudaMalloc(self, size):
        self._next += 4096
        self.live[self._next] = size
        return 0, self._next

    def cudaFree(self, pointer):
        del self.live[pointer]
        return (0,)


def test_a_recording_gives_its_memory_back_when_it_is_over():
    bindings = FakeBindings()
    cuda = OwnedCuda(bindings)
    pointers = [cuda.allocate(size, "test") for size in (10, 20)]
    assert bindings.live == dict(zip(pointers, (10, 20)))
    collector = LayerCollector()
    collector.begin("vision")
    collector.end(1.0)
    recording = EngineRecording(SimpleNamespace(), collector, cuda, None)
    assert recording.layers() == [[]]
    assert bindings.live == {}


def test_a_recording_that_refuses_its_layers_gives_its_memory_back_too():
    bindings, collector = FakeBindings(), LayerCollector()
    cuda = OwnedCuda(bindings)
    cuda.allocate(10, "test")
    for step in range(2):
        collector.begin("decoder")
        if step == 0:
            collector.report("a", 1.0)
        collector.end(1.0)
    with pytest.raises(EnvironmentMismatch, match="without CUDA graphs"):
        EngineRecording(SimpleNamespace(), collector, cuda, None).layers()
    assert bindings.live == {}


GENERATED = "__myl_Fc_myl0_3"  # what TensorRT calls a fusion, in every engine anew


def described(node: str) -> str:
    """The engine inspector's JSON of an engine with one fusion, which stands for a node."""
    return json.dumps({"Layers": [{"Name": GENERATED, "Metadata": f"[ONNX Layer: {node}]"}]})


@pytest.fixture
def opened(monkeypatch):
    """`opened(information, bindings)`: an `EngineBackend` over engines of which only their description is real."""

    class Runner:
        def __init__(self, engines, cuda, decoder, axes, capacity, weights, watch) -> None:
            cuda.allocate(10, "keys and values")
            self.watch = watch
            self.contexts = {n: SimpleNamespace(engine=e, native=SimpleNamespace()) for n, e in engines.items()}

        def call(self, graph: str) -> None:
            self.watch.begin(graph)
            self.contexts[graph].native.profiler.report_layer_time(GENERATED, 1.0)
            self.watch.end(1.5)

    def make(information, bindings) -> EngineBackend:
        engines = {n: SimpleNamespace(name=n, layer_information=f) for n, f in information.items()}
        trt = SimpleNamespace(__version__="10.3.0", IProfiler=PlainProfiler)
        monkeypatch.setattr(profile_tensorrt, "load_backend", lambda name: trt)
        monkeypatch.setattr(profile_tensorrt, "checked_build", lambda *_: {})
        monkeypatch.setattr(profile_tensorrt, "load_engines", lambda *_: engines)
        monkeypatch.setattr(profile_tensorrt, "OwnedCuda", lambda: OwnedCuda(bindings))
        monkeypatch.setattr(profile_tensorrt, "EngineRunner", Runner)
        host = SimpleNamespace(settings={"decoder": {}}, axes=1)
        return EngineBackend(SimpleNamespace(), Path("engines"), "tensorrt_rtx", host)

    return make


def test_a_name_that_two_engines_generate_is_each_ones_own(opened):
    nodes = {"vision": "model.visual.blocks.0.mlp/Gelu_0", "decoder": "model.layers.0.self_attn/Softmax_0"}
    backend = opened({name: lambda node=node: described(node) for name, node in nodes.items()}, FakeBindings())
    recording = backend.open(8, layers=True)
    for graph in nodes:
        recording.runner.call(graph)
    found = tallies_of(recording, [PhaseRun("vision", 2.0, [0]), PhaseRun("decode", 2.0, [1])])
    parts = {phase: [row.name for row in tally.by_part] for phase, tally in found.items()}
    assert parts == {
        "vision": ["vision mlp", "unattributed", "host"],
        "decode": ["attention", "unattributed", "host"],
    }


def test_engines_that_cannot_be_described_are_closed_and_the_reason_is_theirs(opened):
    def fails() -> str:
        raise EnvironmentMismatch("the inspector is not there")

    bindings = FakeBindings()
    with pytest.raises(EnvironmentMismatch, match="the inspector is not there"):
        opened({"vision": fails}, bindings).open(8, layers=True)
    assert bindings.live == {}
    bindings.synchronizes = False  # what failed broke the device, too: that is no better reason
    with pytest.raises(EnvironmentMismatch, match="the inspector is not there"):
        opened({"vision": fails}, bindings).open(8, layers=True)


def test_engines_built_without_details_are_recorded_by_name(opened):
    recording = opened({"vision": lambda: "no JSON"}, FakeBindings()).open(8, layers=True)
    recording.runner.call("vision")
    assert recording.layers() == [[LayerTime(GENERATED, 1.0)]]


@pytest.mark.rtx
@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs TensorRT for RTX")
def test_the_profiler_is_one_to_the_real_bindings():
    import tensorrt_rtx as trt

    collector = LayerCollector()
    profiler = profiler_for(trt, collector)
    assert isinstance(profiler, trt.IProfiler)
    collector.begin("vision")
    profiler.report_layer_time("a", 1.5)
    collector.end(2.0)
    assert collected(collector) == [(GraphCall("vision", 2.0), [LayerTime("a", 1.5)])]
