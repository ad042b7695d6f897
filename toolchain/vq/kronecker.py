"""The objective with output curvature, tr(S_o E S_i Eᵀ) with E = Ŵ − W, of a group whose layers share a codebook.

S_o is block-diagonal over the group's layers: what one layer puts out does not bend what another does. The rows of a
layer without one count r, the problem's row weights, each on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toolchain.errors import ShapeError
from toolchain.vq.weights import Problem

# Layers of a group are taken as one block-diagonal S_o up to so many rows, 64 MiB: fewer, larger calls.
MERGED_ROWS = 4096


@dataclass(frozen=True)
class RowBlock:
    """Rows `first` … `last` − 1 of a stacked problem, coupled by S_o float32[m, m] to one another and to no others.

    `factor` is None where no row is coupled to another; `counts` float32[m] is then r, else the diagonal of S_o.
    """

    first: int
    last: int
    factor: Tensor | None
    counts: Tensor

    @property
    def rows(self) -> slice:
        return slice(self.first, self.last)

    def pulled(self, pulled: Tensor) -> Tensor:
        """S_o X of X float32[m, n]."""
        return self.counts[:, None] * pulled if self.factor is None else self.factor @ pulled


@dataclass(frozen=True)
class Objective:
    """tr(S_o E S Eᵀ): W float32[m, n], S float32[n, n] damped as the sweep damps it, and S_o by blocks of rows."""

    weight: Tensor
    moment: Tensor
    blocks: tuple[RowBlock, ...]

    @classmethod
    def of(cls, problem: Problem, damped: Tensor, row_factors: Sequence[Tensor | None] | None = None) -> Objective:
        """The objective of a stacked problem.

        Args:
            damped: float32[n, n], `Factors.damped` of the problem's moment, zero on padding columns.
            row_factors: S_o float32[m_i, m_i] a layer, damped; None where rows count as `problem.row_weights`, for
                one layer or for all.

        Raises:
            ShapeError: there is not one S_o of its rows, or None, for every layer.
        """
        if row_factors is None or all(factor is None for factor in row_factors):
            return cls(problem.weight, damped, (RowBlock(0, len(problem.weight), None, problem.row_weights),))
        shapes = [None if factor is None else tuple(factor.shape) for factor in row_factors]
        wanted = [(rows, rows) for rows in problem.rows]
        if len(shapes) != len(wanted) or any(f not in (None, w) for f, w in zip(shapes, wanted)):
            raise ShapeError(
                f"expected one output curvature [m, m] for each layer of {list(problem.rows)} rows, found {shapes}"
            )
        # A padding row weighs nothing at scale 0; the 1 on its diagonal keeps every division by one finite.
        padded = [None if f is None else _padded(f, held) for f, held in zip(row_factors, problem.held, strict=True)]
        given = [factor for factor in padded if factor is not None]
        if len(given) == len(padded) and len(problem.weight) <= MERGED_ROWS:
            merged = torch.block_diag(*given)
            return cls(problem.weight, damped, (RowBlock(0, len(merged), merged, merged.diagonal()),))
        blocks, first = [], 0
        for factor, held in zip(padded, problem.held):
            rows = slice(first, first + held)
            counts = problem.row_weights[rows] if factor is None else factor.diagonal()
            blocks.append(RowBlock(first, first + held, factor, counts))
            first += held
        return cls(problem.weight, damped, tuple(blocks))

    @property
    def counts(self) -> Tensor:
        """float32[m]: what an error in each row counts by itself, the diagonal of S_o."""
        return torch.cat([block.counts for block in self.blocks])

    def pulled(self, matrix: Tensor) -> Tensor:
        """S_o X S float32[m, n] of X float32[m, n]: half the gradient where X = E."""
        pulled = matrix @ self.moment
        return torch.cat([block.pulled(pulled[block.rows]) for block in self.blocks])

    def loss(self, decoded: Tensor) -> float:
        """tr(S_o E S Eᵀ) of Ŵ float32[m, n], summed in float64."""
        error = decoded - self.weight
        return float((self.pulled(error) * error).sum(dtype=torch.float64))


def _padded(factor: Tensor, held: int) -> Tensor:
    extra = held - len(factor)
    return torch.block_diag(factor.float(), torch.eye(extra, device=factor.device)) if extra else factor.float()


def best_of(candidates: list, loss: Callable) -> tuple:
    """(the candidate of least loss, its loss); the first of equals."""
    losses = [loss(candidate) for candidate in candidates]
    least = min(range(len(candidates)), key=losses.__getitem__)
    return candidates[least], losses[least]
