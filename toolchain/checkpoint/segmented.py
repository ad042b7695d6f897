"""Linears in K-segments: neighbouring input columns in codes of their own, each segment a `modules.VQLinear`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from toolchain.checkpoint.modules import VQLinear, VQModule
from toolchain.errors import ShapeError
from toolchain.values import LayerPlan, format_text
from toolchain.vq.weights import SegmentedWeights


class VQSegmentedLinear(nn.Module):
    """y = Σ_s x[..., columns of s] Ŵ_sᵀ + bias: neighbouring columns in codes of their own, each part a `VQLinear`."""

    def __init__(self, segments: Sequence[VQLinear], bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.segments = nn.ModuleList(segments)
        self.bias = bias

    @property
    def parts(self) -> list[VQLinear]:
        """The segments, first to last; while a graph is exported, what stands in for them (`graph.export_modules`)."""
        return cast(list[VQLinear], list(self.segments))

    @property
    def rows(self) -> int:
        return self.parts[0].rows

    @property
    def columns(self) -> int:
        return sum(part.columns for part in self.parts)

    @property
    def code(self) -> str:
        """The format's text (`values.parse_format`)."""
        return format_text([(part.columns, str(part.code)) for part in self.parts])

    def set_weights(self, weights: SegmentedWeights) -> None:
        """Take over the stored form of a matrix.

        Raises:
            ShapeError: its segments are not those of this module.
        """
        if weights.code != self.code:
            raise ShapeError(f"expected weights in segments {self.code}, found {weights.code}")
        for part, own in zip(self.parts, weights.segments, strict=True):
            part.set_weights(own)

    def keep(self, kept: bool) -> None:
        """Hold a decoded copy from now on, or let it go."""
        for part in self.parts:
            part.keep(kept)

    @property
    def weight(self) -> Tensor:
        """The decoded weight [rows, columns], for library code that reads `.weight`; not a parameter."""
        return torch.cat([part.weight for part in self.parts], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        pieces = x.split([part.columns for part in self.parts], dim=-1)
        y = self.parts[0](pieces[0])
        for part, piece in zip(self.parts[1:], pieces[1:], strict=True):
            y = y + part(piece)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.rows}x{self.columns}, code={self.code}"


def vq_layers(model: nn.Module) -> dict[str, VQModule | VQSegmentedLinear]:
    """Name → module, for every quantized layer of a model; a layer in segments is one."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, VQModule | VQSegmentedLinear)}
    parts = {id(part) for module in found.values() if isinstance(module, VQSegmentedLinear) for part in module.parts}
    return {name: module for name, module in found.items() if id(module) not in parts}


def segmented_replacement(dense: Any, layer: LayerPlan) -> VQSegmentedLinear:
    """As `replacement_for`, of a linear in K-segments.

    Raises:
        ShapeError: the dense module is no linear of the plan's shape.
    """
    weight = dense.weight
    if layer.kind != "linear" or layer.rotation or weight.shape != (layer.rows, layer.columns):
        raise ShapeError(
            f"segments {layer.code}: expected a linear of {layer.rows}x{layer.columns}, found kind {layer.kind} of "
            f"{list(weight.shape)}, rotation {layer.rotation}; only linears are cut into segments, and none whose "
            "inputs are rotated"
        )
    parts = [
        VQLinear(piece.vq_code, piece.rows, piece.columns, piece.table, weight.dtype, weight.device)
        for piece in layer.segments
    ]
    bias = getattr(dense, "bias", None)
    return VQSegmentedLinear(parts, None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
