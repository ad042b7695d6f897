"""The static check of machine code: what it reads from listings, and, where nvcc is, two sources on Orin."""

from __future__ import annotations

import json
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


BODY = ["LDS"] * 32 + ["HMMA.16816.F32"] * 8 + ["PRMT"] * 36 + ["IMAD"] * 20


def test_the_busiest_pipe_bounds_the_loop():
    loop = check_sass.loop_figures(BODY, "code_2_4_8")
    assert (loop.bound_by, loop.clocks, loop.index_bytes_per_clock) == ("shared memory", 32.0, 16.0)


def test_a_step_of_int8_is_two_units():
    body = ["LDS"] * 32 + ["IMMA.16832.S8.S8"] * 8 + ["PRMT"] * 60
    loop = check_sass.loop_figures(body, "code_4_8_8", "int8")
    assert (loop.products, loop.bound_by, loop.clocks, loop.index_bytes_per_clock) == (8, "shared memory", 32.0, 32.0)


def compiled(source: str, *loops: check_sass.Loop) -> check_sass.Compiled:
    return check_sass.Compiled(source, "87", 1.0, (), loops)


def test_a_loop_may_not_grow_or_look_up_more_than_the_format_demands():
    loop = check_sass.loop_figures(BODY, "code_2_4_8")
    found = compiled("code_2_4_8", loop)
    record = {"87": {"code_2_4_8": {"float16": 96}}}
    assert loop.instructions == 96
    assert list(found.faults(record)) == []
    record["87"]["code_2_4_8"]["float16"] = 87
    assert "96 instructions in the loop, recorded 87 and 10% allowed" in next(found.faults(record))
    assert "not in sass_mix.json; write it with --record" in next(found.faults({}))
    twice = compiled("code_2_4_8", check_sass.loop_figures([*BODY, "LDS"], "code_2_4_8"))
    assert "33 lookups and 8 products, expected 32 and 8" in next(twice.faults(record))


def test_every_loop_of_every_code_is_recorded():
    record = json.loads(check_sass.RECORD.read_text(encoding="utf-8"))
    codes = [source for source in check_sass.all_sources() if source.startswith("code_")]
    assert len(codes) == 9
    assert list(record) == ["87", "90a", "110", "120"]
    for loops in record.values():
        assert sorted(loops) == codes
        for source, counts in loops.items():
            assert sorted(counts) == (["float16", "int8"] if source.startswith("code_4") else ["float16"])


@pytest.mark.parametrize("source", ["code_2_4_8", "rows"])
def test_a_source_fits_its_registers_on_orin(tmp_path, source):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc was not found")
    found = check_sass.compile_source(source, "87", tmp_path, check_sass.find_nvdisasm(None))
    assert len(found.kernels) >= (8 if source.startswith("code_") else 4)
    record = json.loads(check_sass.RECORD.read_text(encoding="utf-8"))
    assert list(found.faults(record)) == []
