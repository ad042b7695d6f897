"""A two-graph model of vector-quantized layers, small enough to export in a second, and random weights for one op."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.export import Dim

from toolchain.checkpoint.modules import VQConv, VQEmbedding, VQLinear, VQModule
from toolchain.models.family import GraphSpec
from toolchain.values import VQCode
from toolchain.vq import format as vq_format

WIDTH, VOCABULARY = 64, 256


def random_weights(code: VQCode, rows: int, columns: int, rng: np.random.Generator):
    """(symbols, codebook, scales) as stored."""
    symbols = rng.integers(0, 1 << code.shift, (*code.chunk_shape(rows, columns), 16), dtype=np.uint8)
    if code.vector == 4:
        codebook = rng.integers(-127, 128, (code.entries, 4)).astype(np.int8)
    else:
        codebook = (100 * rng.standard_normal((code.entries, 2))).astype(np.float16)
    scales = ((rng.random(rows) + 0.5) / (70 * columns**0.5)).astype(np.float16)
    return symbols, codebook, scales


def fill(module: VQModule, rng: np.random.Generator, codebook: torch.Tensor | None = None) -> VQModule:
    symbols, new_codebook, scales = random_weights(module.code, module.rows, module.columns, rng)
    module.codes = torch.from_numpy(vq_format.pack(symbols, module.code))
    module.scales = torch.from_numpy(scales)
    module.codebook = torch.from_numpy(new_codebook) if codebook is None else codebook
    if getattr(module, "bias", None) is not None:
        module.bias.data = torch.from_numpy(rng.standard_normal(module.rows).astype(np.float32))
    return module


class TinyModel(nn.Module):
    """embed → (q, k, v of 128, 128, 256 rows) → mix → (gate, up of 192 rows) → down → head tied to embed."""

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(0)
        plain, fine, overlapping = VQCode(4, 8, 8), VQCode(2, 6, 6), VQCode(2, 4, 8)

        def linear(code, rows, columns, codebook_id, bias=False):
            return fill(VQLinear(code, rows, columns, codebook_id, torch.float32, bias=bias), rng)

        self.embed = fill(VQEmbedding(plain, VOCABULARY, WIDTH, "t0", torch.float32), rng)
        self.q = linear(fine, 128, WIDTH, "t1", bias=True)
        self.k = fill(VQLinear(fine, 128, WIDTH, "t1", torch.float32), rng, self.q.codebook)
        self.v = fill(VQLinear(fine, 256, WIDTH, "t1", torch.float32, bias=True), rng, self.q.codebook)
        self.mix = linear(overlapping, WIDTH, 256, "t2", bias=True)
        self.gate = linear(plain, 192, WIDTH, "t3")
        self.up = fill(VQLinear(plain, 192, WIDTH, "t3", torch.float32), rng, self.gate.codebook)
        self.down = linear(overlapping, WIDTH, 192, "t4")
        self.patch = fill(VQConv(fine, WIDTH, 3 * 4, "t5", torch.float32, bias=True, kernel=(2, 2)), rng)
        self.head = VQLinear(plain, VOCABULARY, WIDTH, "t0", torch.float32)
        self.head.tie_to(self.embed)


class VisionGraph(nn.Module):
    def __init__(self, model: TinyModel) -> None:
        super().__init__()
        self.patch = model.patch

    def forward(self, pixels):
        return self.patch(pixels).flatten(2).transpose(1, 2).flatten(0, 1)


class EmbedGraph(nn.Module):
    def __init__(self, model: TinyModel) -> None:
        super().__init__()
        self.tokens = model.embed

    def forward(self, ids):
        return self.tokens(ids)


class DecoderGraph(nn.Module):
    def __init__(self, model: TinyModel) -> None:
        super().__init__()
        self.inner = model

    def forward(self, x):
        m = self.inner
        q, k, v = m.q(x), m.k(x), m.v(x)
        hidden = x + m.mix(v * torch.sigmoid(torch.cat([q * k, k], -1)))
        tap = hidden
        hidden = hidden + m.down(torch.nn.functional.silu(m.gate(hidden)) * m.up(hidden))
        return m.head(hidden[:, -1]), tap


def tiny_graphs(model: TinyModel) -> list[GraphSpec]:
    batch, length = Dim("batch"), Dim("sequence")
    ids = torch.tensor([[1, 2, 3], [4, 5, 255]])
    x = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0))
    pixels = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    taps = ("decoder.layers.0",)
    return [
        GraphSpec(
            "vision", VisionGraph(model).eval(), (pixels,), ("pixels",), ("image_features",), ({0: Dim("tiles")},)
        ),
        GraphSpec("embed", EmbedGraph(model).eval(), (ids,), ("ids",), ("inputs_embeds",), ({0: batch, 1: length},)),
        GraphSpec(
            "decoder", DecoderGraph(model).eval(), (x,), ("x",), ("logits", *taps), ({0: batch, 1: length},), taps
        ),
    ]
