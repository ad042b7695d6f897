"""The codebook that fits codes already chosen best: least squares in the metric of the layer's output."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Linear = Callable[[Tensor], Tensor]


def refit_codebook(
    weight: Tensor, moment: Tensor, codebook: Tensor, decode: Linear, gather: Linear, steps: int
) -> Tensor:
    """float32[K, V]: a codebook of lower tr((W − decode(T)) H (W − decode(T))ᵀ) by `steps` of conjugate gradients.

    An entry that no code names stays as it is.

    Args:
        weight: float32[m, n].
        moment: float32[n, n], H.
        codebook: float32[K, V], where to start.
        decode: T [K, V] → Ŵ [m, n], linear.
        gather: its transpose, [m, n] → [K, V].
    """
    codebook = codebook.clone()
    residual = gather((weight - decode(codebook)) @ moment)
    direction, squared = residual, residual.square().sum()
    floor = 1e-12 * squared
    for _ in range(steps):
        if float(squared) <= float(floor):
            break
        curved = gather(decode(direction) @ moment)
        length = squared / (direction * curved).sum()
        codebook += length * direction
        residual = residual - length * curved
        last, squared = squared, residual.square().sum()
        direction = residual + squared / last * direction
    return codebook


def sum_by_index(values: Tensor, indices: Tensor, entries: int) -> Tensor:
    """float32[K, V]: the sum of the vectors float32[N, V] of each index int64[N], the transpose of a codebook
    lookup.
    """
    return torch.zeros(entries, values.shape[1], dtype=values.dtype, device=values.device).index_add_(
        0, indices, values
    )
