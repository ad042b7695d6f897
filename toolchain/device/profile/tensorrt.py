"""TensorRT's layer times, gathered call by call; the same for tensorrt and tensorrt_rtx.

TensorRT reports layers to an `IProfiler` after each execution, one call of `report_layer_time` a layer. It has no
notion of which execution that was, so the runtime says when a call begins (`LayerCollector.begin`).
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from toolchain.bundle.manifest import Bundle
from toolchain.device.families.base import Host
from toolchain.device.generation.engine_graphs import SIDECAR, EngineRunner
from toolchain.device.generation.generate import Runner
from toolchain.device.profile.layers import LayerTime, origins_from_inspector
from toolchain.device.profile.measure import GraphCall
from toolchain.device.runtime.backends import load_backend
from toolchain.device.runtime.cuda import Cuda
from toolchain.device.runtime.loaded_engines import LoadedEngine, checked_build, load_engines
from toolchain.errors import EnvironmentMismatch

Origins = Mapping[str, Mapping[str, tuple[str, ...]]]  # engine → layer → ONNX nodes: engines generate equal names


class LayerCollector:
    """Graph calls with their layers, in order, whoever reports them."""

    def __init__(self) -> None:
        self.calls: list[GraphCall] = []
        self._layers: list[list[LayerTime]] = []
        self._open: str | None = None

    def begin(self, graph: str) -> None:
        """A call of `graph` starts; layers reported from now on are its.

        Raises:
            RuntimeError: the call before has not ended.
        """
        if self._open is not None:
            raise RuntimeError(f"a call of {graph} begins while one of {self._open} has not ended")
        self._open = graph
        self._layers.append([])

    def end(self, ms: float) -> None:
        """The call is over and took `ms` milliseconds.

        Raises:
            RuntimeError: none has begun.
        """
        if self._open is None:
            raise RuntimeError("a graph call ends that has not begun")
        self.calls.append(GraphCall(self._open, ms))
        self._open = None

    def report(self, layer: str, ms: float) -> None:
        """A layer of the call that is under way, or of the last one where it is reported late.

        Raises:
            RuntimeError: there was no call yet.
        """
        if not self._layers:
            raise RuntimeError(f"layer {layer} was reported before any graph was called")
        self._layers[-1].append(LayerTime(layer, float(ms)))

    def layers(self) -> list[list[LayerTime]]:
        """As `profile.Recording.layers`.

        Raises:
            EnvironmentMismatch: some calls of a graph reported layers and others none.
        """
        counts: dict[str, set[bool]] = {}
        for call, layers in zip(self.calls, self._layers):
            counts.setdefault(call.graph, set()).add(bool(layers))
        for graph, seen in counts.items():
            if len(seen) > 1:
                raise EnvironmentMismatch(
                    f"graph {graph}: TensorRT reported layers for some of its calls and not for others; profile "
                    "without CUDA graphs, which it does not see into"
                )
        return [list(layers) for layers in self._layers]


def profiler_for(trt: ModuleType, collector: LayerCollector) -> Any:
    """An `IProfiler` of this TensorRT that reports to `collector`; give it to `context.profiler`, keep a reference."""

    class Profiler(trt.IProfiler):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            collector.report(layer_name, ms)

    return Profiler()


class EngineBackend:
    """The engines that `mgvq build` made from a bundle."""

    uses_gpu = True

    def __init__(self, bundle: Bundle, engines: Path, backend: str, host: Host) -> None:
        """`backend` is tensorrt or tensorrt_rtx.

        Raises:
            EnvironmentMismatch, UnsupportedError: as `load_backend`.
        """
        self.name = backend
        self._trt = load_backend(backend)
        self._bundle, self._engines, self._host = bundle, engines, host

    def describe(self) -> dict[str, Any]:
        return {self.name: self._trt.__version__, "engines": self._engines.name}

    def open(self, capacity: int, layers: bool) -> EngineRecording:
        """A recording over freshly loaded engines; nothing stays on the device where it cannot be had.

        Raises:
            EnvironmentMismatch, InputDataError, BudgetError: as `open_runner` of the runtime.
        """
        checked_build(self._trt, self._engines, self.name, self._bundle)
        collector, cuda = LayerCollector(), OwnedCuda()
        loaded = load_engines(self._trt, self._engines, self.name, self._bundle)
        weights = self._bundle.path(SIDECAR) if self.name == "tensorrt" else None
        settings, watch = self._host.settings["decoder"], collector if layers else None
        try:
            runner = EngineRunner(loaded, cuda, settings, self._host.axes, capacity, weights, watch)
            if not layers:
                return EngineRecording(runner, collector, cuda, None)
            profiler = profiler_for(self._trt, collector)
            for context in runner.contexts.values():
                context.native.profiler = profiler
            origins = {name: _origins(engine) for name, engine in loaded.items()}
        except BaseException:
            with suppress(EnvironmentMismatch):  # of a device that is broken: the first error is the reason
                cuda.release()
            raise
        return EngineRecording(runner, collector, cuda, profiler, origins)


def _origins(engine: LoadedEngine) -> dict[str, tuple[str, ...]]:
    """Layer → nodes of one engine; none for engines built without layer details, whose names may say it themselves."""
    try:
        return origins_from_inspector(engine.layer_information())
    except ValueError:
        return {}


class OwnedCuda(Cuda):
    """A device whose memory can be given back at once: two passes follow each other on boards without room for both."""

    def __init__(self, bindings: Any = None) -> None:
        super().__init__(bindings)
        self._owned: list[int] = []

    def allocate(self, size: int, what: str) -> int:
        self._owned.append(super().allocate(size, what))
        return self._owned[-1]

    def release(self) -> None:
        """Free all that was allocated; nothing that uses it may be called any more."""
        self.synchronize()
        while self._owned:
            self.free(self._owned.pop())


class EngineRecording:
    """A runner over engines. Without layers nothing is watched, and decode runs as CUDA graphs, as it does in use."""

    def __init__(
        self, runner: Runner, collector: LayerCollector, cuda: OwnedCuda, profiler: Any, origins: Origins | None = None
    ) -> None:
        """`origins` give layers their nodes; `profiler` is only kept, because TensorRT holds no reference to it."""
        self.runner = runner
        self._collector, self._cuda, self._profiler, self._origins = collector, cuda, profiler, origins or {}

    @property
    def calls(self) -> list[GraphCall]:
        return self._collector.calls

    def layers(self) -> list[list[LayerTime]]:
        """As `Recording.layers`; the device's memory is given back, also where layers are refused."""
        try:
            found = self._collector.layers()
        finally:
            del self.runner
            gc.collect()  # engines and contexts go before the memory they point to
            self._cuda.release()
        of_graph = [self._origins.get(call.graph, {}) for call in self.calls]
        return [
            [LayerTime(layer.name, layer.ms, origins.get(layer.name, ())) for layer in layers]
            for origins, layers in zip(of_graph, found)
        ]
