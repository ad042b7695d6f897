"""Tensors to a kernel library's launchers: shapes and types are checked here, pointers go in, nothing waits.

Every function takes the library and a stream, so that the emulated library, whose "device" is host memory, runs the
same code in tests. Weights are `Weight`s; all tensors of a call are on one device, whose context the caller has made
current.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toolchain.errors import ShapeError, UnsupportedError
from toolchain.native.library import (
    BFLOAT16,
    DEFAULT_TACTIC,
    FLOAT16,
    FLOAT32,
    FLOAT32_SCALED,
    INT32,
    INT64,
    CMatrix,
    KernelLibrary,
    Segment,
    matrix,
)
from toolchain.values import VQCode

KINDS = {
    torch.float16: FLOAT16,
    torch.bfloat16: BFLOAT16,
    torch.float32: FLOAT32,
    torch.int32: INT32,
    torch.int64: INT64,
}
# What x is to the library: a model's float32 may hold what float16 cannot, so that its rows are scaled.
ACTIVATION_KINDS = {torch.float16: FLOAT16, torch.bfloat16: BFLOAT16, torch.float32: FLOAT32_SCALED}
ACTIVATIONS = tuple(ACTIVATION_KINDS)
FORMAT_FIELDS = 4  # vector, shift, window, columns of a segment


@dataclass(frozen=True)
class Weight:
    """A weight of 1 to 3 K-segments: codes uint8[bytes] in device order, tables and scales float16[rows], one each.

    `formats` holds vector, shift, window and columns of each segment, one after another.
    """

    codes: Sequence[Tensor]
    tables: Sequence[Tensor]
    scales: Sequence[Tensor]
    formats: Sequence[int]
    rows: int

    @property
    def columns(self) -> int:
        return sum(self.formats[FORMAT_FIELDS - 1 :: FORMAT_FIELDS])

    @property
    def device(self) -> torch.device:
        return self.codes[0].device

    def segments(self) -> tuple[tuple[VQCode, int], ...]:
        """(code, columns) of each segment."""
        f = self.formats
        return tuple(
            (VQCode(f[i], f[i + 1], f[i + 2]), f[i + 3]) for i in range(0, len(f) - FORMAT_FIELDS + 1, FORMAT_FIELDS)
        )

    def checked(self) -> CMatrix:
        """The library's structure.

        Raises:
            ShapeError: a tensor does not have the dtype, size or device that the formats demand.
        """
        counts = {len(self.codes), len(self.tables), len(self.scales), len(self.formats) / FORMAT_FIELDS}
        if len(counts) != 1 or not self.codes:
            raise ShapeError(
                f"expected codes, table, scales and format of every segment, found counts {sorted(counts)}"
            )
        found = []
        for i, (code, columns) in enumerate(self.segments()):
            codes, table, scales = self.codes[i], self.tables[i], self.scales[i]
            _expect(codes, torch.uint8, (code.codes_bytes(self.rows, columns),), self.device, f"codes {i}")
            _expect(table, getattr(torch, code.codebook_dtype), (code.entries, code.vector), self.device, f"table {i}")
            _expect(scales, torch.float16, (self.rows,), self.device, f"scales {i}")
            found.append(Segment(code, columns, codes.data_ptr(), table.data_ptr(), scales.data_ptr()))
        return matrix(tuple(found), self.rows)


def linear(
    library: KernelLibrary, x: Tensor, weight: Weight, bias: Tensor | None, stream: int, tactic: int = DEFAULT_TACTIC
) -> Tensor:
    """y [..., rows] in x's dtype for x [..., columns] in float16, bfloat16 or float32.

    float16 goes to the kernel as it is. Of the others the library scales each row by a power of two, so that float16
    cannot overflow, multiplies in float16 (11 bits, as TF32 has; bfloat16 has 8), sums in float32, scales back and
    rounds once. A row that holds an infinity or NaN gives NaN.

    Raises:
        ShapeError: x or the bias has another shape, or a tensor is on another device.
        UnsupportedError: x has another dtype, or the library refuses.
    """
    c_weight = weight.checked()
    if x.dtype not in ACTIVATIONS:
        raise UnsupportedError(
            f"activations: expected float16, bfloat16 or float32, found {x.dtype}; convert them, or decode with torch "
            "inside toolchain.native.choice.torch_decode()"
        )
    if x.shape[-1:] != (weight.columns,) or x.device != weight.device:
        raise ShapeError(
            f"activations: expected [..., {weight.columns}] on {weight.device}, found {list(x.shape)} on {x.device}"
        )
    if bias is not None and (bias.shape != (weight.rows,) or bias.device != weight.device):
        raise ShapeError(
            f"bias: expected [{weight.rows}] on {weight.device}, found {list(bias.shape)} on {bias.device}"
        )
    shape, flat = (*x.shape[:-1], weight.rows), x.reshape(-1, weight.columns)
    y = torch.empty(len(flat), weight.rows, dtype=x.dtype, device=x.device)
    if bias is not None:
        bias = (bias if bias.dtype in ACTIVATIONS else bias.float()).contiguous()
    _launch(library, flat, c_weight, bias, y, stream, tactic)
    return y.view(shape)


def dequantize(library: KernelLibrary, weight: Weight, stream: int) -> Tensor:
    """Ŵ float16[rows, columns], each weight rounded once."""
    c_weight = weight.checked()
    out = torch.empty(weight.rows, weight.columns, dtype=torch.float16, device=weight.device)
    library.dequantize(c_weight, out.data_ptr(), weight.columns, stream)
    return out


def embedding(library: KernelLibrary, ids: Tensor, weight: Weight, dtype: torch.dtype, stream: int) -> Tensor:
    """Rows of Ŵ, [*ids.shape, columns] in `dtype`, each weight rounded once; zeros for ids outside 0..rows-1.

    Raises:
        ShapeError: the ids are not int32 or int64, or on another device.
        UnsupportedError: a dtype that is not floating point.
    """
    c_weight = weight.checked()
    if ids.dtype not in (torch.int32, torch.int64) or ids.device != weight.device:
        raise ShapeError(f"ids: expected int32 or int64 on {weight.device}, found {ids.dtype} on {ids.device}")
    if not dtype.is_floating_point:
        raise UnsupportedError(f"embedding: expected a floating-point dtype, found {dtype}")
    # float32 holds the product exactly, so that rounding it once more to another dtype rounds once in all.
    kind = dtype if dtype in ACTIVATIONS else torch.float32
    flat = ids.reshape(-1).contiguous()
    out = torch.empty(len(flat), weight.columns, dtype=kind, device=weight.device)
    library.embedding(c_weight, (flat.data_ptr(), KINDS[ids.dtype], len(flat)), (out.data_ptr(), KINDS[kind]), stream)
    return out.to(dtype).view(*ids.shape, weight.columns)


def _launch(
    library: KernelLibrary, x: Tensor, weight: CMatrix, bias: Tensor | None, y: Tensor, stream: int, tactic: int
) -> None:
    if not len(x):
        return
    x = x if x.stride(-1) == 1 else x.contiguous()
    device = x.device.index if x.is_cuda else -1
    kind = ACTIVATION_KINDS[x.dtype]
    size = _workspace(library, weight, kind, len(x), tactic, device)
    # torch's allocator is the cache: it hands out this stream's last block again, and inside a capture the graph's own.
    workspace = torch.empty(size, dtype=torch.uint8, device=x.device) if size else None
    library.linear(
        weight,
        (x.data_ptr(), kind, x.stride(0)),
        (y.data_ptr(), KINDS[y.dtype], y.stride(0)),
        (0, FLOAT16) if bias is None else (bias.data_ptr(), KINDS[bias.dtype]),
        len(x),
        tactic,
        (0, 0) if workspace is None else (workspace.data_ptr(), size),
        stream,
    )


@functools.lru_cache(maxsize=65536)
def _workspace(library: KernelLibrary, weight: CMatrix, kind: int, tokens: int, tactic: int, device: int) -> int:
    return library.linear_workspace(weight, kind, tokens, tactic)


def _expect(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device, what: str) -> None:
    good = tensor.dtype == dtype and tuple(tensor.shape) == shape and tensor.device == device and tensor.is_contiguous()
    if not good:
        raise ShapeError(
            f"{what}: expected contiguous {dtype}{list(shape)} on {device}, found "
            f"{tensor.dtype}{list(tensor.shape)} on {tensor.device}"
        )
