"""The static check of machine code: what it reads from listings, and, where nvcc is, the two default codes on Orin."""

from __future__ import annotations

import shutil
import sys

import pytest
from kernel_problems import PLUGINS

sys.path.insert(0, str(PLUGINS))
import check_sass

SKINNY = "_ZN4mgvq13skinny_kernelILi2ELi4ELi8ELi1ELb0ELb1EEEvNS_13SegmentLaunchE"
TILED = "_ZN4mgvq12tiled_kernelILi2ELi4ELi8ELi4ELb0EEEvNS_13SegmentLaunchE"
RESOURCES = f"""\
ptxas info    : Compiling entry function '{SKINNY}' for 'sm_87'
    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers
ptxas info    : Compiling entry function '{TILED}' for 'sm_87'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 300 registers, used 1 barriers
"""


def test_spills_and_registers_are_faults():
    spilled, wide = check_sass.parse_resources(RESOURCES)
    assert spilled.fault == "skinny, 1 token tiles: 12 bytes spilled"
    assert wide.fault == "tiled, 4 token tiles: 300 registers, at most 255 for its block"


def test_a_loop_is_what_lies_between_a_label_and_the_branch_back():
    section = "\n".join(
        [
            "        /*0000*/                   MOV R1, R2 ;",
            ".L_x_1:",
            "        /*0010*/                   LDS R1, [R2] ;",
            "        /*0020*/               @P0 BRA `(.L_x_2) ;",
            "        /*0030*/                   HMMA.16816.F32 R0, R1, R2, R3 ;",
            "        /*0040*/              @!P1 BRA `(.L_x_1) ;",
        ]
    )
    assert check_sass.loops_of(section) == [["LDS", "BRA", "HMMA.16816.F32", "BRA"]]


def test_the_busiest_pipe_bounds_the_loop():
    body = ["LDS"] * 32 + ["HMMA.16816.F32"] * 8 + ["PRMT"] * 36 + ["IMAD"] * 20
    loop = check_sass.loop_figures(body, "2_4_8")
    assert (loop.bound_by, loop.clocks, loop.index_bytes_per_clock) == ("shared memory", 32.0, 16.0)


@pytest.mark.parametrize("code", ["2_4_8", "4_8_9"])
def test_default_codes_fit_their_registers_on_orin(tmp_path, code):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc was not found")
    compiled = check_sass.compile_code(code, "87", tmp_path, check_sass.find_nvdisasm(None))
    assert len(compiled.kernels) >= 8
    assert [kernel.fault for kernel in compiled.kernels if kernel.fault] == []
    if compiled.loop and code == "2_4_8":
        assert compiled.loop.lookups == 32
        assert compiled.loop.index_bytes_per_clock >= 14
