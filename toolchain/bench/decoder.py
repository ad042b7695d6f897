"""A decoder of published sizes with random weights: one token against a filled cache, its linears ours or dense.

    x → norm → qkv → attention over the cache → o → + → norm → gate_up → silu · → down → + → … → norm → head

Rotary positions and sampling are left out: they are the same few microseconds for both. Fused groups are one linear, as
they are when deployed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toolchain.bench.shapes import PUBLISHED, VOCABULARIES, decoder_shape
from toolchain.checkpoint.modules import VQLinear
from toolchain.models.configs import head_dim
from toolchain.values import VQCode

WEIGHT_SIZE = 0.02  # standard deviation of a trained decoder's linears
MakeLinear = Callable[[int, int], nn.Module]


class Block(nn.Module):
    """One block; `keys` and `values` float[1, kv heads, context, head size] are the cache."""

    keys: Tensor
    values: Tensor

    def __init__(
        self, groups: dict[str, nn.Module], heads: tuple[int, int, int], context: int, options: dict[str, Any]
    ) -> None:
        super().__init__()
        self.linears = nn.ModuleDict(groups)
        self.queries, self.pairs, self.size = heads
        for name in ("keys", "values"):
            self.register_buffer(name, torch.randn(1, self.pairs, context, self.size, **options))

    def forward(self, x: Tensor) -> Tensor:
        """x [1, hidden] → [1, hidden]."""
        q, k, v = self.linears["qkv"](normed(x)).split(
            [self.size * n for n in (self.queries, self.pairs, self.pairs)], dim=-1
        )
        # The newest position is written over the cache's last one.
        self.keys[0, :, -1] = k.view(self.pairs, self.size)
        self.values[0, :, -1] = v.view(self.pairs, self.size)
        q = q.view(1, self.queries, 1, self.size)
        attended = F.scaled_dot_product_attention(q, self.keys, self.values, enable_gqa=True)
        x = x + self.linears["o"](attended.view(1, -1))
        gate, up = self.linears["gate_up"](normed(x)).chunk(2, dim=-1)
        return x + self.linears["down"](F.silu(gate) * up)


def normed(x: Tensor) -> Tensor:
    """x over its root mean square."""
    return F.rms_norm(x, x.shape[-1:])


class Decoder(nn.Module):
    """Blocks and a head; weights are drawn anew, block by block."""

    def __init__(
        self, name: str, make: MakeLinear, context: int, options: dict[str, Any], blocks: int | None = None
    ) -> None:
        super().__init__()
        shape, config = decoder_shape(name), PUBLISHED[name]
        heads = config["num_attention_heads"], config["num_key_value_heads"], head_dim(config)
        self.blocks = nn.Sequential(
            *(
                Block({g.name: make(sum(g.rows), g.columns) for g in shape.groups}, heads, context, options)
                for _ in range(shape.blocks if blocks is None else blocks)
            )
        )
        self.head = make(VOCABULARIES[name], config["hidden_size"])

    def forward(self, x: Tensor) -> Tensor:
        """Logits [1, vocabulary] of x [1, hidden]."""
        return self.head(normed(self.blocks(x)))


def dense_maker(options: dict[str, Any]) -> MakeLinear:
    """Linears with Gaussian weights; `options` are a tensor's dtype and device."""

    def make(rows: int, columns: int) -> nn.Module:
        layer = nn.Linear(columns, rows, bias=False, **options)
        nn.init.normal_(layer.weight, std=WEIGHT_SIZE)
        return layer.requires_grad_(False)

    return make


def coded_maker(code: VQCode, options: dict[str, Any]) -> MakeLinear:
    """VQLinears with random codes, tables and scales, of about the dense ones' size."""

    def make(rows: int, columns: int) -> nn.Module:
        layer = VQLinear(code, rows, columns, "random", options["dtype"], options["device"])
        layer.codes.random_(256)
        scale = WEIGHT_SIZE
        if code.vector == 4:
            layer.codebook.random_(-127, 128)
            scale /= 73.5  # standard deviation of integers drawn evenly from -127 to 127
        else:
            layer.codebook.normal_()
        layer.scales.fill_(scale)
        return layer

    return make
