"""The library is found in one order, refused with what to do, and agrees with its header."""

from __future__ import annotations

import ctypes
import re

import pytest
from kernel_problems import PLUGINS, compiled

from toolchain.errors import EnvironmentMismatch, UnsupportedError
from toolchain.native import library
from toolchain.native.library import FILE_NAME, KernelLibrary, check_device, find_library, load_library, runs_on

HEADER = (PLUGINS / "vq_linear" / "kernels.h").read_text(encoding="utf-8")


@pytest.fixture
def nothing_installed(monkeypatch, tmp_path):
    """No library in the package, none named."""
    monkeypatch.delenv(library.FILE_VARIABLE, raising=False)
    monkeypatch.setattr(library, "PACKAGE_FOLDER", tmp_path / "_lib")
    return tmp_path


def test_constants_are_the_headers():
    assert int(re.search(r"kMgvqAbi = (\d+);", HEADER).group(1)) == library.ABI
    names = {"Bfloat16": "BFLOAT16", "Float32Scaled": "FLOAT32_SCALED"}
    kinds = dict(re.findall(r"kMgvq(\w+) = (\d),?$", HEADER, flags=re.MULTILINE))
    assert len(kinds) == 6
    for name, number in kinds.items():
        assert getattr(library, names.get(name, name.upper())) == int(number)


def test_every_function_of_the_header_is_declared(reference_kernels):
    names = re.findall(r"^MGVQ_API .*?(mgvq_\w+)\(", HEADER, flags=re.MULTILINE)
    assert len(names) == 8
    for name in names:
        function = getattr(reference_kernels._c, name)
        takes_nothing = re.search(rf"{name}\(\)", HEADER) is not None
        assert takes_nothing == (function.argtypes is None), name


def test_structures_are_laid_out_as_c_lays_them_out():
    # 3 pointers, int64, 4 int32; and pointer, int64, 2 int32: no padding, on every 64-bit platform.
    assert ctypes.sizeof(library.CSegment) == 48
    assert ctypes.sizeof(library.CMatrix) == 24


def test_places_are_tried_in_order(nothing_installed, monkeypatch):
    assert find_library() is None
    tree = nothing_installed / "tree"
    files = [tree / "plugins" / "vq_linear", nothing_installed / "_lib", nothing_installed / "named", nothing_installed]
    for place in files:
        place.mkdir(parents=True, exist_ok=True)
        (place / FILE_NAME).write_bytes(b"")
    assert find_library(build_tree=tree) == files[1] / FILE_NAME
    (files[1] / FILE_NAME).unlink()
    assert find_library() is None
    assert find_library(build_tree=tree) == files[0] / FILE_NAME
    monkeypatch.setenv(library.FILE_VARIABLE, str(files[2] / FILE_NAME))
    assert find_library(build_tree=tree) == files[2] / FILE_NAME
    assert find_library(files[3] / FILE_NAME, tree) == files[3] / FILE_NAME


def test_a_file_that_is_named_and_missing_is_refused(nothing_installed, monkeypatch):
    with pytest.raises(EnvironmentMismatch, match="the path given: expected the kernels' library at"):
        find_library(nothing_installed / "no.so")
    monkeypatch.setenv(library.FILE_VARIABLE, str(nothing_installed / "no.so"))
    with pytest.raises(EnvironmentMismatch, match=r"MGVQ_KERNELS: .* found no file; correct it"):
        find_library()


def test_without_a_library_the_message_names_the_commands(nothing_installed):
    with pytest.raises(EnvironmentMismatch, match=r"`mgvq kernels build` \(`mgvq doctor` .*torch_decode\(\)"):
        load_library()


def test_a_file_that_is_no_library_and_another_abi_are_refused(tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"nothing")
    with pytest.raises(EnvironmentMismatch, match="does not load as one"):
        KernelLibrary(broken)
    source = tmp_path / "other.cpp"
    source.write_text('extern "C" int mgvq_abi() { return 99; }\n')
    with pytest.raises(EnvironmentMismatch, match=f"expected ABI {library.ABI}, found 99"):
        KernelLibrary(compiled(tmp_path, "other.so", [source], []))
    source.write_text('extern "C" int unrelated() { return 1; }\n')
    with pytest.raises(EnvironmentMismatch, match="does not load as one"):
        KernelLibrary(compiled(tmp_path, "unrelated.so", [source], []))


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        ("80 90", (8, 0), True),
        ("80 90", (8, 6), True),
        ("86", (8, 0), False),
        ("80 86 89", (8, 7), False),  # a board runs no workstation's code
        ("87", (8, 7), True),
        ("87", (8, 9), False),  # nor a workstation a board's
        ("90a", (9, 0), True),
        ("80 89", (9, 0), False),
        ("120", (12, 1), True),
        ("101 120", (11, 0), False),
        ("110", (11, 0), True),
        ("", (8, 0), False),
    ],
)
def test_machine_code_runs_within_a_major_version(architectures, capability, expected):
    assert runs_on(architectures.split(), capability) == expected


def test_a_device_without_machine_code_is_refused(reference_kernels):
    check_device(reference_kernels, (8, 9), "any")
    with pytest.raises(EnvironmentMismatch, match=r"for some GPU \(sm_120\), found only 80 87 90 110; build it"):
        check_device(reference_kernels, (12, 0), "some GPU")


def test_refusals_and_failures_are_told_apart(reference_kernels):
    with pytest.raises(UnsupportedError, match="mgvq_read: bytes must be a multiple of 16"):
        reference_kernels.read(0, 8, 0, 0)
    with pytest.raises(EnvironmentMismatch, match="mgvq_linear: CUDA error 700"):
        reference_kernels._raise(700, "mgvq_linear")
    reference_kernels._raise(0, "mgvq_linear")
