"""libmgvq_kernels through ctypes: where it is found, what it must be, and its functions on raw pointers.

plugins/vq_linear/kernels.h says what the functions do. Nothing here knows torch: pointers and streams are integers.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from toolchain.errors import EnvironmentMismatch, UnsupportedError
from toolchain.values import VQCode

ABI = 3  # kMgvqAbi of kernels.h; a test compares
FILE_NAME = "libmgvq_kernels.so"
FILE_VARIABLE = "MGVQ_KERNELS"
BUILD_COMMAND = "mgvq kernels build"
FLOAT16, FLOAT32, INT32, INT64, BFLOAT16, FLOAT32_SCALED = range(6)  # MgvqType
DEFAULT_TACTIC = 0
# Machine code for these runs on no other GPU, and no other GPU's runs on them: boards (CUDA programming guide, "Binary
# Compatibility").
BOARD_ARCHITECTURES = (87, 101, 110)

_HERE = Path(__file__).resolve().parent.parent
PACKAGE_FOLDER = _HERE / "_lib"
_BUILD_TREE_PLACES = (".", "vq_linear", "plugins/vq_linear")
_INVALID_VALUE = 1  # cudaErrorInvalidValue


class CSegment(ctypes.Structure):
    """MgvqSegment."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("columns", ctypes.c_int64),
        ("vector", ctypes.c_int32),
        ("shift", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class CMatrix(ctypes.Structure):
    """MgvqMatrix. `segments` points into memory that must outlive it: `matrix` keeps both together. One is equal to
    itself only, and can be a key.
    """

    __hash__ = object.__hash__

    _fields_ = (
        ("segments", ctypes.POINTER(CSegment)),
        ("rows", ctypes.c_int64),
        ("segment_count", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


@dataclass(frozen=True)
class Segment:
    """A K-segment of a weight: pointers to codes in device order, table and scales, and what they hold."""

    code: VQCode
    columns: int
    codes: int
    table: int
    scales: int


@functools.lru_cache(maxsize=8192)
def matrix(segments: tuple[Segment, ...], rows: int) -> CMatrix:
    """The C structure for these pointers; equal arguments give the same object, so that a call costs a lookup."""
    array = (CSegment * len(segments))()
    for place, one in zip(array, segments):
        place.codes, place.table, place.scales, place.columns = one.codes, one.table, one.scales, one.columns
        place.vector, place.shift, place.window = one.code.vector, one.code.shift, one.code.window
    found = CMatrix(array, rows, len(segments), 0)
    found.kept_alive = array  # the structure itself holds a bare pointer
    return found


class KernelLibrary:
    """A loaded library. Pointers are device memory of the current CUDA device, streams cudaStream_t, both as integers.

    Every function raises UnsupportedError with the library's own words where it refuses its arguments, and
    EnvironmentMismatch where CUDA reports another error.
    """

    def __init__(self, path: Path) -> None:
        """Load the file.

        Raises:
            EnvironmentMismatch: it does not load, is no such library, or has another ABI than this package.
        """
        self.path = path
        try:
            self._c = ctypes.CDLL(str(path))
            self._c.mgvq_abi.restype = ctypes.c_int32
            found = self._c.mgvq_abi()
        except (OSError, AttributeError) as error:
            raise EnvironmentMismatch(
                f"{path}: expected the kernels' library, found a file that does not load as one ({error}); "
                f"build it anew with `{BUILD_COMMAND}`"
            ) from None
        if found != ABI:
            raise EnvironmentMismatch(
                f"{path}: expected ABI {ABI}, found {found}: it belongs to another release of mgvq; build it anew with "
                f"`{BUILD_COMMAND}`"
            )
        self._declare()

    def _declare(self) -> None:
        pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        weight = ctypes.POINTER(CMatrix)
        self._c.mgvq_architectures.restype = ctypes.c_char_p
        self._c.mgvq_reason.restype = ctypes.c_char_p
        self._c.mgvq_linear_workspace.restype = long
        self._c.mgvq_linear_workspace.argtypes = (weight, integer, long, integer)
        x, y, bias, workspace = (pointer, integer, long), (pointer, integer, long), (pointer, integer), (pointer, long)
        self._c.mgvq_linear.argtypes = (weight, *x, *y, *bias, long, integer, *workspace, pointer)
        self._c.mgvq_dequantize.argtypes = (weight, pointer, long, pointer)
        self._c.mgvq_embedding.argtypes = (weight, pointer, integer, long, pointer, integer, pointer)
        self._c.mgvq_read.argtypes = (pointer, long, pointer, pointer)

    @property
    def architectures(self) -> tuple[str, ...]:
        """Compute capabilities with machine code, such as ("80", "87")."""
        return tuple(self._c.mgvq_architectures().decode().split())

    def linear_workspace(self, weight: CMatrix, x_type: int, tokens: int, tactic: int = DEFAULT_TACTIC) -> int:
        """Bytes of workspace that `linear` needs on the current device for x of that type."""
        size = self._c.mgvq_linear_workspace(weight, x_type, tokens, tactic)
        if size < 0:
            self._raise(_INVALID_VALUE, "mgvq_linear_workspace")
        return size

    def linear(
        self,
        weight: CMatrix,
        x: tuple[int, int, int],
        y: tuple[int, int, int],
        bias: tuple[int, int],
        tokens: int,
        tactic: int,
        workspace: tuple[int, int],
        stream: int,
    ) -> None:
        """y = x Wᵀ + bias. x and y are (pointer, type, row stride in elements), bias (pointer or 0, type), workspace
        (pointer or 0, bytes).
        """
        status = self._c.mgvq_linear(weight, *x, *y, *bias, tokens, tactic, *workspace, stream)
        self._raise(status, "mgvq_linear")

    def dequantize(self, weight: CMatrix, out: int, out_stride: int, stream: int) -> None:
        """out[rows, columns] in float16."""
        self._raise(self._c.mgvq_dequantize(weight, out, out_stride, stream), "mgvq_dequantize")

    def embedding(self, weight: CMatrix, ids: tuple[int, int, int], out: tuple[int, int], stream: int) -> None:
        """Rows of W. ids is (pointer, type, count), out (pointer, type)."""
        self._raise(self._c.mgvq_embedding(weight, *ids, *out, stream), "mgvq_embedding")

    def read(self, data: int, size: int, sink: int, stream: int) -> None:
        """Reads `size` bytes once: the roof of `mgvq bench kernels`."""
        self._raise(self._c.mgvq_read(data, size, sink, stream), "mgvq_read")

    def _raise(self, status: int, function: str) -> None:
        if status == 0:
            return
        reason = self._c.mgvq_reason().decode(errors="replace")
        if status == _INVALID_VALUE and reason:
            raise UnsupportedError(f"{function}: {reason}")
        raise EnvironmentMismatch(
            f"{function}: CUDA error {status}{': ' + reason if reason else ''}; an error of an earlier launch shows "
            "here too: run with CUDA_LAUNCH_BLOCKING=1 to see whose it is"
        )


def find_library(path: Path | None = None, build_tree: Path | None = None) -> Path | None:
    """The library's file, or None where there is none: `path`, else the file that MGVQ_KERNELS names, else the
    package's own, else that of a CMake build tree.

    Raises:
        EnvironmentMismatch: `path` or MGVQ_KERNELS names a file that is not there; nothing else is tried then.
    """
    named = os.environ.get(FILE_VARIABLE)
    for what, given in (("the path given", path), (FILE_VARIABLE, Path(named) if named else None)):
        if given is None:
            continue
        if not given.is_file():
            raise EnvironmentMismatch(f"{what}: expected the kernels' library at {given}, found no file; correct it")
        return given
    places = [PACKAGE_FOLDER / FILE_NAME]
    if build_tree is not None:
        places += [build_tree / folder / FILE_NAME for folder in _BUILD_TREE_PLACES]
    return next((place for place in places if place.is_file()), None)


def load_library(path: Path | None = None, build_tree: Path | None = None) -> KernelLibrary:
    """The library that `find_library` finds, loaded once a process.

    Raises:
        EnvironmentMismatch: there is none, or it cannot be used.
    """
    found = find_library(path, build_tree)
    if found is None:
        raise EnvironmentMismatch(
            f"expected the CUDA kernels' library {FILE_NAME}, found none in {PACKAGE_FOLDER.name}/ of the package or "
            f"through {FILE_VARIABLE}; build it with `{BUILD_COMMAND}` (`mgvq doctor` says what that needs), or decode "
            "with torch, slowly, inside `toolchain.native.choice.torch_decode()`"
        )
    return _load(found.resolve())


@functools.lru_cache(maxsize=8)
def _load(path: Path) -> KernelLibrary:
    return KernelLibrary(path)


def runs_on(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether machine code for one of `architectures` runs on a device of that compute capability: the same major
    version and no newer minor one; boards need their own.
    """
    device = 10 * capability[0] + capability[1]
    numbers = [int(name.rstrip("af")) for name in architectures]
    if device in BOARD_ARCHITECTURES:
        return device in numbers
    return any(n // 10 == capability[0] and n <= device and n not in BOARD_ARCHITECTURES for n in numbers)


def check_device(library: KernelLibrary, capability: tuple[int, int], name: str) -> None:
    """Refuse a device for which the library has no machine code.

    Raises:
        EnvironmentMismatch: it has none.
    """
    if not runs_on(library.architectures, capability):
        raise EnvironmentMismatch(
            f"{library.path}: expected machine code for {name} (sm_{capability[0]}{capability[1]}), found only "
            f"{' '.join(library.architectures)}; build it on this machine with `{BUILD_COMMAND}`"
        )
