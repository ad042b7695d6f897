"""Random layers to quantize: heavy-tailed weights, columns of high and low energy, correlated inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def random_moment(columns: int, generator: torch.Generator, tokens_per_column: int = 4) -> Tensor:
    """float32[n, n]: second moment of correlated inputs whose columns differ in size."""
    inputs = torch.randn(tokens_per_column * columns, columns, generator=generator)
    mix = torch.eye(columns) + 0.4 * torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = inputs @ mix * torch.exp(0.7 * torch.randn(columns, generator=generator))
    return inputs.T @ inputs / len(inputs)


def random_layer(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(weight float32[m, n], moment float32[n, n])."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * (0.02 + 0.02 * torch.rand(rows, 1, generator=generator))
    weight *= torch.exp(0.4 * torch.randn(rows, columns, generator=generator))
    return weight, random_moment(columns, generator)
