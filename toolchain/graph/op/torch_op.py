"""mgvq::vq_linear and mgvq::vq_embedding as torch custom ops on the reference form, and their translation to ONNX.

Tracing sees one opaque call per layer; the exporter turns it into one node of the contract in vq_op.py. The eager
kernels are the slow, obvious ones: they exist so that a traced program can be run and compared.
"""

from __future__ import annotations

from collections.abc import Callable

import onnxscript
import torch

from toolchain.graph.op import vq_op
from toolchain.values import CHUNK_ROWS, ROW_GROUP, ROW_STRIDE, VQCode

Tensor = torch.Tensor


@torch.library.custom_op("mgvq::vq_linear", mutates_args=())
def vq_linear(
    x: Tensor,
    codes: Tensor,
    table: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
    vector: int,
    shift: int,
    window: int,
) -> Tensor:
    """y [..., rows] of x [..., columns]; codes uint8[R, 8, C, 16] symbols, table and scales in x's dtype."""
    weight = unit_weight(codes, table, VQCode(vector, shift, window))[:rows, :columns] * scales[:, None]
    return torch.nn.functional.linear(x, weight, bias)


@vq_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    table: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
    vector: int,
    shift: int,
    window: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.custom_op("mgvq::vq_embedding", mutates_args=())
def vq_embedding(
    ids: Tensor,
    codes: Tensor,
    table: Tensor,
    scales: Tensor,
    rows: int,
    columns: int,
    vector: int,
    shift: int,
    window: int,
) -> Tensor:
    """Rows [..., columns] of the weight for ids int64[...]; the other inputs as for vq_linear."""
    chunk = ids // ROW_GROUP, ids % ROW_STRIDE
    windows = windows_from_symbols(codes[chunk], VQCode(vector, shift, window))  # [..., C, 16]
    place = (ids % ROW_GROUP // ROW_STRIDE)[..., None, None].expand(*windows.shape[:-1], 1)
    entries = table[windows.gather(-1, place).squeeze(-1)]
    return entries.flatten(-2)[..., :columns] * scales[ids][..., None]


@vq_embedding.register_fake
def _(
    ids: Tensor,
    codes: Tensor,
    table: Tensor,
    scales: Tensor,
    rows: int,
    columns: int,
    vector: int,
    shift: int,
    window: int,
) -> Tensor:
    return table.new_empty(*ids.shape, columns)


def windows_from_symbols(symbols: Tensor, code: VQCode) -> Tensor:
    """int64 windows, same shape as the symbols uint8[..., 16]; see vq.format.windows_from_symbols."""
    span = vq_op.symbols_per_window(code)
    stream = torch.zeros(symbols.shape, dtype=torch.int64, device=symbols.device)
    for step in range(span):
        stream = (stream << code.shift) | torch.roll(symbols, -step, dims=-1)
    return stream >> (span * code.shift - code.window)


def unit_weight(symbols: Tensor, table: Tensor, code: VQCode) -> Tensor:
    """The weight before its row scale, [padded rows, padded columns] in the table's dtype."""
    row_groups, stride, columns, _ = symbols.shape
    windows = windows_from_symbols(symbols, code).permute(0, 3, 1, 2).reshape(row_groups * CHUNK_ROWS * stride, columns)
    return table[windows].flatten(1)


def translation_table() -> dict[Callable, Callable]:
    """What torch.onnx.export takes as custom_translation_table: both ops to the nodes of the contract."""
    vq_op.register_schemas()
    opset = onnxscript.values.Opset(vq_op.DOMAIN, vq_op.OPSET_VERSION)

    # Without annotations: torch.onnx reads them as the schema of an ONNX function.
    def linear(x, codes, table, scales, bias, rows, columns, vector, shift, window):  # type: ignore[no-untyped-def]
        attributes = vq_op.code_attributes(VQCode(vector, shift, window), rows, columns)
        inputs = (x, codes, table, scales) if bias is None else (x, codes, table, scales, bias)
        return opset.VQLinear(*inputs, **attributes)

    def embedding(ids, codes, table, scales, rows, columns, vector, shift, window):  # type: ignore[no-untyped-def]
        attributes = vq_op.code_attributes(VQCode(vector, shift, window), rows, columns)
        return opset.VQEmbedding(ids, codes, table, scales, **attributes)

    return {torch.ops.mgvq.vq_linear.default: linear, torch.ops.mgvq.vq_embedding.default: embedding}
