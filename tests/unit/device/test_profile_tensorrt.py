"""TensorRT's layer times, call by call. No engine runs: reports are made by hand, the profiler class is real."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest

from toolchain.device.profile import GraphCall
from toolchain.device.profile_layers import LayerTime
from toolchain.device.profile_tensorrt import EngineRecording, LayerCollector, OwnedCuda, profiler_for
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
        self._next = 256

    def cudaStreamCreate(self):
        return 0, 1

    def cudaStreamSynchronize(self, stream):
        return (0,)

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
