"""What a board is and has, read from fixtures, and every refusal of a release or of memory."""

from __future__ import annotations

import ctypes
import json

import pytest
from board_bundles import MIB, ORIN, PLAN, ROOM, TARGET, place

from toolchain.device.engines import build as engine
from toolchain.device.engines import checks
from toolchain.device.runtime import board as boards
from toolchain.device.runtime.board import Board, Gpu, Memory
from toolchain.errors import BudgetError, EnvironmentMismatch

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


class Driver:
    """libcuda of an Orin, or one whose call `fails`."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails

    def __getattr__(self, name):
        def call(*arguments):
            if name == self.fails:
                return 100
            if name == "cuDeviceGetUuid":
                arguments[0].raw = bytes(range(16))
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

    def test_what_a_machine_is_called(self, tmp_path):
        assert boards.machine_name(tmp_path)
        place(tmp_path, "proc/cpuinfo", "processor\t: 0\nmodel name\t: Some CPU @ 2.0GHz\nmodel name\t: Some CPU\n")
        assert boards.machine_name(tmp_path) == "Some CPU @ 2.0GHz"
        place(tmp_path, "proc/device-tree/model", "NVIDIA Jetson Orin Nano Developer Kit\0")
        assert boards.machine_name(tmp_path) == "NVIDIA Jetson Orin Nano Developer Kit"

    def test_the_name_that_nvidia_smi_knows_a_gpu_by(self):
        def no_driver(name):
            raise OSError(f"{name}: cannot open shared object file")

        assert boards.gpu_uuid(lambda name: Driver()) == "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"
        assert boards.gpu_uuid(lambda name: Driver("cuDeviceGetUuid")) is None
        assert boards.gpu_uuid(no_driver) is None

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

    def test_engines_that_are_compared_have_to_fit_with_their_weights(self):
        """Refused before the build: after it, minutes would be lost."""
        plan, room = PLAN | {"peak_bytes": 4000 * MIB}, Memory(3500 * MIB, None, None)
        assert checks.check_memory(plan, room, has_cma=True) == []
        words = r"comparing the engines with the model's answers takes about 4,000 MiB .--no-check .*3,500 MiB are"
        with pytest.raises(BudgetError, match=words):
            checks.check_memory(plan, room, has_cma=True, has_check=True)
        assert checks.check_memory(PLAN | {"peak_bytes": 1}, room, has_cma=True, has_check=True) == []

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


def test_what_an_engine_copies_or_renames_is_said():
    """A copy before a plugin is named, in TensorRT's words for it; one before another layer is TensorRT's affair."""
    layers = ["a/VQLinear", "Reformatting CopyNode for Input Tensor 0 to conv", "b/VQLinear"]
    assert checks.inspection_warnings("vision", ["a/VQLinear", "b/VQLinear"], json.dumps({"Layers": layers})) == []
    layers.append("Reformatting CopyNode for Input Tensor 1 to b/VQLinear")
    (copies,) = checks.inspection_warnings("vision", ["a/VQLinear", "b/VQLinear"], json.dumps({"Layers": layers}))
    assert "graph vision: TensorRT copies 1 inputs of plugins" in copies
    assert "'Reformatting CopyNode for Input Tensor 1 to b/VQLinear'" in copies
    (unnamed,) = checks.inspection_warnings("vision", ["a/VQLinear", "c"], json.dumps({"Layers": layers[:1]}))
    assert "the engine names 1 of 2 plugin layers, not c" in unnamed
