"""Scalar GPTQ (arXiv 2210.17323): uniform levels, one searched scale a row, exact feedback from column to column.

Stored exactly as `rtn` stores its levels, so that the two differ in nothing but where each weight is rounded to. The
variant behind a rotation of the inputs is `baselines.rotated`: a checkpoint cannot hold it, this one it can.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toolchain.quantize.baselines.rtn import best_scales, level_count, pack_levels
from toolchain.values import VQCode
from toolchain.vq.factor import factor_moment
from toolchain.vq.scales import refit_scales, rms_scales, stored_scales
from toolchain.vq.sweep import sweep
from toolchain.vq.weights import Options, Problem, VQGroup, decode_stacked, output_errors, stack_group

# Half steps tried, over 2 / levels of the row's RMS, which is near the best of a Gaussian row. Far beyond it, because
# a single weight of 30 RMS in a high-energy column can be worth a coarse step for the rest of its row.
LOWEST_STEP, HIGHEST_STEP, STEPS_TRIED = 0.5, 30.0, 32


def weighted_scales(problem: Problem, importance: Tensor, levels: int) -> Tensor:
    """float16[m]: half steps of least Σ_j importance_j · (w_j − ŵ_j)² on a geometric grid of multiples of the RMS."""
    grid = torch.logspace(0, 1, STEPS_TRIED, base=HIGHEST_STEP / LOWEST_STEP, device=problem.weight.device)
    tried = (LOWEST_STEP * 2 / levels) * grid[:, None] * rms_scales(problem.weight, problem.columns)
    return best_scales(problem.weight, levels, tried, importance)


def quantize_group(
    weights: list[Tensor], moment: Tensor, code: VQCode, options: Options, generator: torch.Generator
) -> VQGroup:
    """Levels of least tr(E H Eᵀ), column by column: each column's error is fed to the columns after it.

    GPTQ is one sweep with fixed scales. Here it gets what the other methods get: after each of `options.rounds` sweeps
    the scales are refitted to the levels found, and the best round is kept; with one round it is GPTQ with refitted
    scales. Nothing is random.
    """
    levels = level_count(code)
    problem = stack_group(weights, moment, code)
    factors = factor_moment(problem.moment, problem.columns, 1, options.damping)
    codebook = torch.arange(1 - levels, levels, 2, device=problem.weight.device)[:, None]
    scales = weighted_scales(problem, factors.pivots.flatten(), levels)
    rounds = []
    for _ in range(options.rounds):
        numbers, _ = sweep(problem.weight, factors, codebook, scales, options.batch_columns)
        unit = decode_stacked(numbers, codebook, torch.ones_like(scales))
        scales = stored_scales(refit_scales(problem.weight, unit, factors.damped, scales.float()))
        error = output_errors(problem.weight - unit * scales.float()[:, None], problem)
        rounds.append((float(error.sum()), numbers, scales))
    _, numbers, scales = min(rounds, key=lambda one: one[0])
    return pack_levels(problem, numbers.long(), scales, code)
