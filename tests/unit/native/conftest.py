"""The C++ reference, compiled once, and the kernel libraries there are: behind the reference, emulated, on a GPU."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import pytest
import torch
from kernel_problems import PLUGINS, ROOT, compiled, emulated_library

from toolchain.native.library import KernelLibrary, find_library


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> ctypes.CDLL:
    """libmgvq_reference.so."""
    folder = tmp_path_factory.mktemp("reference")
    library = ctypes.CDLL(
        str(compiled(folder, "libmgvq_reference.so", [PLUGINS / "vq_linear" / "reference.cpp"], [PLUGINS]))
    )
    library.mgvq_reference_reason.restype = ctypes.c_char_p
    library.mgvq_reference_float_from_half.restype = ctypes.c_float
    library.mgvq_reference_float_from_half.argtypes = (ctypes.c_uint16,)
    library.mgvq_reference_half_from_float.restype = ctypes.c_uint16
    library.mgvq_reference_half_from_float.argtypes = (ctypes.c_float,)
    return library


@pytest.fixture(scope="session")
def reference_kernels(tmp_path_factory) -> KernelLibrary:
    """kernels.h on host memory through the reference."""
    tests = ROOT / "tests" / "plugins"
    sources = [tests / "reference_kernels.cpp", PLUGINS / "vq_linear" / "reference.cpp"]
    includes = [PLUGINS, tests / "without_cuda"]
    return KernelLibrary(compiled(tmp_path_factory.mktemp("kernels"), "libreference_kernels.so", sources, includes))


@dataclass(frozen=True)
class Runner:
    """A library, the torch device its pointers are of, and whether only small shapes are bearable."""

    library: KernelLibrary
    device: str
    is_slow: bool

    @property
    def stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0


@pytest.fixture(scope="session")
def emulated_kernels(tmp_path_factory) -> KernelLibrary:
    """The CUDA kernels themselves, compiled as C++ against the emulator; CMake's build of them when it is fresh."""
    built = emulated_library()
    if built is None:
        folder = tmp_path_factory.mktemp("emulated")
        cuda = sorted((PLUGINS / "vq_linear").glob("*.cu"))
        plain = [PLUGINS / "vq_linear" / "dispatch.cpp", PLUGINS / "emulator" / "emulator.cpp"]
        flags = ["-DMGVQ_EMULATE", "-x", "c++"]
        includes = [PLUGINS / "emulator" / "include", PLUGINS]
        built = compiled(folder, "libmgvq_kernels_emulated.so", [*cuda, *plain], includes, flags)
    return KernelLibrary(built)


@pytest.fixture(params=["reference", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def runner(request) -> Runner:
    """Each library there is; the others are skipped with what they lack."""
    if request.param == "reference":
        return Runner(request.getfixturevalue("reference_kernels"), "cpu", True)
    if request.param == "emulated":
        return Runner(request.getfixturevalue("emulated_kernels"), "cpu", True)
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    path = find_library()
    if path is None:
        pytest.skip("the kernels are not built: mgvq kernels build")
    return Runner(KernelLibrary(path), "cuda", False)
