"""A build on a board, as far as it can be shown without one: readers on fixtures, every refusal, and the order of steps
on a simulated builder (simulated_builder.py). The same code builds for real with TensorRT for RTX in test_engine.py.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from simulated_builder import SimulatedBoard
from simulated_cuda import SimulatedCuda, Status

from toolchain.bundle import open_bundle, write_bundle
from toolchain.device import board as boards
from toolchain.device import checks, engine, plugin_library, selftest
from toolchain.device.board import Board, Gpu, Memory
from toolchain.device.cuda import Cuda, load_bindings
from toolchain.device.engine import BuildOptions, Machine
from toolchain.device.plugin_library import Wanted
from toolchain.errors import BudgetError, EnvironmentMismatch, InputDataError, NumericGateError, UnsupportedError
from toolchain.target import load_target
from toolchain.values import CODES, sha256_file
from toolchain.vq import format as vq_format

MIB = 2**20
TARGET = load_target("orin-nano-8gb").to_json()
ORIN = Board("aarch64", "36.4.3", "6.2+b77", "12.6.68", Gpu("Orin", "87"))
ROOM = Memory(6000 * MIB, 256 * MIB, 200 * MIB)
PLAN = {"build_peak_bytes": 3000 * MIB, "largest_block_bytes": 100 * MIB, "largest_block": "logits"}
DPKG = """\
Package: nvidia-jetpack
Status: install ok installed
Architecture: arm64
Version: 6.2+b77

Package: libnvinfer10
Status: deinstall ok config-files
Version: 10.3.0.30-1+cuda12.5
"""
MEMINFO = "MemTotal:  7990000 kB\nMemAvailable:    6144000 kB\nCmaTotal:  262144 kB\nCmaFree:   131072 kB\n"


def place(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


class Driver:
    """libcuda of an Orin, or one whose call `fails`."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails

    def __getattr__(self, name):
        def call(*arguments):
            if name == self.fails:
                return 100
            if name == "cuDeviceGetName":
                arguments[0].value = b"Orin"
            if name == "cuDeviceGetAttribute":
                ctypes.cast(arguments[0], ctypes.POINTER(ctypes.c_int))[0] = {75: 8, 76: 7}[arguments[1]]
            return 0

        return call


class TestReaders:
    def test_a_jetsons_files(self, tmp_path):
        place(tmp_path, "etc/nv_tegra_release", "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n")
        place(tmp_path, "var/lib/dpkg/status", DPKG)
        place(tmp_path, "usr/local/cuda/version.json", '{"cuda": {"name": "CUDA SDK", "version": "12.6.68"}}')
        place(tmp_path, "proc/meminfo", MEMINFO)
        found = boards.read_board(tmp_path, load=lambda name: Driver())
        assert (found.l4t, found.jetpack, found.cuda, found.gpu) == ("36.4.3", "6.2+b77", "12.6.68", Gpu("Orin", "87"))
        assert boards.read_memory(tmp_path) == Memory(6000 * MIB, 256 * MIB, 128 * MIB)
        assert boards.package_version("libnvinfer10", tmp_path) is None, "removed, not installed"

    def test_a_machine_that_has_none_of_it(self, tmp_path):
        def no_driver(name):
            raise OSError(f"{name}: cannot open shared object file")

        found = boards.read_board(tmp_path, load=no_driver)
        assert (found.l4t, found.jetpack, found.cuda, found.gpu) == (None, None, None, None)
        assert boards.read_memory(tmp_path) is None
        place(tmp_path, "proc/meminfo", "MemAvailable:    1024 kB\n")
        assert boards.read_memory(tmp_path) == Memory(MIB, None, None)

    @pytest.mark.parametrize("call", ["cuInit", "cuDeviceGet", "cuDeviceGetAttribute"])
    def test_a_driver_that_fails_is_no_gpu(self, call):
        assert boards.gpu(lambda name: Driver(call)) is None

    def test_a_version_file_that_is_none(self, tmp_path):
        place(tmp_path, "usr/local/cuda/version.json", "[]")
        assert boards.cuda_version(tmp_path) is None


class TestRelease:
    def check(self, tensorrt="10.3.0", **changes):
        return checks.check_release(TARGET, Board(**{**vars(ORIN), **changes}), tensorrt)

    def test_both_releases_of_the_target_pass(self):
        assert self.check() == []
        assert self.check(l4t="36.5") == []
        assert self.check("10.16.1", l4t="38.2", cuda="13.2.0") == []

    @pytest.mark.parametrize(
        ("tensorrt", "changes", "words"),
        [
            ("8.6.2", {}, "TensorRT 8.6.2 is not 10.3"),
            ("10.7.0", {}, "TensorRT 10.7.0 is not 10.3"),
            ("10.3.0", {"cuda": "11.4.19"}, "CUDA 11.4.19 is not 12.6"),
            ("10.3.0", {"cuda": None}, r"CUDA \(none\) is not 12.6"),
            ("10.3.0", {"l4t": "35.4.1"}, "L4T 35.4.1 is not 36.4 or newer"),
            ("10.3.0", {"l4t": None}, "this is no Jetson"),
            ("10.3.0", {"gpu": Gpu("Thor", "110")}, "compute capability differs"),
            ("10.3.0", {"gpu": None}, "driver finds no GPU"),
        ],
    )
    def test_each_mismatch_says_needs_and_found(self, tensorrt, changes, words):
        with pytest.raises(EnvironmentMismatch, match=words) as caught:
            self.check(tensorrt, **changes)
        text = str(caught.value)
        assert "needs JetPack 6.2 (L4T 36.4, TensorRT 10.3, CUDA 12.6) or JetPack 7.2 (TensorRT 10.16" in text
        assert f"TensorRT {tensorrt}" in text.partition("found ")[2]
        assert caught.value.exit_code == 6

    def test_a_bundle_without_target_is_a_warning(self):
        assert "was not checked" in checks.check_release(None, ORIN, "10.3.0")[0]


class TestMemory:
    def test_room_for_all(self):
        assert checks.check_memory(PLAN, ROOM, has_cma=True) == []

    @pytest.mark.parametrize(
        ("plan", "memory", "words"),
        [
            (
                {},
                Memory(2999 * MIB, None, None),
                "building takes about 3,000 MiB, 2,999 MiB are available; stop the desk",
            ),
            ({"largest_block_bytes": 300 * MIB}, ROOM, r"contiguous pool is 256 MiB; add cma=375M to APPEND"),
            ({"largest_block_bytes": 220 * MIB}, ROOM, r"200 MiB of the kernel's contiguous pool of 256 MiB are free"),
        ],
    )
    def test_each_shortage_says_what_to_turn_down(self, plan, memory, words):
        with pytest.raises(BudgetError, match=words) as caught:
            checks.check_memory(PLAN | plan, memory, has_cma=True)
        assert caught.value.exit_code == 5

    def test_a_workstation_has_no_pool_to_exceed(self):
        assert checks.check_memory(PLAN | {"largest_block_bytes": 300 * MIB}, ROOM, has_cma=False) == []

    def test_what_is_not_known_is_a_warning(self):
        assert "no memory plan" in checks.check_memory(None, ROOM, has_cma=True)[0]
        assert "does not say" in checks.check_memory(PLAN, None, has_cma=True)[0]


def test_pools_end_at_the_largest_block_and_half_the_memory():
    pools = engine.pools_from_target(TARGET, ROOM)
    assert pools == {"WORKSPACE": 256 * MIB, "TACTIC_DRAM": TARGET["memory_usable_bytes"] // 2}
    without = engine.pools_from_target(TARGET, Memory(1, None, None))
    assert without["WORKSPACE"] == TARGET["largest_block_default_bytes"]
    assert engine.pools_from_target(TARGET | {"workspace_bytes": 7, "tactic_dram_bytes": 8}, ROOM) == {
        "WORKSPACE": 7,
        "TACTIC_DRAM": 8,
    }


def correct_plugin(op, fields, inputs):
    """What the format says (vq/format.py), from the arrays a plugin gets."""
    from toolchain.values import VQCode

    code = VQCode(fields["vector"], fields["shift"], fields["window"])
    rows, columns = fields["rows"], fields["columns"]
    packed = vq_format.checkpoint_from_device(inputs[1].view(np.uint8), code, rows, columns)
    weight = vq_format.decode(packed, inputs[2], inputs[3], code, rows, columns)
    return weight[inputs[0]] if op == "VQEmbedding" else inputs[0] @ weight.T + inputs[4]


def wrong_plugin(op, fields, inputs):
    answer = correct_plugin(op, fields, inputs)
    return answer if op == "VQEmbedding" or len(answer) != 5 else answer + np.float32(0.5)


@pytest.fixture
def pieces(tmp_path) -> dict[str, Path]:
    """A bundle's pieces for a board: graphs as simulated_builder reads them, plan, self-test, plugin sources."""
    source = tmp_path / "source"
    graphs = {"vision": ["a", "b"], "decoder": ["c"]}
    for name, plugins in graphs.items():
        place(source, f"device/{name}.onnx", json.dumps({"plugins": plugins, "others": ["cast"]}))
    report = {"graphs": [{"name": name, "vq_nodes": len(plugins)} for name, plugins in graphs.items()]}
    place(source, "device/rewrite.json", json.dumps(report))
    place(source, "memory.json", json.dumps(PLAN))
    place(source, "plugins/tensorrt/CMakeLists.txt", "# here\n")
    place(source, "plugins/CMakeLists.txt", "# here\n")
    profiles = {"decoder": {}, "decoder.decode": {}, "vision": {}}
    place(source, "host.json", json.dumps({"profiles": {"graphs": profiles}}))
    place(source, "given/libmgvq_plugin.so", "a library")
    selftest.write_cases([CODES["2,4,8"], CODES["4,8,8"]], source / selftest.FILE)
    names = ("device", "memory.json", "plugins", selftest.FILE)
    return {name: source / name for name in names} | {"processor/host.json": source / "host.json"}


@pytest.fixture
def bundle(pieces, tmp_path):
    write_bundle(pieces, tmp_path / "bundle", target=TARGET)
    return open_bundle(tmp_path / "bundle")


@pytest.fixture
def given(tmp_path, pieces) -> Path:
    return tmp_path / "source" / "given" / "libmgvq_plugin.so"


@pytest.fixture
def simulated(monkeypatch):
    """`simulated(...)`: install a simulated board as `tensorrt` and its CUDA, and give it back."""

    def install(**changes) -> SimulatedBoard:
        found = SimulatedBoard(**{"plugin_answer": correct_plugin, **changes})
        monkeypatch.setitem(sys.modules, "tensorrt", found.module())
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", found.cuda)
        return found

    return install


def build(bundle, out, given, machine=None, **more):
    machine = machine or Machine(board=lambda: ORIN, memory=lambda: ROOM)
    return engine.build_engines(bundle, out, "tensorrt", BuildOptions(plugin_library=given, **more), machine=machine)


class TestOrder:
    def test_self_test_first_then_engines_and_everything_is_written_down(self, simulated, bundle, given, tmp_path):
        board = simulated()
        report = build(bundle, tmp_path / "e", given)
        assert board.events == ["load libmgvq_plugin.so", "build selftest", "build decoder", "build vision"]
        written = json.loads((tmp_path / "e" / "build.json").read_text())
        assert written == json.loads(json.dumps(report.to_json()))
        assert written["plugin"] == {
            "file": "libmgvq_plugin.so", "sha256": sha256_file(given), "origin": "given",
        }  # fmt: skip
        assert (written["sm"], written["device"]["l4t"]) == ("87", "36.4.3")
        assert [(e["graph"], e["plugin_layers"], e["profiles"]) for e in written["engines"]] == [
            ("decoder", 1, 2),
            ("vision", 2, 1),
        ]
        assert written["selftest_cases"] == 8
        assert all(config.pools == {"workspace": 256 * MIB, "tactic": 3_400_000_000} for config in board.configs)
        names = ["build.json", "decoder.engine", "libmgvq_plugin.so", "timing-tensorrt-10.3.0-sm87.cache"]
        assert sorted(path.name for path in (tmp_path / "e").iterdir()) == [*names, "vision.engine"]
        assert not board.cuda.sizes.keys() - set(), "the self-test gave its memory back"

    def test_the_timing_cache_is_used_again_unless_it_is_another_devices(self, simulated, bundle, given, tmp_path):
        first = simulated()
        build(bundle, tmp_path / "e", given)
        cache = tmp_path / "e" / "timing-tensorrt-10.3.0-sm87.cache"
        assert cache.read_bytes() == b"+selftest+decoder+vision"
        second = simulated()
        report = build(bundle, tmp_path / "e", given)
        assert first.configs[0].offered == [b""]
        assert second.configs[0].offered == [b"+selftest+decoder+vision"]
        assert report.timing_cache["bytes_before"] == 24
        cache.write_bytes(b"other device's")
        third = simulated()
        build(bundle, tmp_path / "e", given)
        assert third.configs[0].offered == [b"other device's", b""]

    def test_checks_come_before_any_work(self, simulated, bundle, given, tmp_path):
        board = simulated()
        poor = Memory(MIB, None, None)
        both = Machine(board=lambda: Board(**{**vars(ORIN), "l4t": None}), memory=lambda: poor)
        with pytest.raises(EnvironmentMismatch, match="no Jetson"):  # before memory
            build(bundle, tmp_path / "e", given, both)
        with pytest.raises(BudgetError, match="building takes"):  # before plugins
            build(bundle, tmp_path / "e", None, Machine(board=lambda: ORIN, memory=lambda: poor))
        assert board.events == []
        assert not (tmp_path / "e").exists()

    def test_memory_may_be_ignored_and_build_json_says_so(self, simulated, bundle, given, tmp_path):
        simulated()
        tight = Machine(board=lambda: ORIN, memory=lambda: Memory(400 * MIB, None, None))
        report = build(bundle, tmp_path / "e", given, tight, ignore_memory=True)
        assert "memory was not checked (--ignore-memory)" in report.warnings
        assert report.lowest_available_bytes == 400 * MIB

    def test_a_flipped_byte_of_the_self_test_is_the_bundles_fault(self, pieces, tmp_path, bundle):
        path = bundle.path(selftest.FILE)
        path.write_bytes(path.read_bytes()[:-1] + b"\x07")
        with pytest.raises(InputDataError, match=r"selftest.safetensors: expected hash"):
            open_bundle(tmp_path / "bundle")


class TestPluginRefusals:
    def refused(self, kind, words, bundle, out, given, code):
        with pytest.raises(kind, match=words) as caught:
            build(bundle, out, given)
        assert caught.value.exit_code == code
        assert not out.exists()

    def test_a_library_that_does_not_load(self, simulated, bundle, given, tmp_path):
        simulated(loads=False)
        self.refused(EnvironmentMismatch, "does not load .*against this TensorRT", bundle, tmp_path / "e", given, 6)

    def test_a_library_without_our_creators(self, simulated, bundle, given, tmp_path):
        simulated(creators=("VQLinear",))
        words = "expected creators of VQEmbedding, version 1, empty namespace"
        self.refused(EnvironmentMismatch, words, bundle, tmp_path / "e", given, 6)

    def test_a_library_that_computes_something_else(self, simulated, bundle, given, tmp_path):
        board = simulated(plugin_answer=wrong_plugin)
        words = r"self-test VQLinear/2,4,8/5: the plugin gives .* expected .* \(1000 of 1000 differ\)"
        self.refused(NumericGateError, words, bundle, tmp_path / "e", given, 4)
        assert "build decoder" not in board.events

    def test_a_library_that_is_not_there(self, simulated, bundle, tmp_path):
        simulated()
        self.refused(InputDataError, "x.so does not exist", bundle, tmp_path / "e", tmp_path / "x.so", 7)

    def test_cuda_without_driver(self, simulated, bundle, given, tmp_path):
        simulated(cuda=SimulatedCuda(driver=Status.cudaErrorInsufficientDriver))
        words = "cudaStreamCreate: CUDA error 35 .cudaErrorInsufficientDriver"
        self.refused(EnvironmentMismatch, words, bundle, tmp_path / "e", given, 6)

    def test_a_body_that_won_the_parsers_choice(self, simulated, pieces, given, tmp_path):
        simulated()
        place(pieces["device"], "vision.onnx", json.dumps({"plugins": ["a"], "others": ["b/gather", "b/matmul"]}))
        bundle = write_bundle(pieces, tmp_path / "b", target=TARGET)
        words = "graph vision: expected 2 plugin layers, one a VQ node, TensorRT 10.3.0 made 1"
        self.refused(EnvironmentMismatch, words, bundle, tmp_path / "e", given, 6)

    def test_a_layer_that_is_not_in_the_engine(self, simulated, bundle, given, tmp_path):
        simulated(dropped=("b",))
        words = "graph vision: 1 of 2 plugin layers are not in the engine, the first b"
        self.refused(EnvironmentMismatch, words, bundle, tmp_path / "e", given, 6)

    def test_a_rewrite_report_that_is_none(self, simulated, pieces, given, tmp_path):
        simulated()
        place(pieces["device"], "rewrite.json", '{"graphs": [{}]}')
        bundle = write_bundle(pieces, tmp_path / "b", target=TARGET)
        self.refused(InputDataError, "expected name and vq_nodes of every graph", bundle, tmp_path / "e", given, 7)


class TestPluginLibrary:
    WANTED = Wanted("aarch64", "87", "10.3.0")

    def carried(self, pieces, tmp_path, entries):
        place(tmp_path, "libraries.json", json.dumps(entries))
        place(tmp_path, "carried.so", "carried")
        more = {"libraries/libraries.json": tmp_path / "libraries.json", "libraries/0/x.so": tmp_path / "carried.so"}
        return write_bundle(pieces | more, tmp_path / "b", target=TARGET)

    @pytest.mark.parametrize(
        ("change", "fits"),
        [({}, True), ({"machine": "x86_64"}, False), ({"sm": ["110"]}, False), ({"tensorrt": "10.13"}, False)],
    )
    def test_a_carried_library_is_taken_only_where_it_fits(self, pieces, tmp_path, change, fits):
        entry = {"file": "libraries/0/x.so", "machine": "aarch64", "sm": ["87"], "tensorrt": "10.3"}
        found = plugin_library.carried_library(self.carried(pieces, tmp_path, [entry | change]), self.WANTED)
        assert (found is not None) == fits

    def test_a_list_of_libraries_that_is_none(self, pieces, tmp_path):
        with pytest.raises(InputDataError, match="expected file, machine, sm and tensorrt of every library"):
            plugin_library.carried_library(self.carried(pieces, tmp_path, [{"file": "x"}]), self.WANTED)

    @pytest.fixture
    def tools(self, tmp_path, monkeypatch):
        """A cmake on PATH that notes its arguments and makes a library; `tools(code)` sets its exit code."""
        folder = tmp_path / "bin"
        log = tmp_path / "cmake.log"

        def make(code: int = 0, makes: bool = True, says: str = "") -> Path:
            create = 'mkdir -p "$2/tensorrt" && echo compiled > "$2/tensorrt/libmgvq_plugin.so"'
            place(
                folder,
                "cmake",
                f'#!/bin/sh\necho "{says}"\necho "$@" >> {log}\n'
                f'[ {code} = 0 ] || {{ echo "no such luck" >&2; exit {code}; }}\n'
                + (f'[ "$1" = --build ] && {create}\n' if makes else "")
                + "exit 0\n",
            )
            os.chmod(folder / "cmake", 0o755)
            return log

        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        monkeypatch.setattr(plugin_library, "missing_tools", list)
        return make

    def prepare(self, bundle, before, out):
        out.mkdir(exist_ok=True)
        return plugin_library.prepare_library(bundle, None, self.WANTED, before, out, lambda _: None)

    def test_sources_are_compiled_for_the_boards_gpu_once(self, tools, bundle, tmp_path):
        log = tools()
        first = self.prepare(bundle, tmp_path / "none", tmp_path / "one")
        assert (first.origin, first.path.read_text()) == ("compiled", "compiled\n")
        configure, make = log.read_text().splitlines()
        assert configure.startswith(f"-S {bundle.folder / 'plugins'} -B ")
        assert {"-DMGVQ_BUILD_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=87-real"} <= set(configure.split())
        assert "--target mgvq_plugin" in make
        again = self.prepare(bundle, tmp_path / "one", tmp_path / "two")
        assert (again.origin, again.sha256) == ("compiled before", first.sha256)
        third = self.prepare(bundle, tmp_path / "two", tmp_path / "three")
        assert third.origin == "compiled before"
        assert len(log.read_text().splitlines()) == 2

    def test_it_is_compiled_again_when_the_file_the_sources_or_the_board_changed(self, tools, bundle, pieces, tmp_path):
        tools()
        self.prepare(bundle, tmp_path / "none", tmp_path / "one")
        shutil.copytree(tmp_path / "one", tmp_path / "damaged")
        place(tmp_path, "damaged/libmgvq_plugin.so", "other")
        assert self.prepare(bundle, tmp_path / "damaged", tmp_path / "two").origin == "compiled"
        place(pieces["plugins"], "CMakeLists.txt", "# changed\n")
        changed = write_bundle(pieces, tmp_path / "changed", target=TARGET)
        assert self.prepare(changed, tmp_path / "one", tmp_path / "three").origin == "compiled"
        (tmp_path / "four").mkdir()
        thor = Wanted("aarch64", "110", "10.13.3")
        found = plugin_library.prepare_library(bundle, None, thor, tmp_path / "one", tmp_path / "four", print)
        assert found.origin == "compiled"

    def test_a_failed_compilation_shows_its_end_and_the_command(self, tools, bundle, tmp_path):
        tools(code=3)
        with pytest.raises(
            EnvironmentMismatch, match=r"exit code 3:\nno such luck\nby hand: cmake -S .* && cmake --bu"
        ):
            self.prepare(bundle, tmp_path / "none", tmp_path / "one")

    def test_a_build_that_skips_the_plugin_is_named(self, tools, bundle, tmp_path):
        tools(makes=False)
        with pytest.raises(EnvironmentMismatch, match=r"made no libmgvq_plugin.so; .*by hand: cmake"):
            self.prepare(bundle, tmp_path / "none", tmp_path / "one")

    def test_missing_headers_are_named(self, tools, bundle, tmp_path):
        tools(makes=False, says=plugin_library._NO_HEADERS)
        text = (Path(__file__).parents[3] / "plugins" / "tensorrt" / "CMakeLists.txt").read_text()
        assert plugin_library._NO_HEADERS in text, "what CMake says there"
        with pytest.raises(
            EnvironmentMismatch, match="headers were not found; sudo apt install libnvinfer-headers-dev"
        ):
            self.prepare(bundle, tmp_path / "none", tmp_path / "one")

    def test_missing_tools_are_named_with_the_command(self, bundle, tmp_path, monkeypatch):
        monkeypatch.setattr(plugin_library, "missing_tools", lambda: ["nvcc of CUDA 12.6 or newer", "cmake 3.20"])
        with pytest.raises(
            EnvironmentMismatch, match=r"missing: nvcc of CUDA 12.6 or newer; cmake 3.20; by hand: cmake"
        ):
            self.prepare(bundle, tmp_path / "none", tmp_path / "one")

    def test_a_bundle_without_sources(self, pieces, tmp_path):
        bundle = write_bundle({k: v for k, v in pieces.items() if k != "plugins"}, tmp_path / "b", target=TARGET)
        with pytest.raises(EnvironmentMismatch, match="has no plugin sources to compile; give --plugin"):
            self.prepare(bundle, tmp_path / "none", tmp_path / "one")


class TestSelfTest:
    def test_answers_are_exact_in_any_order_of_sums(self):
        """Worked the other way round, in float64 and with columns reversed: the same bits."""
        for case in selftest.make_cases(CODES.values()):
            assert case.expected.dtype == np.float32
            assert np.array_equal(case.expected, correct_plugin(case.op, _fields(case), list(case.inputs.values())))
            if case.op != selftest.LINEAR:
                continue
            stored = [case.inputs[key] for key in ("codes", "table", "scales")]
            unit = correct_plugin(selftest.EMBEDDING, _fields(case), [np.arange(case.rows), *stored])
            x, bias = case.inputs["x"].astype(np.float64), case.inputs["bias"]
            slow = x[:, ::-1] @ unit.astype(np.float64).T[::-1] + bias
            assert np.array_equal(case.expected.astype(np.float64), slow)
            assert np.array_equal(case.inputs["x"], case.inputs["x"].astype(np.float16))

    def test_what_is_stored_comes_back_and_equal_codes_give_equal_bytes(self, tmp_path):
        for name in ("a", "b"):
            selftest.write_cases([CODES["2,3,8"], CODES["4,8,9"]], tmp_path / name)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        made, read = selftest.make_cases([CODES["4,8,9"], CODES["2,3,8"]]), selftest.read_cases(tmp_path / "a")
        assert [case.name for case in made] == [case.name for case in read]
        for one, other in zip(made, read):
            assert one.inputs.keys() == other.inputs.keys()
            assert all(np.array_equal(one.inputs[key], other.inputs[key]) for key in one.inputs)
            assert np.array_equal(one.expected, other.expected)

    def test_a_file_that_is_no_self_test(self, tmp_path):
        (tmp_path / "x").write_bytes(b"12345678")
        with pytest.raises(InputDataError, match="expected the plugins' self-test"):
            selftest.read_cases(tmp_path / "x")

    def test_the_kernels_library_passes_and_a_wrong_answer_is_caught(self, tmp_path_factory):
        """The C++ reference behind kernels.h, through the same ctypes calls that reach the CUDA kernels."""
        from kernel_problems import PLUGINS, ROOT, compiled

        from toolchain.kernels.library import KernelLibrary

        tests = ROOT / "tests" / "plugins"
        sources = [tests / "reference_kernels.cpp", PLUGINS / "vq_linear" / "reference.cpp"]
        path = compiled(tmp_path_factory.mktemp("k"), "libreference.so", sources, [PLUGINS, tests / "without_cuda"])
        cuda, cases = SimulatedCuda(), selftest.make_cases(CODES.values())
        selftest.check_kernels(KernelLibrary(path), Cuda(cuda), cases)
        assert cuda.sizes == {}
        cases[5].expected[0, 3] += 1
        with pytest.raises(NumericGateError, match=r"libreference.so gives .* at \(0, 3\).*1 of \d+ differ"):
            selftest.check_kernels(KernelLibrary(path), Cuda(SimulatedCuda()), cases)

    @pytest.mark.gpu
    def test_the_kernels_pass_on_a_gpu(self):
        from toolchain.kernels.library import find_library, load_library

        pytest.importorskip("cuda.bindings.runtime", reason="needs CUDA's Python bindings (pip install cuda-python)")
        if boards.gpu() is None:
            pytest.skip("needs a CUDA device")
        if find_library() is None:
            pytest.skip("needs the kernels' library (mgvq kernels build)")
        selftest.check_kernels(load_library(), Cuda(), selftest.make_cases(CODES.values()))


def _fields(case) -> dict[str, int]:
    code = case.code
    return {
        "rows": case.rows, "columns": case.columns, "vector": code.vector, "shift": code.shift, "window": code.window,
    }  # fmt: skip


class TestCuda:
    def test_bindings_that_are_missing_are_named(self, monkeypatch):
        for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime", "cuda.cudart"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(EnvironmentMismatch, match=r"needs CUDA's Python bindings .*pip install 'cuda-python"):
            load_bindings()

    def test_no_memory_is_a_budget_error_that_says_for_what(self):
        with pytest.raises(BudgetError, match=r"keys and values: 2.0 MiB of device memory are wanted"):
            Cuda(SimulatedCuda(total_bytes=MIB)).allocate(2 * MIB, "keys and values")

    def test_what_goes_up_comes_down_and_rows_move_between_pitches(self):
        cuda = Cuda(SimulatedCuda())
        source, to = cuda.allocate(12, "a"), cuda.allocate(40, "b")
        rows = np.arange(12, dtype=np.uint8).reshape(3, 4)
        cuda.upload(source, rows[:, ::-1])
        assert np.array_equal(cuda.download(source, (3, 4), np.uint8), rows[:, ::-1])
        cuda.zero(to, 40)
        cuda.copy_rows(to + 1, 10, source, 4, 3, 3)
        moved = cuda.download(to, (4, 10), np.uint8)
        assert np.array_equal(moved[:3, 1:4], rows[:, ::-1][:, :3])
        assert moved.sum() == rows[:, ::-1][:, :3].sum()


def test_rtx_has_no_plugin_library(tmp_path, bundle):
    with pytest.raises(UnsupportedError, match="use one of tensorrt, tensorrt_rtx"):
        engine.bundle_graphs(bundle, "onnx")
