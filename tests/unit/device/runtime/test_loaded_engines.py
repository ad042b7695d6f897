"""Engines load only where they belong: version, bundle and bytes are checked before the device sees them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from simulated_cuda import SimulatedCuda
from simulated_tensorrt import Logger, SimulatedGraph, simulated_module

from toolchain.bundle.manifest import write_bundle
from toolchain.device.generation import engine_graphs as runtime
from toolchain.device.profile import tensorrt as profile_tensorrt
from toolchain.device.runtime import loaded_engines
from toolchain.device.runtime.loaded_engines import LoadedEngine, load_engines
from toolchain.errors import EnvironmentMismatch, InputDataError
from toolchain.files.folders import sha256_file

FLOAT = np.dtype(np.float32)


def doubled(feeds):
    return {"y": 2 * feeds["x"]}


GRAPH = SimulatedGraph({"x": (FLOAT, (-1, 4))}, {"y": (FLOAT, (-1, 4))}, [{"x": [[1, 4], [2, 4], [8, 4]]}], doubled)


@pytest.fixture
def bundle(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    return write_bundle({"x.json": tmp_path / "x.json"}, tmp_path / "bundle")


@pytest.fixture
def engines(tmp_path, bundle):
    """`engines(**changes)`: a folder of one engine with its build.json."""
    folder = tmp_path / "engines"
    folder.mkdir()
    (folder / "double.engine").write_bytes(b"double")

    def make(**changes):
        entry = {"graph": "double", "file": "double.engine", "sha256": sha256_file(folder / "double.engine")}
        record = {"backend": "tensorrt", "builder_version": "10.3.0", "bundle": bundle.manifest["manifest_sha256"]}
        (folder / "build.json").write_text(json.dumps(record | {"engines": [entry]} | changes))
        return folder

    return make


@pytest.fixture
def trt():
    return simulated_module({"double": GRAPH}, SimulatedCuda())


def test_what_an_engine_has(trt, engines, bundle):
    found = load_engines(trt, engines(), "tensorrt", bundle)["double"]
    assert {name: (t.dtype, t.shape, t.is_input) for name, t in found.tensors.items()} == {
        "x": (FLOAT, (-1, 4), True),
        "y": (FLOAT, (-1, 4), False),
    }
    assert (found.profiles, found.memory_bytes, found.largest_shape("x")) == (1, 4096, (8, 4))


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"builder_version": "10.7.0"}, EnvironmentMismatch, "built with tensorrt 10.7.0, found tensorrt 10.3.0"),
        ({"backend": "tensorrt_rtx"}, EnvironmentMismatch, "built with tensorrt_rtx 10.3.0, found tensorrt 10.3.0"),
        ({"bundle": "0" * 64}, InputDataError, "were built from another bundle than"),
    ],
)
def test_engines_of_another_build_are_refused(trt, engines, bundle, changes, kind, words):
    with pytest.raises(kind, match=words):
        load_engines(trt, engines(**changes), "tensorrt", bundle)


def test_engines_that_are_not_the_bundles_are_refused_before_a_gpu_is_asked_for(trt, engines, bundle, monkeypatch):
    def no_gpu():
        raise EnvironmentMismatch("CUDA does not start")

    folder = engines(bundle="0" * 64)
    host = SimpleNamespace(settings={"decoder": {}}, axes=1)
    for module, cuda in ((runtime, "Cuda"), (profile_tensorrt, "OwnedCuda")):
        monkeypatch.setattr(module, "load_backend", lambda name: trt)
        monkeypatch.setattr(module, cuda, no_gpu)
    for given, words in ((folder, "were built from another bundle"), (folder.parent, "found none; run `mgvq build`")):
        with pytest.raises(InputDataError, match=words):
            runtime.open_runner(bundle, given, "tensorrt", host, 8)
        with pytest.raises(InputDataError, match=words):
            profile_tensorrt.EngineBackend(bundle, given, "tensorrt", host).open(8, layers=False)
    engines()
    with pytest.raises(EnvironmentMismatch, match="CUDA does not start"):
        runtime.open_runner(bundle, folder, "tensorrt", host, 8)


def test_a_changed_or_missing_file_is_refused(trt, engines, bundle):
    folder = engines()
    (folder / "double.engine").write_bytes(b"doublf")
    with pytest.raises(InputDataError, match=r"double.engine: expected hash"):
        load_engines(trt, folder, "tensorrt", bundle)
    (folder / "double.engine").unlink()
    with pytest.raises(InputDataError, match=r"double.engine is missing; run `mgvq build` again"):
        load_engines(trt, folder, "tensorrt", bundle)


def test_a_folder_without_or_with_a_damaged_record_is_refused(trt, tmp_path, engines, bundle):
    with pytest.raises(InputDataError, match=r"expected a folder of engines with build.json, found none"):
        load_engines(trt, tmp_path, "tensorrt", bundle)
    folder = engines()
    (folder / "build.json").write_text("{")
    with pytest.raises(InputDataError, match="is damaged"):
        load_engines(trt, folder, "tensorrt", bundle)
    for text, words in (('{"backend": "tensorrt", "engines": []}', "lacks builder_version, bundle:"), ("[]", "lacks ")):
        (folder / "build.json").write_text(text)
        with pytest.raises(InputDataError, match=words):
            load_engines(trt, folder, "tensorrt", bundle)


def test_the_plugin_library_is_checked_and_loaded_first(trt, engines, bundle, monkeypatch):
    loaded = []
    monkeypatch.setattr(loaded_engines, "load_into", lambda trt, log, path: loaded.append(path.name))
    folder = engines(plugin={"file": "p.so", "sha256": "0"})
    (folder / "p.so").write_text("library")
    with pytest.raises(InputDataError, match=r"p.so: expected hash 0"):
        load_engines(trt, folder, "tensorrt", bundle)
    engines(plugin={"file": "p.so", "sha256": sha256_file(folder / "p.so")})
    load_engines(trt, folder, "tensorrt", bundle)
    assert loaded == ["p.so"]


def test_a_plan_that_the_library_refuses_names_the_engine(trt, engines, bundle):
    folder = engines()
    (folder / "double.engine").write_bytes(b"older")
    engines()
    with pytest.raises(EnvironmentMismatch, match=r"engine double does not load \(older: magic number mismatch\)"):
        load_engines(trt, folder, "tensorrt", bundle)


def test_a_shape_outside_the_profile_names_the_largest():
    cuda, log = SimulatedCuda(), Logger()
    log.last = lambda: "it gave no reason"
    trt = simulated_module({"double": GRAPH}, cuda)
    engine = LoadedEngine(trt, trt.Runtime(log), "double", b"double", log)
    _, pointer = cuda.cudaMalloc(4096)
    context = engine.context(77, 0, pointer, 4096)
    context.bind("x", pointer, (8, 4))
    assert context.output_shape("y") == (8, 4)
    with pytest.raises(InputDataError, match=r"x of shape \(9, 4\) is refused .* is \(8, 4\)"):
        context.bind("x", pointer, (9, 4))
