"""A linear on the CPU that decodes a few hundred rows at a time: no dense copy of a whole weight ever exists.

Decoding is a few passes of torch over one block, which torch spreads over its threads. Measured on one core of an AMD
EPYC, float32, one token: 660 to 1,970 million weights a second by code, (2,4,8) 770, the product included. A whole step
of a decoder of Qwen2-VL-2B's sizes in (2,4,8) takes 2.2 s; with each weight made dense by `modules.decode_weight`, 29.6
s.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from toolchain.values import CHUNK_ROWS, ROW_GROUP, VQCode

# Weights of a block. On the core above 2^19 was best or within 6 % of it for every code; 2^16 to 2^18 lose 6 to 14 %,
# 2^22 up to 60 %.
BLOCK_WEIGHTS = 1 << 19


def linear(
    x: Tensor, codes: Tensor, table: Tensor, scales: Tensor, code: VQCode, columns: int, bias: Tensor | None
) -> Tensor:
    """y [..., rows] = x Ŵᵀ + bias for x [..., columns]; codes in checkpoint order, scales float16[rows]."""
    rows = scales.shape[0]
    step = rows_a_block(columns)
    parts = []
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        weight = decode_rows_between(codes, table, scales, code, columns, begin, end, x.dtype)
        parts.append(F.linear(x, weight, None if bias is None else bias[begin:end]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def rows_a_block(columns: int) -> int:
    """Rows decoded at once: whole row groups of about BLOCK_WEIGHTS weights, one group at least."""
    return max(1, BLOCK_WEIGHTS // (columns * ROW_GROUP)) * ROW_GROUP


def decode_rows_between(
    codes: Tensor, table: Tensor, scales: Tensor, code: VQCode, columns: int, begin: int, end: int, dtype: torch.dtype
) -> Tensor:
    """Rows begin..end-1 of Ŵ in `dtype`, equal to `modules.decode_weight` bit for bit; `begin` in whole row groups."""
    row_groups, stride, column_chunks = code.chunk_shape(scales.shape[0], columns)
    chunks = codes.view(row_groups, stride, column_chunks, code.chunk_bytes)
    mine = chunks[begin // ROW_GROUP : -(-end // ROW_GROUP)]
    indices = _windows(mine, code).permute(0, 3, 1, 2).reshape(-1, column_chunks).long()
    # One entry is one complex number: a gather of single elements, which is torch's fastest.
    entries = table.float().view(torch.complex64 if code.vector == 2 else torch.complex128).flatten()
    unit = torch.take(entries, indices).view(torch.float32)[: end - begin, :columns]
    return unit.mul_(scales[begin:end, None].float()).to(dtype)


def _windows(chunks: Tensor, code: VQCode) -> Tensor:
    """Table indices [..., 16] of chunks uint8[..., 2k]: uint8 where windows are bytes, else int16."""
    if code.shift == code.window == 8:
        return chunks
    # Two neighbouring bytes hold a window. Its top bit may be int16's sign: the mask takes off what a shift copies in.
    words = chunks.to(torch.int16) << 8 | torch.roll(chunks, -1, dims=-1)
    first = torch.arange(CHUNK_ROWS) * code.shift
    shifts = (16 - code.window - first % 8).to(torch.int16)
    return (words.index_select(-1, first // 8) >> shifts) & (code.entries - 1)
