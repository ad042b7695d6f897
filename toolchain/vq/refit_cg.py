"""Codebook and row scales refitted to codes that are fixed, on tr(S_o E S Eᵀ) with all its coupling.

The codebook's normal equations, (2^L · V)² of them with every pair of blocks coupled, are never written down: conjugate
gradients decode a codebook, pull it through S and S_o, and add up what each entry gets (mgvq-algorithm 4.4). The
scales' are one m × m system a layer (4.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from toolchain.values import VQCode
from toolchain.vq.codebook import Cells, round_codebook, solve_cells
from toolchain.vq.descent import Descent, descend
from toolchain.vq.kronecker import Objective, RowBlock, best_of
from toolchain.vq.scales import REFIT_RANGE, refit_scales, stored_scales
from toolchain.vq.solve import Solution, weighted_loss
from toolchain.vq.weights import Problem, decode_stacked

ITERATIONS = 20  # a codebook starts near its optimum; on the demo's layers 10 more take off less than 0.1 % of the loss
SMALLEST_RESIDUAL = 1e-5  # of the first: where float32 sums stop telling directions apart
RIDGE = 1e-6  # of the mean diagonal of the scales' system, for rows that decode alike


def refit_codebook_cg(
    objective: Objective, indices: Tensor, scales: Tensor, codebook: Tensor, iterations: int = ITERATIONS
) -> Tensor:
    """float32[2^L, V]: the codebook of least tr(S_o E S Eᵀ) for these codes, by conjugate gradients from `codebook`.

    Preconditioned by each entry's own V×V normal equations. Entries that no code uses stay as they are.

    Args:
        indices: integers [m, n / V].
        scales: [m], at which an entry is a weight.
        codebook: [2^L, V], where to start.
    """
    codebook, scales, chosen = codebook.float(), scales.float(), indices.long().flatten()

    def gathered(pulled: Tensor) -> Tensor:
        scaled = (pulled * scales[:, None]).reshape(-1, codebook.shape[1])
        return torch.zeros_like(codebook).index_add_(0, chosen, scaled)

    own = entry_weights(objective, indices, scales, len(codebook))
    nothing = torch.zeros_like(codebook)
    residual = gathered(objective.pulled(objective.weight - decode_stacked(indices, codebook, scales)))
    enough = SMALLEST_RESIDUAL * float(residual.norm())
    step = solve_cells(Cells(own, residual), nothing)
    direction, worth = step, (step * residual).sum(dtype=torch.float64)
    for _ in range(iterations):
        if not float(residual.norm()) > enough:
            break
        bent = gathered(objective.pulled(decode_stacked(indices, direction, scales)))
        length = float(worth / (direction * bent).sum(dtype=torch.float64))
        codebook = codebook + length * direction
        residual = residual - length * bent
        step = solve_cells(Cells(own, residual), nothing)
        before, worth = worth, (step * residual).sum(dtype=torch.float64)
        direction = step + float(worth / before) * direction
    return codebook


def entry_weights(objective: Objective, indices: Tensor, scales: Tensor, entries: int) -> Tensor:
    """float32[2^L, V, V]: Σ (S_o)_ii a_i² S_kk over the places that use each entry, as if none were coupled."""
    blocks = indices.shape[1]
    vector = len(objective.moment) // blocks
    square = objective.moment.reshape(blocks, vector, blocks, vector)
    metrics = square.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    mass = objective.moment.new_zeros(entries * blocks)
    place = indices.long() * blocks + torch.arange(blocks, device=indices.device)
    row_importance = (objective.counts * scales.square())[:, None]
    mass.index_add_(0, place.flatten(), row_importance.expand(-1, blocks).flatten())
    return (mass.view(entries, blocks) @ metrics.flatten(1)).view(entries, vector, vector)


def refit_scales_coupled(objective: Objective, unit: Tensor, start: Tensor) -> Tensor:
    """float32[m]: the row scales of least tr(S_o E S Eᵀ), (S_o ∘ (Q S Qᵀ)) a = diag(S_o W S Qᵀ) (mgvq-algorithm 4.2).

    Solved in float64 a block of coupled rows; a row of scale 0 keeps it. Clamped to REFIT_RANGE times `start`, so that
    the result is the optimum only where it lies inside.

    Args:
        unit: float32[m, n], Q, the decoded rows at scale 1.
        start: float32[m].
    """
    fitted = [_fitted_scales(objective, block, unit[block.rows], start[block.rows]) for block in objective.blocks]
    return torch.clamp(torch.cat(fitted), REFIT_RANGE[0] * start, REFIT_RANGE[1] * start)


def _fitted_scales(objective: Objective, block: RowBlock, unit: Tensor, start: Tensor) -> Tensor:
    weight = objective.weight[block.rows]
    if block.factor is None:
        return refit_scales(weight, unit, objective.moment, start)
    live = (start > 0).double()
    pulled = unit @ objective.moment
    system = block.factor.double() * (pulled @ unit.T).double() * live * live[:, None]
    right = ((block.factor @ weight) * pulled).sum(dim=1, dtype=torch.float64) * live
    ridge = RIDGE * system.diagonal().mean()
    # Held to the start by the ridge, and where nothing is decoded by a 1.
    hold = ridge + (1 - live)
    return torch.linalg.solve(system + torch.diag(hold), right + ridge * start.double()).float()


def refit(
    problem: Problem, start: Solution, code: VQCode, objective: Objective, *, keeps_codebook: bool = False
) -> Solution:
    """The start with the codebook, then the scales, that lose least as stored; what does not lose less is not taken.

    Args:
        keeps_codebook: others use it too: the scales alone are fitted.
    """

    def loss(one: Solution) -> float:
        return objective.loss(one.decode())

    best = start
    if not keeps_codebook:
        fitted = refit_codebook_cg(objective, start.indices, start.scales, start.codebook)
        best, _ = best_of([start, *_stored_codebooks(start, fitted, code, objective)], loss)
    return refit_stored_scales(problem, best, objective)


def refit_stored_scales(problem: Problem, start: Solution, objective: Objective) -> Solution:
    """The start with the scales that lose least as stored, where they lose less; codes and codebook stay."""
    unit = decode_stacked(start.indices, start.codebook, torch.ones_like(start.scales))
    scales = stored_scales(refit_scales_coupled(objective, unit, start.scales.float()))
    best, _ = best_of([start, replace(start, scales=scales)], lambda one: objective.loss(one.decode()))
    return replace(best, loss=weighted_loss(problem, best.decode()))


def _stored_codebooks(start: Solution, codebook: Tensor, code: VQCode, objective: Objective) -> list[Solution]:
    """The start with a float32 codebook rounded at the scales it has, and at those that spend an int8's range on it."""
    scales = start.scales.float()
    weights = entry_weights(objective, start.indices, scales, code.entries)
    stored, step = round_codebook(codebook, Cells(weights, torch.zeros_like(codebook)), code)
    found = [replace(start, codebook=stored, scales=stored_scales(scales * step))]
    if stored.dtype == torch.int8:
        found.append(replace(start, codebook=codebook.round().clamp(-127, 127).to(torch.int8)))
    return found


def refine(
    problem: Problem,
    start: Solution,
    code: VQCode,
    damped: Tensor,
    row_factors: Sequence[Tensor | None] | None = None,
    settings: Descent | None = None,
    rounds: int = 2,
    keeps_codebook: bool = False,
) -> Solution:
    """`rounds` times sweeps of coordinate descent, then the codebook and scales for the codes found; never worse.

    Args:
        problem, start, code, damped, row_factors, settings: as for `descent.descend`.
        keeps_codebook: as for `refit`.
    """
    objective = Objective.of(problem, damped, row_factors)
    found = start
    for _ in range(rounds):
        descended = descend(problem, found, code, damped, row_factors, settings)
        found = refit(problem, descended, code, objective, keeps_codebook=keeps_codebook)
    return found
