"""Engines from a bundle's graphs, with TensorRT on a board or TensorRT for RTX anywhere: one code path for both.

    tensorrt       graphs of device/ (plugin nodes); needs the board's GPU and the plugin library
    tensorrt_rtx   graphs of portable/ (function bodies); builds without a GPU, for SM86 unless told otherwise

Writes NAME.engine for every graph and build.json. A dense twin of a graph can be built beside it, for its size alone.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from toolchain.bundle import Bundle
from toolchain.errors import EnvironmentMismatch, InputDataError, UnsupportedError, UsageError
from toolchain.values import write_json

Shapes = Mapping[str, Sequence[Sequence[int]]]  # input → [smallest, usual, largest] shape
Profiles = Mapping[str, Shapes]  # graph → shapes
Progress = Callable[[str, str, int, int], None]  # (graph, phase, steps done, steps in all)


@dataclass(frozen=True)
class Backend:
    """A builder: its Python module, the bundle folder it reads, and the command that installs it."""

    module: str
    graphs: str
    install: str


BACKENDS = {
    "tensorrt": Backend(
        "tensorrt",
        "device",
        "run this on the board, whose JetPack carries it (sudo apt install nvidia-jetpack python3-libnvinfer), or use "
        "--backend tensorrt_rtx here",
    ),
    "tensorrt_rtx": Backend("tensorrt_rtx", "portable", "pip install tensorrt-rtx-cu13"),
}
DEFAULT_SM = "86"


@dataclass(frozen=True)
class BuiltEngine:
    """One engine. `dense_bytes` is the size of the same graph's engine with 16-bit weights, where asked for."""

    graph: str
    file: str
    bytes: int
    seconds: float
    layers: int
    dense_bytes: int | None = None


@dataclass(frozen=True)
class BuildReport:
    """What was built, with what, for which SM; this is build.json."""

    backend: str
    builder_version: str
    sm: str
    engines: tuple[BuiltEngine, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def build_engines(
    bundle: Bundle,
    out: Path,
    backend: str = "tensorrt",
    *,
    sm: str | None = None,
    profiles: Profiles | None = None,
    dense: Mapping[str, Path] | None = None,
    plugin_library: Path | None = None,
    progress: Progress | None = None,
) -> BuildReport:
    """Build every graph of an opened bundle into `out`; nothing is left there when one fails.

    Args:
        sm: compute capability for tensorrt_rtx such as "86"; tensorrt builds for the GPU it runs on and takes none.
        profiles: shapes of inputs with free dimensions; without it, those of processor/host.json.
        dense: graph name → ONNX file with dense weights (graph/dense.py makes them), built for its size.
        plugin_library: the shared object with the VQ plugins, for tensorrt.

    Raises:
        EnvironmentMismatch: the builder is not installed, has no GPU it needs, or cannot load the plugin.
        InputDataError: the bundle lacks graphs or shapes, or the builder refuses a graph; the message names the node.
        UnsupportedError, UsageError: unknown backend or SM; `out` is a file; an argument has no effect.
    """
    trt = load_backend(backend)
    graphs = {Path(name).stem: bundle.path(name) for name in bundle.names_under(BACKENDS[backend].graphs, ".onnx")}
    if not graphs:
        raise InputDataError(
            f"bundle {bundle.folder} has no graph in {BACKENDS[backend].graphs}/; make the bundle again"
        )
    _check_arguments(out, backend, sm, plugin_library, graphs, dense or {})
    shapes = profiles if profiles is not None else bundle_profiles(bundle)
    builder = Builder(trt, backend, sm or DEFAULT_SM, plugin_library, progress)
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        engines = []
        for name, path in graphs.items():
            engine = builder.build(name, path, shapes.get(name, {}), building / f"{name}.engine")
            if dense and name in dense:
                twin = builder.build(f"{name} (dense)", dense[name], shapes.get(name, {}), building / f"{name}.dense")
                (building / f"{name}.dense").unlink()
                engine = dataclasses.replace(engine, dense_bytes=twin.bytes)
            engines.append(engine)
        report = BuildReport(backend, trt.__version__, builder.sm, tuple(engines), tuple(builder.warnings))
        write_json(building / "build.json", report.to_json())
        out.mkdir(exist_ok=True)
        for path in sorted(building.iterdir()):
            os.replace(path, out / path.name)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return report


def load_backend(backend: str) -> ModuleType:
    """The builder's Python module.

    Raises:
        UnsupportedError: no such backend.
        EnvironmentMismatch: it is not installed, or its libraries do not load; the message says how to get it.
    """
    if backend not in BACKENDS:
        raise UnsupportedError(f"backend {backend!r} is not known; use one of {', '.join(BACKENDS)}")
    wanted = BACKENDS[backend]
    try:
        module = importlib.import_module(wanted.module)
    except ModuleNotFoundError:
        raise EnvironmentMismatch(
            f"backend {backend} needs the Python module {wanted.module}, found none; {wanted.install}"
        ) from None
    except (ImportError, OSError, RuntimeError) as error:
        raise EnvironmentMismatch(f"Python module {wanted.module} does not load ({error}); {wanted.install}") from None
    if not hasattr(module, "Builder"):
        raise EnvironmentMismatch(
            f"Python module {wanted.module} has no Builder: the package is a redirect; {wanted.install}"
        )
    return module


def bundle_profiles(bundle: Bundle) -> Profiles:
    """The shapes processor/host.json gives under "profiles" (graph → input → three shapes); empty without any."""
    if "processor/host.json" not in bundle.files:
        return {}
    found = bundle.read_json("processor/host.json").get("profiles", {})
    return found.get("graphs", found)


def _check_arguments(
    out: Path,
    backend: str,
    sm: str | None,
    plugin_library: Path | None,
    graphs: dict[str, Path],
    dense: Mapping[str, Path],
) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"output {out} is a file; choose a folder for the engines")
    if backend == "tensorrt" and sm is not None:
        raise UsageError("an SM can be chosen with backend tensorrt_rtx only; tensorrt builds for the GPU it runs on")
    if backend == "tensorrt_rtx" and plugin_library is not None:
        raise UsageError("backend tensorrt_rtx has no plugins; leave the plugin library out")
    if unknown := sorted(set(dense) - set(graphs)):
        raise UsageError(f"dense graphs {unknown} have no counterpart; the bundle has {sorted(graphs)}")


class Builder:
    """A builder of one backend for one SM, with everything its logger said."""

    def __init__(
        self, trt: ModuleType, backend: str, sm: str, plugin_library: Path | None, progress: Progress | None
    ) -> None:
        self.trt, self.backend, self.progress = trt, backend, progress
        self.log = _collecting_logger(trt)
        if plugin_library is not None:
            self._load_plugins(plugin_library)
        try:
            self.builder = trt.Builder(self.log)
        except TypeError:  # how the bindings say that the library gave back no builder
            raise EnvironmentMismatch(
                f"{backend} cannot start a builder: {self.log.last()}; run it on a machine with a GPU"
            ) from None
        self.sm = sm if backend == "tensorrt_rtx" else "the builder's own GPU"
        self._capability = self._compute_capability(sm) if backend == "tensorrt_rtx" else None

    @property
    def warnings(self) -> list[str]:
        """Each warning once, in the order they came."""
        return list(dict.fromkeys(self.log.warnings))

    def build(self, name: str, path: Path, shapes: Shapes, out: Path) -> BuiltEngine:
        """Parse one graph and build it; the engine is written to `out`."""
        started = time.perf_counter()
        network = self._parse(name, path)
        config = self.builder.create_builder_config()
        if self._capability is not None:
            config.num_compute_capabilities = 1
            config.set_compute_capability(self._capability, 0)
        self._add_profile(name, network, config, shapes)
        if self.progress is not None:
            config.progress_monitor = _progress_monitor(self.trt, name, self.progress)
        layers, already = network.num_layers, len(self.log.errors)
        plan = self.builder.build_serialized_network(network, config)
        if plan is None:
            said = "; ".join(self.log.errors[already:]) or self.log.last()
            raise InputDataError(f"graph {name} ({path.name}): {self.backend} parsed it and could not build it: {said}")
        out.write_bytes(memoryview(plan))
        return BuiltEngine(name, out.name, plan.nbytes, round(time.perf_counter() - started, 3), layers)

    def _parse(self, name: str, path: Path) -> Any:
        """The network of one ONNX file; the parser finds external data beside it."""
        typed = getattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # gone where it is the only way
        network = self.builder.create_network(0 if typed is None else 1 << int(typed))
        parser = self.trt.OnnxParser(network, self.log)
        if parser.parse_from_file(os.fspath(path.resolve())):
            return network
        messages = [_parser_message(parser.get_error(i)) for i in range(parser.num_errors)]
        said = "; ".join(messages) or self.log.last()
        raise InputDataError(
            f"graph {name} ({path.name}): {self.backend} does not accept it: {said}; export it again with this mgvq"
        )

    def _add_profile(self, name: str, network: Any, config: Any, shapes: Shapes) -> None:
        inputs = {network.get_input(i).name: tuple(network.get_input(i).shape) for i in range(network.num_inputs)}
        free = {each for each, shape in inputs.items() if -1 in shape}
        if missing := sorted(free - set(shapes)):
            raise InputDataError(
                f"graph {name}: inputs {missing} have free dimensions and no shapes; give [smallest, usual, largest] "
                "for them in processor/host.json"
            )
        if not free:
            return
        profile = self.builder.create_optimization_profile()
        for each in sorted(free):
            low, usual, high = _three_shapes(name, each, shapes[each], inputs[each])
            profile.set_shape(each, low, usual, high)
        config.add_optimization_profile(profile)

    def _compute_capability(self, sm: str) -> Any:
        known = {key.removeprefix("SM") for key in vars(self.trt.ComputeCapability) if key.startswith("SM")}
        if sm not in known:
            offered = ", ".join(sorted(known, key=int))
            raise UnsupportedError(
                f"{self.backend} does not build for SM {sm}; it offers {offered} (a Jetson's engines are built on it)"
            )
        return getattr(self.trt.ComputeCapability, f"SM{sm}")

    def _load_plugins(self, library: Path) -> None:
        """Load the plugin library and register its creators in the empty namespace."""
        if not library.is_file():
            raise InputDataError(f"plugin library {library} does not exist; build it from the bundle's plugin source")
        registry = self.trt.get_plugin_registry()
        if registry.load_library(os.fspath(library.resolve())) is None:
            raise EnvironmentMismatch(
                f"plugin library {library} does not load ({self.log.last()}); build it against this TensorRT"
            )


def _three_shapes(
    graph: str, name: str, shapes: Sequence[Sequence[int]], declared: tuple[int, ...]
) -> list[tuple[int, ...]]:
    """[smallest, usual, largest], checked against the graph's own shape (-1 is free) and against each other."""
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
    return [tuple(shape) for shape in shapes]


def _parser_message(error: Any) -> str:
    """One parser error with the node it is about."""
    node = error.node_name() or f"number {error.node()}"
    text = " ".join(str(error.desc()).split())
    return f"node {node} ({error.node_operator()}): {text}"


def _collecting_logger(trt: ModuleType) -> Any:
    """A TensorRT logger that keeps errors and warnings and prints nothing."""
    severity = trt.ILogger.Severity

    class CollectingLogger(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, level: Any, text: str) -> None:
            if level in (severity.ERROR, severity.INTERNAL_ERROR):
                self.errors.append(text.strip())
            elif level == severity.WARNING:
                self.warnings.append(text.strip())

        def last(self) -> str:
            return self.errors[-1] if self.errors else "it gave no reason"

    return CollectingLogger()


def _progress_monitor(trt: ModuleType, graph: str, progress: Progress) -> Any:
    """An IProgressMonitor that reports every step of every phase and lets the build go on."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            progress(graph, phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress(graph, phase_name, step + 1, self.steps[phase_name])
            return True

        def phase_finish(self, phase_name: str) -> None:
            progress(graph, phase_name, self.steps[phase_name], self.steps.pop(phase_name))

    return Monitor()
