"""The nearest codebook entry in the exact metric of a block, for all rows at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Scores held at a time: rows are taken in pieces so that rows * entries stays below this (0.25 GiB of float32).
SCORES_AT_A_TIME = 1 << 26

# (targets float32[m, V], metric float32[V, V], codebook float32[2^L, V], scales float32[m]) -> indices [m].
Search = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def index_dtype(entries: int) -> torch.dtype:
    """What indices of a codebook of so many entries are held in."""
    return torch.uint8 if entries <= 256 else torch.int16


def nearest_entries(targets: Tensor, metric: Tensor, codebook: Tensor, scales: Tensor) -> Tensor:
    """uint8[m]: per row the entry c that minimises (t − a·c) D (t − a·c)ᵀ.

    For a > 0 that is the least of a·(c D cᵀ) − 2·(t D)·c: one matrix product with V + 1 inner columns.

    Args:
        targets: float32[m, V].
        metric: float32[V, V], symmetric positive semidefinite (D_b).
        codebook: float32[2^L, V], at most 256 entries.
        scales: float32[m], not negative.
    """
    norms = ((codebook @ metric) * codebook).sum(dim=1)
    entries = torch.cat([-2 * codebook.T, norms[None]])
    queries = torch.cat([targets @ metric, scales[:, None]], dim=1)
    rows = max(1, SCORES_AT_A_TIME // len(codebook))
    return torch.cat([(part @ entries).argmin(dim=1) for part in queries.split(rows)]).to(torch.uint8)
