"""MGVQ for one group of layers: a codebook trained in the block metric, sweeps with feedback, scales and codebook
refits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from toolchain.values import VQCode
from toolchain.vq.codebook import (
    Cells,
    Samples,
    draw_chunks,
    draw_samples,
    round_codebook,
    solve_cells,
    sweep_cells,
    train_codebook,
    train_paths,
)
from toolchain.vq.factor import factor_moment
from toolchain.vq.scales import refit_scales, rms_scales, stored_scales
from toolchain.vq.sweep import sweep
from toolchain.vq.trellis import search_for
from toolchain.vq.weights import (
    FixedCodebook,
    Options,
    Problem,
    VQGroup,
    decode_stacked,
    output_errors,
    pack_group,
    stack_group,
)


def safe_divisor(scales: Tensor) -> Tensor:
    """The scales with 1 in place of 0, for dividing a row of zeros."""
    return torch.where(scales > 0, scales, 1.0)


@dataclass(frozen=True)
class Solution:
    """Codes of a problem as they are stored: indices [m, n / V] (windows where L > k), codebook, scales float16[m]; the
    loss Σ_i r_i e_i H e_iᵀ they come to.
    """

    indices: Tensor
    codebook: Tensor
    scales: Tensor
    loss: float

    def decode(self) -> Tensor:
        """Ŵ float32[m, n] of the padded problem."""
        return decode_stacked(self.indices, self.codebook, self.scales)


def draw_problem(
    problem: Problem, pivots: Tensor, scales: Tensor, code: VQCode, count: int, generator: torch.Generator
) -> Samples:
    """At most `count` vectors of the weights at unit scale, in whole chunks where windows overlap, with what an error
    in each counts before any feedback.

    Args:
        pivots: float32[n / V, V, V] of the sweep's factorization.
        scales: float32[m], by which rows are divided.
    """
    unit = problem.weight / safe_divisor(scales)[:, None]
    row_importance = problem.row_weights * scales.square()
    draw = draw_chunks if code.window > code.shift else draw_samples
    return draw(unit, pivots, row_importance, count, generator)


def train_samples(samples: Samples, code: VQCode, rounds: int, generator: torch.Generator) -> tuple[Tensor, Cells]:
    """(codebook float32[2^L, V], its cells) trained on samples that `draw_problem` gives."""
    if code.window > code.shift:
        return train_paths(samples, code, rounds, generator)
    return train_codebook(samples, code.entries, rounds, generator)


def quantize_group(
    weights: list[Tensor],
    moment: Tensor,
    code: VQCode,
    options: Options,
    generator: torch.Generator,
    row_weights: list[Tensor] | None = None,
) -> VQGroup:
    """Codes, one codebook and row scales of least Σ_i r_i e_i H e_iᵀ that `solve_problem` finds, packed.

    Args:
        weights: float32[m_i, n] of layers that read the same input.
        moment: float32[n, n], the second moment H of that input.
        generator: seeds the codebook; the result depends on nothing else random.
        row_weights: float32[m_i] a layer, r, what an error in each row counts; 1 where None.
    """
    problem = stack_group(weights, moment, code, searches_paths=True, row_weights=row_weights)
    found = solve_problem(problem, code, options, generator)
    return pack_group(problem, found.indices, found.codebook, found.scales, code)


def solve_problem(problem: Problem, code: VQCode, options: Options, generator: torch.Generator) -> Solution:
    """The best of `options.rounds` rounds.

    A round is a sweep with the scales and codebook exactly as stored, a closed-form refit of the scales for the codes
    found, and an update of the codebook on the sweep's fed-back targets; a codebook that `options.codebooks` gives
    stays.
    """
    factors = factor_moment(problem.moment, problem.columns, code.vector, options.damping)
    start = rms_scales(problem.weight, problem.columns)
    given = options.codebooks.get(code)
    if given is None:
        samples = draw_problem(problem, factors.pivots, start, code, options.samples, generator)
        codebook, cells = train_samples(samples, code, options.lloyd_rounds, generator)
    search = search_for(code, problem.row_weights)
    worth = start  # the scale at which an entry of the unrounded codebook is a weight
    rounds = []
    for _ in range(options.rounds):
        stored, step = _placed(given, start) if given else round_codebook(codebook, cells, code)
        scales = stored_scales(worth * step)
        indices, targets = sweep(problem.weight, factors, stored, scales, options.batch_columns, search)
        unit = decode_stacked(indices, stored, torch.ones_like(scales))
        scales = stored_scales(refit_scales(problem.weight, unit, factors.damped, scales.float()))
        rounds.append(Solution(indices, stored, scales, weighted_loss(problem, unit * scales.float()[:, None])))
        worth = scales.float() / step
        if given is not None:
            continue
        cells = sweep_cells(targets, indices, factors.pivots, worth, code.entries, problem.row_weights)
        codebook = solve_cells(cells, codebook)
    return min(rounds, key=lambda one: one.loss)


def _placed(given: FixedCodebook, beside: Tensor) -> tuple[Tensor, float]:
    """(codebook as stored, step), on the device of `beside`."""
    return given.stored.to(beside.device), given.step


def weighted_loss(problem: Problem, decoded: Tensor) -> float:
    """Σ_i r_i e_i H e_iᵀ of Ŵ float32[m, n]."""
    return float((output_errors(problem.weight - decoded, problem) * problem.row_weights).sum())
