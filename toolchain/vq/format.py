"""The weight format, defined by its decoder. NumPy only; every other decoder is compared with this one bit for bit.

A matrix is padded to rows of 128 and columns of 16 and cut into chunks of 16 rows by V adjacent columns:

    row of window t of chunk (R, g)     128·R + g + 8·t          t = 0…15, g = 0…7
    columns of column chunk C           C·V … C·V + V − 1

A chunk is a stream of 16 symbols of k bits, most significant bit first, stored in 2·k bytes. Window t is the L bits
that start at bit k·t, wrapping inside the chunk: symbol t, then the leading bits of the symbols after it.

    checkpoint order      codes[R, g, C, byte]
    device order          the same chunks as [R, block of 16 columns, lane][byte], lane = 4·g + quarter: a warp's lane
                          finds the weights of its own mma.m16n8k16 A fragment. Lane bytes are split in planes of
                          16 bytes (the last may be shorter), so that every load of a warp is contiguous.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from toolchain.errors import ShapeError
from toolchain.values import CHUNK_ROWS, COLUMN_GROUP, ROW_GROUP, ROW_STRIDE, VQCode

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def chunks_from_matrix(indices: NDArray, code: VQCode) -> NDArray:
    """[R, 8, C, 16] in chunk order from one index per lookup, [padded rows, C]; same dtype."""
    rows, column_chunks = indices.shape
    if rows % ROW_GROUP:
        raise ShapeError(f"expected a multiple of {ROW_GROUP} rows, found {rows}; pad with zeros first")
    by_group = indices.reshape(rows // ROW_GROUP, CHUNK_ROWS, ROW_STRIDE, column_chunks)
    return np.ascontiguousarray(by_group.transpose(0, 2, 3, 1))


def matrix_from_chunks(chunks: NDArray) -> NDArray:
    """[padded rows, C] from [R, 8, C, 16]: the inverse of `chunks_from_matrix`."""
    row_groups, stride, column_chunks, windows = chunks.shape
    return chunks.transpose(0, 3, 1, 2).reshape(row_groups * stride * windows, column_chunks)


def pack(symbols: Bytes, code: VQCode) -> Bytes:
    """uint8[total bytes] from symbols uint8[R, 8, C, 16], each below 2**k, first symbol in the top bits."""
    if symbols.shape[-1] != CHUNK_ROWS:
        raise ShapeError(f"expected {CHUNK_ROWS} symbols a chunk, found shape {symbols.shape}")
    if symbols.size and int(symbols.max()) >= 1 << code.shift:
        raise ShapeError(f"symbol {int(symbols.max())} does not fit {code.shift} bits (code {code})")
    bits = np.unpackbits(symbols.astype(np.uint8)[..., None], axis=-1)[..., 8 - code.shift :]
    return np.packbits(bits.reshape(-1, CHUNK_ROWS * code.shift), axis=-1).reshape(-1)


def unpack(codes: Bytes, code: VQCode, rows: int, columns: int) -> Bytes:
    """symbols uint8[R, 8, C, 16] from packed codes: the inverse of `pack` for a matrix of (rows, columns)."""
    shape = code.chunk_shape(rows, columns)
    expected = code.codes_bytes(rows, columns)
    if codes.dtype != np.uint8 or codes.ndim != 1 or codes.size != expected:
        raise ShapeError(
            f"codes of a {rows}x{columns} matrix in code {code}: expected uint8[{expected}], "
            f"found {codes.dtype}{list(codes.shape)}"
        )
    bits = np.unpackbits(codes.reshape(-1, code.chunk_bytes), axis=-1).reshape(-1, CHUNK_ROWS, code.shift)
    weights = (1 << np.arange(code.shift - 1, -1, -1)).astype(np.uint8)
    return (bits * weights).sum(axis=-1, dtype=np.uint8).reshape(*shape, CHUNK_ROWS)


def windows_from_symbols(symbols: Bytes, code: VQCode) -> NDArray[np.uint16]:
    """Codebook indices uint16[R, 8, C, 16]: the L bits from the start of symbol t, running on into the next symbols."""
    span = -(-code.window // code.shift)
    stream: NDArray = np.zeros(symbols.shape, dtype=np.uint32)
    for step in range(span):
        stream = (stream << code.shift) | np.roll(symbols, -step, axis=-1)
    return (stream >> (span * code.shift - code.window)).astype(np.uint16)


def decode(
    codes: Bytes, codebook: NDArray, scales: NDArray[np.float16], code: VQCode, rows: int, columns: int
) -> Floats:
    """Ŵ float32[rows, columns]: the definition of the format. Ŵ[i, block] = float32(scale[i]) · float32(T[window]).

    Args:
        codes: uint8[total bytes] in checkpoint order.
        codebook: [2**L, V], float16 for V = 2 and int8 for V = 4.
        scales: float16[rows]. The product of two float16 is exact in float32.

    Raises:
        ShapeError: an array has another shape or dtype than its code demands.
    """
    check_codebook(codebook, code)
    if scales.shape != (rows,):
        raise ShapeError(f"expected scales of shape [{rows}], found {list(scales.shape)}")
    windows = matrix_from_chunks(windows_from_symbols(unpack(codes, code, rows, columns), code))
    unit = codebook.astype(np.float32)[windows].reshape(windows.shape[0], -1)[:rows, :columns]
    return unit * scales.astype(np.float32)[:, None]


def check_codebook(codebook: NDArray, code: VQCode) -> None:
    """Refuse a codebook whose shape or dtype is not the code's."""
    expected = (code.entries, code.vector)
    if codebook.shape != expected or codebook.dtype != np.dtype(code.codebook_dtype):
        raise ShapeError(
            f"codebook of code {code}: expected {code.codebook_dtype}{list(expected)}, found "
            f"{codebook.dtype}{list(codebook.shape)}"
        )


def pad_matrix(matrix: NDArray, rows: int, columns: int) -> NDArray:
    """The matrix with zeros below and to the right, up to (rows, columns)."""
    return np.pad(matrix, ((0, rows - matrix.shape[0]), (0, columns - matrix.shape[1])))


def _lane_view(codes: NDArray, code: VQCode, rows: int, columns: int) -> NDArray:
    """[R, column blocks, 32 lanes, bytes a lane] from checkpoint order."""
    row_groups, stride, column_chunks = code.chunk_shape(rows, columns)
    quarters, halves = 4, COLUMN_GROUP // code.vector // 4
    blocks = column_chunks // (quarters * halves)
    view = codes.reshape(row_groups, stride, blocks, halves, quarters, code.chunk_bytes)
    return view.transpose(0, 2, 1, 4, 3, 5).reshape(row_groups, blocks, stride * quarters, halves * code.chunk_bytes)


def device_from_checkpoint(codes: NDArray, code: VQCode, rows: int, columns: int) -> NDArray:
    """uint8[total bytes] in device order from checkpoint order: a permutation of bytes, nothing added.

    With V = 2 lane (g, q) owns column pairs q and q + 4 of a block of 16 columns, the two halves of its A fragment;
    with V = 4 it owns columns 4q … 4q + 3, and the kernel permutes x inside the block to match.
    """
    lanes = _lane_view(codes, code, rows, columns)
    planes = [lanes[..., at : at + 16].reshape(*lanes.shape[:2], -1) for at in range(0, lanes.shape[-1], 16)]
    return np.concatenate(planes, axis=-1).reshape(-1)


def checkpoint_from_device(codes: Bytes, code: VQCode, rows: int, columns: int) -> Bytes:
    """The inverse of `device_from_checkpoint`."""
    places = device_from_checkpoint(np.arange(codes.size, dtype=np.int64), code, rows, columns)
    result = np.empty_like(codes)
    result[places] = codes
    return result
