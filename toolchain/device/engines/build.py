"""All engines of a bundle, with TensorRT on a board or TensorRT for RTX anywhere: one code path for both.

    tensorrt       graphs of device/ (plugin nodes); needs the board's GPU and the plugin library
    tensorrt_rtx   graphs of portable/ (function bodies); builds without a GPU, for SM86 unless told otherwise

Before any work: the release (exit 6), memory (5), the plugin library and its self-test (6, 4). Then NAME.engine for
every graph, on a board compared with the model's stored answers (4), the plugin library, the timing cache and
build.json, all of them or none.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from toolchain.bundle.manifest import Bundle
from toolchain.device.engines.build_report import BuildReport, BuiltEngine
from toolchain.device.engines.checks import (
    FLOOR_BYTES,
    check_memory,
    check_release,
    inspection_warnings,
    read_plan,
    vq_nodes,
)
from toolchain.device.engines.engine_check import has_calls
from toolchain.device.runtime.backends import BACKENDS, DEFAULT_SM, backend_named, load_backend
from toolchain.device.runtime.board import Board, Memory, read_board, read_memory
from toolchain.device.runtime.builder import Builder, BuilderOptions, MemoryWatch, Shapes
from toolchain.errors import EnvironmentMismatch, InputDataError, UsageError
from toolchain.files.folders import check_place, sha256_file, write_json
from toolchain.values import SILENT, Progress

Profiles = Mapping[str, Shapes]  # graph, or graph.second-profile → shapes


@dataclass(frozen=True)
class Machine:
    """Where a build finds out what it runs on."""

    board: Callable[[], Board] = read_board
    memory: Callable[[], Memory | None] = read_memory

    def available_bytes(self) -> int | None:
        found = self.memory()
        return found.available_bytes if found else None


@dataclass(frozen=True)
class BuildOptions:
    """What a caller may choose.

    Args:
        sm: compute capability for tensorrt_rtx such as "86"; tensorrt builds for the GPU it runs on and takes none.
        plugin_library: the shared object with the VQ plugins, for tensorrt; the bundle's, or compiled here, if None.
        level: the builder's optimization level, 0 to 5: lower takes less memory and time, and may run slower.
        ignore_memory: build although the memory plan says that it does not fit; build.json says so.
        check: compare the engines of a board with the calls that the bundle stores; build.json says so if not.
        dense: graph name → ONNX file with dense weights (graph/dense.py makes them), built for its size.
    """

    sm: str | None = None
    plugin_library: Path | None = None
    level: int | None = None
    ignore_memory: bool = False
    check: bool = True
    dense: Mapping[str, Path] = field(default_factory=dict)


def build_engines(
    bundle: Bundle,
    out: Path,
    backend: str = "tensorrt",
    options: BuildOptions | None = None,
    *,
    profiles: Profiles | None = None,
    machine: Machine | None = None,
    progress: Progress = SILENT,
) -> BuildReport:
    """Build every graph of an opened bundle into `out`; nothing is left there when one fails.

    Args:
        profiles: shapes of inputs with free dimensions; without it, those of processor/host.json.
        machine: what this runs on; the real one if None.
        progress: told of every step of a graph, and of what begins.

    Raises:
        EnvironmentMismatch: the builder is not installed, the board is not the target's, or the plugin does not load.
        BudgetError: the memory plan says that it will not fit, or memory ran low.
        NumericGateError: the plugin fails its self-test, or an engine is off from the stored calls.
        InputDataError: the bundle lacks graphs or shapes, or the builder refuses a graph; the message names the node.
        UnsupportedError, UsageError: unknown backend or SM; `out` is a file; an argument has no effect.
    """
    options, machine = options or BuildOptions(), machine or Machine()
    check_arguments(out, backend, options)
    trt = load_backend(backend)
    graphs = bundle_graphs(bundle, backend)
    if unknown := sorted(set(options.dense) - set(graphs)):
        raise UsageError(f"dense graphs {unknown} have no counterpart; the bundle has {sorted(graphs)}")
    build = _Build(trt, bundle, backend, options, machine, progress)
    shapes = profiles if profiles is not None else bundle_profiles(bundle)
    with _new_folder(out) as building:
        builder = build.prepared_builder(out, building)
        engines = tuple(
            build.engine(builder, name, path, profiles_of(name, shapes), building) for name, path in graphs.items()
        )
        report = build.report(builder, engines, building)
        log = builder.log  # one for the process: TensorRT keeps the first that it was given
        del builder  # engines and their weights need the memory it holds
        report = build.checked(report, building, log)
        write_json(building / "build.json", report.to_json())
    return report


def bundle_graphs(bundle: Bundle, backend: str) -> dict[str, Path]:
    """Graph → ONNX file of the form that a backend builds.

    Raises:
        UnsupportedError: no such backend.
        InputDataError: the bundle has none.
    """
    folder = backend_named(backend).graphs
    graphs = {Path(name).stem: bundle.path(name) for name in bundle.names_under(folder, ".onnx")}
    if not graphs:
        raise InputDataError(f"bundle {bundle.folder} has no graph in {folder}/; make the bundle again")
    return graphs


def bundle_profiles(bundle: Bundle) -> Profiles:
    """The shapes processor/host.json gives under "profiles" (graph → input → three shapes); empty without any."""
    if "processor/host.json" not in bundle.files:
        return {}
    found = bundle.read_json("processor/host.json").get("profiles", {})
    return found.get("graphs", found)


def profiles_of(graph: str, profiles: Profiles) -> list[Shapes]:
    """A graph's profiles in order: its own name first, then GRAPH.SECOND and so on."""
    return [shapes for name, shapes in profiles.items() if name == graph or name.startswith(f"{graph}.")]


def pools_from_target(target: Mapping[str, Any] | None, memory: Memory | None) -> dict[str, int]:
    """MemoryPoolType → limit for a board.

    A tactic whose scratch is larger than the largest block to be had cannot run, so the workspace ends there (the
    kernel's contiguous pool as it is now, else the target's default). For trying tactics, half of what is usable: the
    rest is the builder's own copies and the system. The target's own `workspace_bytes`, `tactic_dram_bytes` win.
    """
    if target is None:
        return {}
    pool = memory.cma_total_bytes if memory else None
    workspace = target.get("workspace_bytes") or pool or target["largest_block_default_bytes"]
    tactics = target.get("tactic_dram_bytes") or target["memory_usable_bytes"] // 2
    return {"WORKSPACE": int(workspace), "TACTIC_DRAM": int(tactics)}


def check_arguments(out: Path, backend: str, options: BuildOptions) -> None:
    """Refuse arguments that contradict each other, before a bundle is opened or sent.

    Raises:
        UnsupportedError, UsageError: see `build_engines`.
    """
    backend_named(backend)
    check_place(out)
    if backend == "tensorrt" and options.sm is not None:
        raise UsageError("an SM can be chosen with backend tensorrt_rtx only; tensorrt builds for the GPU it runs on")
    if backend == "tensorrt_rtx" and options.plugin_library is not None:
        raise UsageError("backend tensorrt_rtx has no plugins; leave the plugin library out")
    if backend == "tensorrt_rtx" and not options.check:
        raise UsageError("backend tensorrt_rtx compares no engines, whose GPU need not be here; leave --no-check out")
    if options.level is not None and not 0 <= options.level <= 5:
        raise UsageError(f"optimization level {options.level}: expected 0 to 5")


class _Build:
    """One run of `build_engines`: what was found out on the way and goes into the report."""

    def __init__(
        self,
        trt: ModuleType,
        bundle: Bundle,
        backend: str,
        options: BuildOptions,
        machine: Machine,
        progress: Progress,
    ) -> None:
        """Every check that needs no builder.

        Raises:
            EnvironmentMismatch, BudgetError: one of them refuses.
        """
        self.trt, self.bundle, self.backend, self.options, self.progress = trt, bundle, backend, options, progress
        self.kind, target = BACKENDS[backend], bundle.manifest["target"]
        self.warnings: list[str] = []
        self.board = machine.board() if self.kind.is_on_board else None
        if self.board is not None:
            self.warnings += check_release(target, self.board, trt.__version__)
        memory = machine.memory()
        if options.ignore_memory:
            self.warnings.append("memory was not checked (--ignore-memory)")
        else:
            on_board = self.kind.is_on_board
            has_check = on_board and options.check and has_calls(bundle)
            self.warnings += check_memory(read_plan(bundle), memory, has_cma=on_board, has_check=has_check)
        self.pools = pools_from_target(target, memory) if self.kind.is_on_board else {}
        self.watch = MemoryWatch(machine.available_bytes, FLOOR_BYTES)
        self.expected = vq_nodes(bundle) if self.kind.is_on_board else None
        self.sm = self._compute_capability()
        self.plugin: dict[str, str] | None = None
        self.cases = 0
        self.cache_before = b""

    def prepared_builder(self, out: Path, building: Path) -> Builder:
        """A builder with its plugins loaded and proved, and the timing cache of an earlier build into `out`."""
        cache = out / self._cache_name()
        self.cache_before = cache.read_bytes() if cache.is_file() else b""
        settings = BuilderOptions(
            None if self.kind.is_on_board else self.sm,
            self.pools,
            self.options.level,
            self.cache_before if self.kind.is_on_board else None,
        )
        builder = Builder(self.trt, self.backend, settings, self.watch, self.progress)
        if self.kind.is_on_board:
            self._load_plugins(builder, out, building)
        return builder

    def engine(
        self, builder: Builder, name: str, path: Path, profiles: Sequence[Shapes], building: Path
    ) -> BuiltEngine:
        """One engine in the folder `building`, checked for its plugin nodes, and its dense twin's size if asked for."""
        self.progress.stage(f"  {name}: {path.name}")
        file = building / f"{name}.engine"
        built = builder.build(name, path, profiles, file, lambda plugins: self._check_plugin_layers(name, plugins))
        if self.expected is not None:
            self._inspect(name, built.plugin_layers, builder, file)
        dense = None
        if name in self.options.dense:
            twin = building / f"{name}.dense"
            dense = builder.build(f"{name} (dense)", self.options.dense[name], profiles, twin).bytes
            twin.unlink()
        return BuiltEngine(
            name, file.name, built.bytes, built.seconds, built.layers, sha256_file(file), len(built.plugin_layers),
            max(1, len(profiles)), dense,
        )  # fmt: skip

    def report(self, builder: Builder, engines: tuple[BuiltEngine, ...], building: Path) -> BuildReport:
        """build.json's content; the timing cache is written beside the engines."""
        timing = None
        if builder.timing_cache is not None:
            (building / self._cache_name()).write_bytes(builder.timing_cache)
            before, after = len(self.cache_before), len(builder.timing_cache)
            timing = {"file": self._cache_name(), "bytes_before": before, "bytes_after": after}
        return BuildReport(
            self.backend,
            self.trt.__version__,
            self.sm,
            self.bundle.manifest["manifest_sha256"],
            engines,
            (*self.warnings, *builder.warnings),
            dataclasses.asdict(self.board) if self.board else None,
            self.plugin,
            self.cases,
            self.pools,
            timing,
            self.watch.lowest_bytes,
        )

    def checked(self, report: BuildReport, building: Path, log: Any) -> BuildReport:
        """The report with what the stored calls say of the engines; for RTX, whose GPU need not be here, as it is.

        Raises:
            NumericGateError: an engine is off by more than its budget.
        """
        from toolchain.device.engines.engine_check import check_engines, summary
        from toolchain.device.runtime.cuda import Cuda
        from toolchain.device.runtime.loaded_engines import LoadedEngine

        if not self.kind.is_on_board:
            return report
        if not self.options.check or not has_calls(self.bundle):
            why = "--no-check" if not self.options.check else "the bundle stores no calls"
            return dataclasses.replace(report, warnings=(*report.warnings, f"engines were not compared: {why}"))
        self.progress.stage("  engines: compared with the stored answers of the model")
        runtime = self.trt.Runtime(log)
        engines = {
            e.graph: LoadedEngine(self.trt, runtime, e.graph, (building / e.file).read_bytes(), log)
            for e in report.engines
        }
        found = check_engines(self.bundle, engines, Cuda())
        found.require()
        return dataclasses.replace(report, check=summary(found))

    def _compute_capability(self) -> str:
        if self.board is None:
            return self.options.sm or DEFAULT_SM
        if self.board.gpu is None:
            raise EnvironmentMismatch("CUDA's driver finds no GPU; check the installation (mgvq doctor)")
        return self.board.gpu.sm

    def _cache_name(self) -> str:
        return f"timing-{self.backend}-{self.trt.__version__}-sm{self.sm}.cache"

    def _load_plugins(self, builder: Builder, out: Path, building: Path) -> None:
        from toolchain.device.runtime.cuda import Cuda
        from toolchain.device.runtime.plugin_library import Wanted, keep_compiled, load_into, prepare_library
        from toolchain.device.runtime.selftest import FILE, check_plugins, read_cases

        assert self.board is not None
        cuda = Cuda()  # refused before minutes of compiling
        wanted = Wanted(self.board.machine, self.sm, self.trt.__version__)
        library = prepare_library(self.bundle, self.options.plugin_library, wanted, out, building, self.progress)
        load_into(self.trt, builder.log, library.path)
        self.plugin = library.to_json()
        if FILE not in self.bundle.files:
            self.warnings.append(f"the bundle has no {FILE}: the plugins were not tested before the build")
            return
        cases = read_cases(self.bundle.path(FILE))
        self.progress.stage(f"  plugins: {len(cases)} self-test cases")
        check_plugins(self.trt, builder, cuda, cases)
        self.cases = len(cases)
        keep_compiled(library, out)

    def _check_plugin_layers(self, name: str, plugins: Sequence[str]) -> None:
        """Refuse a parsed graph in which a VQ node did not become the plugin, as where a function body won."""
        if self.expected is not None and (wanted := self.expected.get(name)) != len(plugins):
            raise EnvironmentMismatch(
                f"graph {name}: expected {wanted} plugin layers, one a VQ node, TensorRT {self.trt.__version__} made "
                f"{len(plugins)}; make the bundle again with this version of mgvq"
            )

    def _inspect(self, name: str, plugins: Sequence[str], builder: Builder, file: Path) -> None:
        """Warn of plugins that the engine does not name, and of tensors that it copies into another format."""
        from toolchain.device.runtime.loaded_engines import LoadedEngine

        runtime = self.trt.Runtime(builder.log)
        information = LoadedEngine(self.trt, runtime, name, file.read_bytes(), builder.log).layer_information()
        self.warnings += inspection_warnings(name, plugins, information)


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` whose files go there at the end, or nowhere."""
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield building
        out.mkdir(exist_ok=True)
        for path in sorted(building.iterdir()):
            os.replace(path, out / path.name)
    finally:
        shutil.rmtree(building, ignore_errors=True)
