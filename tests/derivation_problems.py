"""Layers small enough for dense float64 algebra, with their loss and a codebook: what the derivation is checked on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from toolchain.vq.codebook import Samples, train_codebook
from toolchain.vq.curvature import newton_shift, quadratic
from toolchain.vq.factor import Factors, factor_moment
from toolchain.vq.sweep import sweep
from toolchain.vq.weights import decode_stacked

UNDAMPED = (0.0, 0.0)
INFINITE = 1e30  # a quantization error so large that the trust region never binds


def definite(size: int, power: float, generator: torch.Generator) -> Tensor:
    """float32[n, n]: eigenvalues j^−power in a random basis, mean diagonal 1."""
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    values = torch.arange(1, size + 1, dtype=torch.float64) ** -power + 1e-2
    factor = (basis * values) @ basis.T
    return (factor * size / factor.trace()).float()


@dataclass(frozen=True)
class Case:
    """A layer, its loss, and a codebook for it: W, G float32[m, n], S_o [m, m], factors of S_i, codebook float16[K,
    V].
    """

    weight: Tensor
    gradient: Tensor
    rows: Tensor
    factors: Factors
    codebook: Tensor

    @property
    def columns(self) -> Tensor:
        return self.factors.damped

    @property
    def shifted(self) -> Tensor:
        """W* = W − S_o⁻¹ G S_i⁻¹ (equation 8)."""
        return self.weight - newton_shift(self.gradient, self.rows, self.columns, UNDAMPED)

    def code(self, target: Tensor, factors: Factors | None = None) -> tuple[Tensor, Tensor]:
        """(Ŵ, fed-back targets T) of the sweep on `target`."""
        ones = torch.ones(len(target), dtype=torch.float16)
        indices, targets = sweep(target, factors or self.factors, self.codebook, ones, batch_columns=16)
        return decode_stacked(indices, self.codebook, ones), targets

    def loss(self, decoded: Tensor) -> float:
        """Q(Ŵ − W)."""
        difference = decoded - self.weight
        linear = float((self.gradient * difference).sum(dtype=torch.float64))
        return linear + quadratic(difference, self.rows, self.columns)


def plain_codebook(weight: Tensor, vector: int, entries: int) -> Tensor:
    """float16[K, V] by k-means on the weights, all errors alike."""
    vectors = weight.reshape(-1, vector)
    samples = Samples(vectors, torch.eye(vector).expand(len(vectors), -1, -1))
    return train_codebook(samples, entries, 8, torch.Generator().manual_seed(1))[0].half()


def case_of(seed: int, rows: int = 6, columns: int = 24, drift: float = 0.3, entries: int = 16) -> Case:
    """Gradients are those of a minimum that lies `drift` · randn away from W."""
    generator = torch.Generator().manual_seed(seed)
    row_factor, moment = definite(rows, 0.8, generator), definite(columns, 0.8, generator)
    weight = torch.randn(rows, columns, generator=generator)
    factors = factor_moment(moment, columns, 4, damping=0.01)
    gradient = row_factor @ (drift * torch.randn(rows, columns, generator=generator)) @ factors.damped
    return Case(weight, gradient, row_factor, factors, plain_codebook(weight, 4, entries))
