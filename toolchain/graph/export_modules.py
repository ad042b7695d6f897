"""Export twins of the vector-quantized modules: the same weight in the reference form, one custom op a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from toolchain.checkpoint.modules import VQConv, VQEmbedding, VQLinear, VQModule, patch_rows, vq_modules
from toolchain.graph.op import torch_op
from toolchain.vq import format as vq_format
from toolchain.vq.rotation import rotation_block


class Twin(nn.Module):
    """Buffers symbols uint8[R, 8, C, 16], table float32[2^L, V] and scales float32[rows] of a module; its bias."""

    symbols: Tensor
    table: Tensor
    scales: Tensor
    bias: nn.Parameter | None

    def __init__(self, module: VQModule) -> None:
        super().__init__()
        self.code, self.rows, self.columns, self.codebook_id = (
            module.code,
            module.rows,
            module.columns,
            module.codebook_id,
        )
        symbols = vq_format.unpack(module.codes.numpy(), module.code, module.rows, module.columns)
        self.register_buffer("symbols", torch.from_numpy(symbols))
        self.register_buffer("table", module.codebook.float())
        self.register_buffer("scales", module.scales.float())
        bias = getattr(module, "bias", None)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """Library code asks a weight for its dtype before it calls the layer; the scales have the right one."""
        return self.scales

    def sizes(self) -> tuple[int, int, int, int, int]:
        """rows, columns, V, k, L: the last arguments of both ops."""
        return self.rows, self.columns, self.code.vector, self.code.shift, self.code.window


class LinearTwin(Twin):
    """A rotation of the inputs becomes a product with one block, a constant of the graph; see `modules.VQLinear`."""

    block: Tensor | None

    def __init__(self, module: VQLinear) -> None:
        super().__init__(module)
        self.register_buffer("block", rotation_block(module.rotation) if module.rotation else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.block is not None:
            x = (x.unflatten(-1, (-1, len(self.block))) @ self.block).flatten(-2)
        return torch_op.vq_linear(x, self.symbols, self.table, self.scales, self.bias, *self.sizes())


class ConvTwin(LinearTwin):
    def __init__(self, module: VQConv) -> None:
        super().__init__(module)
        self.kernel = module.kernel

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(patch_rows(x, self.kernel)).movedim(-1, 1)


class EmbeddingTwin(Twin):
    def forward(self, ids: Tensor) -> Tensor:
        return torch_op.vq_embedding(ids, self.symbols, self.table, self.scales, *self.sizes())


def twin_of(module: VQModule) -> Twin:
    """The export twin of a module on the CPU."""
    if isinstance(module, VQEmbedding):
        return EmbeddingTwin(module)
    if isinstance(module, VQConv):
        return ConvTwin(module)
    assert isinstance(module, VQLinear)
    return LinearTwin(module)


@contextmanager
def export_twins(model: nn.Module) -> Iterator[nn.Module]:
    """The model with every vector-quantized module swapped for its twin; swapped back on leaving."""
    originals = vq_modules(model)
    try:
        for name, module in originals.items():
            model.set_submodule(name, twin_of(module))
        yield model
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module)
