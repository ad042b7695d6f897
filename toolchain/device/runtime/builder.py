"""One engine from one graph: parser, profiles, memory pools, timing cache, progress; the same for both backends."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from toolchain.device.runtime.interrupts import held_interrupts
from toolchain.errors import BudgetError, EnvironmentMismatch, InputDataError, UnsupportedError
from toolchain.values import SILENT, Progress

Shapes = Mapping[str, Sequence[Sequence[int]]]  # input → [smallest, usual, largest] shape
MIB = 2**20
PLUGIN_SAYS = "mgvq: "  # plugins/tensorrt/log.cpp
MOST_REFUSALS = 5  # of types, shown where a build fails


@dataclass(frozen=True)
class BuiltNetwork:
    """What came of one graph: the plan's size, layers of the network, and the names of its plugin layers."""

    bytes: int
    seconds: float
    layers: int
    plugin_layers: tuple[str, ...]


@dataclass
class MemoryWatch:
    """Stops a build before memory runs out: `available()` gives bytes, None where that is not known.

    A board that runs out of memory freezes or reboots, and says nothing.
    """

    available: Callable[[], int | None]
    floor_bytes: int
    lowest_bytes: int | None = field(default=None, init=False)

    def is_low(self) -> bool:
        """Look once; true below the floor."""
        found = self.available()
        if found is None:
            return False
        self.lowest_bytes = found if self.lowest_bytes is None else min(self.lowest_bytes, found)
        return found < self.floor_bytes


@dataclass(frozen=True)
class BuilderOptions:
    """How engines are built.

    Args:
        capability: SM of the GPU to build for, such as "86", where the builder can choose; None builds for its own.
        pools: MemoryPoolType's name → limit in bytes.
        level: the builder's optimization level, 0 to 5; its own default if None.
        timing_cache: content of a cache to start from, b"" for an empty one; None for builders that use none.
    """

    capability: str | None = None
    pools: Mapping[str, int] = field(default_factory=dict)
    level: int | None = None
    timing_cache: bytes | None = None


class Builder:
    """A builder of one backend, with everything its logger said."""

    def __init__(
        self,
        trt: ModuleType,
        backend: str,
        options: BuilderOptions,
        watch: MemoryWatch | None = None,
        progress: Progress = SILENT,
    ) -> None:
        self.trt, self.backend, self.options, self.watch, self.progress = trt, backend, options, watch, progress
        self.log = collecting_logger(trt)
        try:
            self.builder = trt.Builder(self.log)
        except TypeError:  # how the bindings say that the library gave back no builder
            raise EnvironmentMismatch(
                f"{backend} cannot start a builder: {self.log.last()}; run it on a machine with a GPU"
            ) from None
        self._capability = self._compute_capability(options.capability) if options.capability else None
        self.timing_cache = options.timing_cache

    @property
    def warnings(self) -> list[str]:
        """Each warning once, in the order they came."""
        return list(dict.fromkeys(self.log.warnings))

    def build(
        self,
        name: str,
        path: Path,
        profiles: Sequence[Shapes],
        out: Path,
        check: Callable[[Sequence[str]], None] | None = None,
    ) -> BuiltNetwork:
        """Parse one graph and build it, with one optimization profile for each of `profiles`; the plan goes to `out`.

        `check` is given the names of the plugin layers before the build, which it may refuse.

        Raises:
            InputDataError: the parser or the builder refuses the graph, or a profile does not suit its inputs.
            BudgetError: memory ran low and the build was stopped.
        """
        started = time.perf_counter()
        network = self.empty_network()
        with held_interrupts():
            self._parse(name, path, network)
        layers = [network.get_layer(i) for i in range(network.num_layers)]
        plugins = tuple(layer.name for layer in layers if str(layer.type).rpartition(".")[2].startswith("PLUGIN"))
        if check is not None:
            check(plugins)
        self._check_profiles(name, network, profiles)
        plan = self.build_network(name, network, profiles)
        out.write_bytes(memoryview(plan))
        return BuiltNetwork(plan.nbytes, round(time.perf_counter() - started, 3), len(layers), plugins)

    def empty_network(self) -> Any:
        """A strongly typed network without layers."""
        typed = getattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # gone where it is the only way
        return self.builder.create_network(0 if typed is None else 1 << int(typed))

    def build_network(self, name: str, network: Any, profiles: Sequence[Shapes] = ()) -> Any:
        """The serialized plan of a network, as the library's host memory. Ctrl-C stops it after the step under way."""
        already = len(self.log.errors)
        self.log.refusals.clear()
        with held_interrupts() as is_interrupted:
            config = self._config(name, network, profiles, is_interrupted)
            plan = self.builder.build_serialized_network(network, config)
        if plan is None and self.watch is not None and self.watch.is_low():
            raise BudgetError(
                f"graph {name}: the build was stopped when available memory fell below "
                f"{self.watch.floor_bytes / MIB:,.0f} MiB; stop the desktop and other programs, lower --level, or make "
                "the bundle again with a smaller plan.image or plan.context"
            )
        if plan is None:
            refused = list(dict.fromkeys(self.log.refusals))[:MOST_REFUSALS]
            said = "; ".join([*(self.log.errors[already:] or [self.log.last()]), *refused])
            raise InputDataError(f"graph {name}: {self.backend} parsed it and could not build it: {said}")
        if self.timing_cache is not None:
            self.timing_cache = bytes(memoryview(config.get_timing_cache().serialize()))
        return plan

    def _config(self, name: str, network: Any, profiles: Sequence[Shapes], is_interrupted: Callable[[], bool]) -> Any:
        config = self.builder.create_builder_config()
        # Names of layers carry module paths, which profiles report and the plugin count looks for.
        config.profiling_verbosity = self.trt.ProfilingVerbosity.DETAILED
        if self._capability is not None:
            config.num_compute_capabilities = 1
            config.set_compute_capability(self._capability, 0)
        for pool, limit in self.options.pools.items():
            config.set_memory_pool_limit(getattr(self.trt.MemoryPoolType, pool), limit)
        if self.options.level is not None:
            config.builder_optimization_level = self.options.level
        if self.timing_cache is not None:
            # A cache of another device or version is refused by the library, not used: a new one takes its place.
            for content in (self.timing_cache, b""):
                if config.set_timing_cache(config.create_timing_cache(content), ignore_mismatch=False):
                    break
        for shapes in profiles:
            profile = self.builder.create_optimization_profile()
            for each, three in shapes.items():
                profile.set_shape(each, *(tuple(shape) for shape in three))
            config.add_optimization_profile(profile)

        def goes_on() -> bool:
            return not is_interrupted() and (self.watch is None or not self.watch.is_low())

        config.progress_monitor = _progress_monitor(self.trt, name, self.progress, goes_on)
        return config

    def _parse(self, name: str, path: Path, network: Any) -> None:
        """Fill `network` from one ONNX file; the parser finds external data beside it."""
        parser = self.trt.OnnxParser(network, self.log)
        if parser.parse_from_file(os.fspath(path.resolve())):
            return
        messages = [_parser_message(parser.get_error(i)) for i in range(parser.num_errors)]
        said = "; ".join(messages) or self.log.last()
        raise InputDataError(
            f"graph {name} ({path.name}): {self.backend} does not accept it: {said}; export it again with this mgvq"
        )

    def _check_profiles(self, name: str, network: Any, profiles: Sequence[Shapes]) -> None:
        inputs = {network.get_input(i).name: tuple(network.get_input(i).shape) for i in range(network.num_inputs)}
        free = {each for each, shape in inputs.items() if -1 in shape}
        for shapes in profiles or [{}]:
            if missing := sorted(free - set(shapes)):
                raise InputDataError(
                    f"graph {name}: inputs {missing} have free dimensions and no shapes; give [smallest, usual, "
                    "largest] for them in processor/host.json"
                )
            if unknown := sorted(set(shapes) - set(inputs)):
                raise InputDataError(
                    f"graph {name}: shapes of {unknown} in processor/host.json belong to no input; it has "
                    f"{sorted(inputs)}: make the bundle again"
                )
            for each, three in shapes.items():
                check_shapes(name, each, three, inputs[each])

    def _compute_capability(self, sm: str) -> Any:
        known = {key.removeprefix("SM") for key in vars(self.trt.ComputeCapability) if key.startswith("SM")}
        if sm not in known:
            offered = ", ".join(sorted(known, key=int))
            raise UnsupportedError(
                f"{self.backend} does not build for SM {sm}; it offers {offered} (a Jetson's engines are built on it)"
            )
        return getattr(self.trt.ComputeCapability, f"SM{sm}")


def check_shapes(graph: str, name: str, shapes: Sequence[Sequence[int]], declared: tuple[int, ...]) -> None:
    """Refuse [smallest, usual, largest] that break the graph's own shape (-1 is free) or fall.

    Raises:
        InputDataError: they do.
    """
    where = f"graph {graph}: shapes of input {name}"
    if len(shapes) != 3 or any(len(shape) != len(declared) for shape in shapes):
        raise InputDataError(
            f"{where}: expected [smallest, usual, largest] of {len(declared)} dimensions, found {list(shapes)}"
        )
    for place, size in enumerate(declared):
        low, usual, high = (shape[place] for shape in shapes)
        if not low <= usual <= high or (size != -1 and {low, usual, high} != {size}):
            wanted = "sizes that do not fall" if size == -1 else f"{size} three times"
            raise InputDataError(f"{where}: dimension {place}: expected {wanted}, found {low}, {usual}, {high}")


def _parser_message(error: Any) -> str:
    """One parser error with the node it is about."""
    node = error.node_name() or f"number {error.node()}"
    text = " ".join(str(error.desc()).split())
    return f"node {node} ({error.node_operator()}): {text}"


def collecting_logger(trt: ModuleType) -> Any:
    """A TensorRT logger that keeps errors and warnings, and what our plugins do not take, and prints nothing.

    TensorRT probes a plugin with types that are not the network's: each refusal is of interest only if none is taken.
    """
    severity = trt.ILogger.Severity

    class CollectingLogger(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.refusals: list[str] = []

        def log(self, level: Any, text: str) -> None:
            if level in (severity.ERROR, severity.INTERNAL_ERROR):
                self.errors.append(text.strip())
            elif level == severity.WARNING:
                self.warnings.append(text.strip())
            elif text.startswith(PLUGIN_SAYS) and level == severity.INFO:
                self.refusals.append(text.strip())

        def last(self) -> str:
            return self.errors[-1] if self.errors else "it gave no reason"

    return CollectingLogger()


def _progress_monitor(trt: ModuleType, graph: str, progress: Progress, goes_on: Callable[[], bool]) -> Any:
    """An IProgressMonitor that reports every step of every phase, and stops the build when it is not to go on."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            progress.step(0, num_steps, f"{graph}: {phase_name}")

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress.step(step + 1, self.steps[phase_name], f"{graph}: {phase_name}")
            return goes_on()

        def phase_finish(self, phase_name: str) -> None:
            steps = self.steps.pop(phase_name)
            progress.step(steps, steps, f"{graph}: {phase_name}")

    return Monitor()
