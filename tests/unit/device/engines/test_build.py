"""Engine builds: refusals without any builder, and real builds with TensorRT for RTX."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import onnx
import pytest
from heard_progress import Heard
from onnx import TensorProto, helper, numpy_helper

from toolchain.bundle.manifest import open_bundle, write_bundle
from toolchain.device.engines import build as engine
from toolchain.device.engines.build import BuildOptions, Machine
from toolchain.device.runtime import backends
from toolchain.device.runtime.board import Memory
from toolchain.device.runtime.builder import Builder, BuilderOptions, check_shapes
from toolchain.errors import BudgetError, EnvironmentMismatch, InputDataError, UnsupportedError, UsageError
from toolchain.files.folders import sha256_file
from toolchain.graph.dense import dense_graph
from toolchain.graph.op import vq_op
from toolchain.graph.op.bodies import function_bodies
from toolchain.values import VQCode

SHAPES = {"decoder": {"x": [[0, 128], [2, 128], [8, 128]]}}


PLAIN = VQCode(4, 8, 8)


def linear_model(code: VQCode = PLAIN, rows: int = 256, columns: int = 128) -> onnx.ModelProto:
    """y = VQLinear(x) with a function body, x of free length."""
    rng = np.random.default_rng(0)
    symbols = rng.integers(0, 1 << code.shift, (*code.chunk_shape(rows, columns), 16)).astype(np.uint8)
    weights = [
        numpy_helper.from_array(symbols, "w.codes"),
        numpy_helper.from_array(rng.integers(-99, 99, (code.entries, code.vector)).astype(np.float32), "t0"),
        numpy_helper.from_array(rng.random(rows).astype(np.float32), "w.scales"),
    ]
    node = helper.make_node(
        vq_op.body_name(vq_op.LINEAR, code),
        ["x", "w.codes", "t0", "w.scales"],
        ["y"],
        domain=vq_op.DOMAIN,
        name="layer.0",
        **vq_op.code_attributes(code, rows, columns),
    )
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["s", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["s", rows])],
        weights,
    )
    opsets = [helper.make_opsetid("", vq_op.ONNX_OPSET), helper.make_opsetid(vq_op.DOMAIN, 1)]
    functions = function_bodies([(vq_op.LINEAR, code, False)])
    return helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)


def make_bundle(folder: Path, model: onnx.ModelProto, profiles: dict | None = None):
    """An opened bundle with one portable graph, external data beside it, and shapes in host.json."""
    source = folder / "source"
    (source / "portable").mkdir(parents=True)
    onnx.save(
        model,
        source / "portable" / "decoder.onnx",
        save_as_external_data=True,
        location="decoder.onnx.data",
        size_threshold=64,
    )
    (source / "host.json").write_text(json.dumps({"profiles": {"graphs": SHAPES if profiles is None else profiles}}))
    pieces = {"portable": source / "portable", "processor/host.json": source / "host.json"}
    write_bundle(pieces, folder / "bundle")
    return open_bundle(folder / "bundle")


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path, linear_model())


def without(monkeypatch, name: str) -> None:
    """Make a module impossible to import."""
    monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize(
    ("backend", "words"), [("tensorrt_rtx", "pip install tensorrt-rtx-cu13"), ("tensorrt", "run this on the board")]
)
def test_a_builder_that_is_missing_is_exit_6_with_the_way_to_get_it(bundle, tmp_path, monkeypatch, backend, words):
    without(monkeypatch, backend)
    with pytest.raises(EnvironmentMismatch, match=words) as caught:
        engine.build_engines(bundle, tmp_path / "engines", backend)
    assert caught.value.exit_code == 6
    assert not (tmp_path / "engines").exists()


def test_a_redirecting_package_is_not_a_builder(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("tensorrt"))
    with pytest.raises(EnvironmentMismatch, match="has no Builder"):
        backends.load_backend("tensorrt")


def test_a_library_that_does_not_load_is_exit_6(monkeypatch):
    def broken(name):
        raise OSError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(backends.importlib, "import_module", broken)
    with pytest.raises(EnvironmentMismatch, match=r"does not load \(libnvinfer"):
        backends.load_backend("tensorrt")


def test_a_builder_that_finds_no_gpu_is_exit_6_with_what_the_library_said(bundle, tmp_path, monkeypatch):
    class Logger:
        class Severity:
            INTERNAL_ERROR, ERROR, WARNING = range(3)

    def no_builder(log):
        log.log(Logger.Severity.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("factory function returned nullptr")

    fake = types.ModuleType("tensorrt_rtx")
    fake.ILogger, fake.Builder, fake.__version__ = Logger, no_builder, "1.7"
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake)
    with pytest.raises(EnvironmentMismatch, match="CUDA initialization failure with error: 35; run it on"):
        engine.build_engines(bundle, tmp_path / "engines", "tensorrt_rtx")
    assert not (tmp_path / "engines").exists()


def test_unknown_backend():
    with pytest.raises(UnsupportedError, match="use one of tensorrt, tensorrt_rtx"):
        backends.load_backend("openvino")


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([[1, 128], [2, 128]], "expected .smallest, usual, largest. of 2 dimensions"),
        ([[4, 128], [2, 128], [8, 128]], "expected sizes that do not fall"),
        ([[1, 128], [2, 128], [8, 64]], "dimension 1: expected 128 three times"),
    ],
)
def test_wrong_shapes_are_named(shapes, message):
    with pytest.raises(InputDataError, match=message):
        check_shapes("decoder", "x", shapes, (-1, 128))


def test_all_of_the_device_half_imports_without_torch_or_onnx():
    """Every module there, in a process where they, onnxruntime, TensorRT and CUDA's bindings cannot be imported."""
    code = """
import importlib, pkgutil, sys
for name in ("torch", "onnx", "transformers", "onnxruntime", "onnx_graphsurgeon", "tensorrt", "tensorrt_rtx", "cuda"):
    sys.modules[name] = None
import toolchain.device
found = [each.name for each in pkgutil.walk_packages(toolchain.device.__path__, "toolchain.device.")]
found += ["toolchain." + name for name in ("bundle.manifest", "run.board_kit", "plan.target", "run.doctor", "cli.app")]
for name in found:
    importlib.import_module(name)
print(len(found))
"""
    root = Path(__file__).parents[4]
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) > 20


class TestWithRtx:
    """Real builds for SM86, no GPU needed."""

    pytestmark = pytest.mark.rtx

    @pytest.fixture(autouse=True)
    def _builder(self):
        pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX (pip install tensorrt-rtx-cu13)")

    @pytest.mark.parametrize("code", ["4,8,8", "2,4,8"])
    def test_a_graph_with_function_bodies_builds(self, tmp_path, code):
        bundle = make_bundle(tmp_path, linear_model(VQCode.parse(code)))
        heard = Heard()
        report = engine.build_engines(bundle, tmp_path / "e", "tensorrt_rtx", progress=heard)
        built = report.engines[0]
        assert (report.sm, built.graph, built.file) == ("86", "decoder", "decoder.engine")
        assert (tmp_path / "e" / "decoder.engine").stat().st_size == built.bytes > 0
        assert built.layers > 0
        assert built.seconds > 0
        assert {what.partition(":")[0] for _, _, what in heard.steps} == {"decoder"}
        assert all(0 <= done <= total for done, total, _ in heard.steps)
        assert json.loads((tmp_path / "e" / "build.json").read_text()) == json.loads(json.dumps(report.to_json()))
        assert report.builder_version == importlib.import_module("tensorrt_rtx").__version__

    def test_ctrl_c_stops_a_build_although_the_library_swallows_what_callbacks_raise(self, bundle, tmp_path):
        class Interrupts(Heard):
            def step(self, done, total, what=""):
                super().step(done, total, what)
                if len(self.steps) == 1:
                    signal.raise_signal(signal.SIGINT)

        heard = Interrupts()
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
        try:
            with pytest.raises(KeyboardInterrupt):
                engine.build_engines(bundle, tmp_path / "engines", "tensorrt_rtx", progress=heard)
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        finally:
            signal.signal(signal.SIGINT, before)
        assert heard.steps
        assert not (tmp_path / "engines").exists()

    def test_dense_twin_is_built_for_its_size_alone(self, tmp_path):
        """A layer of 1024x1024: symbols widened to int32 are one byte a weight, the dense twin two."""
        bundle = make_bundle(tmp_path, linear_model(rows=1024, columns=1024), {"decoder": {"x": [[1, 1024]] * 3}})
        twin = dense_graph(bundle.path("portable/decoder.onnx"), tmp_path / "dense.onnx")
        report = engine.build_engines(bundle, tmp_path / "e", "tensorrt_rtx", BuildOptions(dense={"decoder": twin}))
        built = report.engines[0]
        assert built.bytes < built.dense_bytes
        assert built.dense_bytes > 2 * 1024 * 1024
        assert sorted(path.name for path in (tmp_path / "e").iterdir()) == ["build.json", "decoder.engine"]

    def test_other_sm_and_unknown_sm(self, bundle, tmp_path):
        assert engine.build_engines(bundle, tmp_path / "e", "tensorrt_rtx", BuildOptions(sm="120")).sm == "120"
        with pytest.raises(UnsupportedError, match="does not build for SM 87; it offers 75, 80, 86"):
            engine.build_engines(bundle, tmp_path / "f", "tensorrt_rtx", BuildOptions(sm="87"))

    def test_a_refused_node_is_named_and_nothing_is_left(self, tmp_path):
        model = linear_model()
        del model.functions[:]
        bundle = make_bundle(tmp_path, model)
        with pytest.raises(InputDataError, match=r"graph decoder .* node layer.0 \(VQLinear\)"):
            engine.build_engines(bundle, tmp_path / "e", "tensorrt_rtx")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "source"]

    def test_free_dimensions_without_shapes_are_named(self, tmp_path):
        bundle = make_bundle(tmp_path, linear_model(), {})
        with pytest.raises(InputDataError, match=r"inputs \['x'\] have free dimensions"):
            engine.build_engines(bundle, tmp_path / "e", "tensorrt_rtx")
        built = engine.build_engines(bundle, tmp_path / "e", "tensorrt_rtx", profiles=SHAPES).engines
        assert len(built) == 1

    def test_shapes_of_an_input_that_is_not_there_are_named(self, tmp_path):
        bundle = make_bundle(tmp_path, linear_model(), {"decoder": SHAPES["decoder"] | {"z": [[1]] * 3}})
        with pytest.raises(InputDataError, match=r"shapes of \['z'\] .* belong to no input; it has \['x'\]"):
            engine.build_engines(bundle, tmp_path / "e", "tensorrt_rtx")

    def test_a_graph_with_two_profiles_is_one_engine(self, tmp_path):
        bundle = make_bundle(tmp_path, linear_model(), SHAPES | {"decoder.decode": {"x": [[1, 128]] * 3}})
        report = engine.build_engines(bundle, tmp_path / "e", "tensorrt_rtx")
        assert [(each.graph, each.profiles) for each in report.engines] == [("decoder", 2)]

    def test_the_report_says_what_and_from_what(self, bundle, tmp_path):
        report = engine.build_engines(bundle, tmp_path / "e", "tensorrt_rtx", BuildOptions(level=1))
        assert report.bundle == bundle.manifest["manifest_sha256"]
        assert report.engines[0].sha256 == sha256_file(tmp_path / "e" / "decoder.engine")
        assert "no memory plan: whether the build fits was not checked" in " ".join(report.warnings)

    def test_a_build_stops_before_memory_runs_out(self, bundle, tmp_path):
        low = Machine(memory=lambda: Memory(100 << 20, None, None))
        with pytest.raises(BudgetError, match="stopped when available memory fell below 256 MiB") as caught:
            engine.build_engines(bundle, tmp_path / "e", "tensorrt_rtx", machine=low)
        assert caught.value.exit_code == 5
        assert not (tmp_path / "e").exists()

    def test_memory_pools_reach_the_builder(self):
        trt = importlib.import_module("tensorrt_rtx")
        builder = Builder(trt, "tensorrt_rtx", BuilderOptions("86", {"WORKSPACE": 1 << 28, "TACTIC_DRAM": 1 << 29}))
        config = builder._config("g", None, (), lambda: False)
        assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 1 << 28
        assert config.get_memory_pool_limit(trt.MemoryPoolType.TACTIC_DRAM) == 1 << 29

    def test_arguments_without_effect_are_refused(self, bundle, tmp_path):
        with pytest.raises(UsageError, match="has no plugins"):
            engine.build_engines(bundle, tmp_path / "e", "tensorrt_rtx", BuildOptions(plugin_library=tmp_path / "x.so"))
        with pytest.raises(UsageError, match="no counterpart"):
            engine.build_engines(
                bundle, tmp_path / "e", "tensorrt_rtx", BuildOptions(dense={"other": tmp_path / "x.onnx"})
            )
        (tmp_path / "file").write_text("")
        with pytest.raises(UsageError, match="is a file"):
            engine.build_engines(bundle, tmp_path / "file", "tensorrt_rtx")

    def test_a_bundle_without_graphs(self, tmp_path):
        (tmp_path / "x.json").write_text("{}")
        empty = write_bundle({"x.json": tmp_path / "x.json"}, tmp_path / "b")
        with pytest.raises(InputDataError, match="has no graph in portable/"):
            engine.build_engines(empty, tmp_path / "e", "tensorrt_rtx")
