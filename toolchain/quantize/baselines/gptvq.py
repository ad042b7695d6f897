"""GPTVQ-style vector quantization (arXiv 2402.15319): vectors along inputs, and nothing but diagonals of their metric.

Our own code from the paper's public description. Vectors are assigned and the codebook is trained with the diagonal of
what is left of the metric at a column, 1 / [H⁻¹]_jj over the columns not yet coded; a column's error is fed to the
columns after its vector as scalar GPTQ would, as if the columns inside a vector did not touch one another; last, the
codebook is fitted to the codes. Where the released code departs from that to its own loss (the root of the weight in
the assignment, its inverse in the k-means) this does not follow it.

What is simpler than the paper: one codebook for all layers of a group, where the paper has one for every few thousand
weights, at more bits a weight; a float16 scale a row, where it has 4-bit ones for blocks of a row; the codebook is
fitted by conjugate gradients, which reach what its gradient descent goes towards; no low-rank coding of codebooks. What
it gets that the paper does not have: row scales are refitted to the codes last, as MGVQ's and GPTQ's are here (6 % of
the error on the built-in model's layers at 2 bits). Scales, codebook and codes are stored, and counted, as those of
MGVQ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toolchain.quantize.baselines.refit import refit_codebook, sum_by_index
from toolchain.values import VQCode
from toolchain.vq.assign import nearest_entries
from toolchain.vq.codebook import draw_samples, round_codebook, train_codebook
from toolchain.vq.factor import Factors, factor_moment
from toolchain.vq.scales import refit_scales, rms_scales, stored_scales
from toolchain.vq.solve import safe_divisor
from toolchain.vq.weights import Options, Problem, VQGroup, decode_stacked, output_errors, pack_group, stack_group

REFIT_STEPS = 25


def diagonal_sweep(weight: Tensor, factors: Factors, codebook: Tensor, scales: Tensor, batch_columns: int) -> Tensor:
    """Indices uint8[m, n / V] with feedback that ignores the coupling inside a vector.

    With H = U D Uᵀ, U unit upper triangular and N = U⁻¹, every column p of a vector is charged with T_p − Ŵ_p, and all
    columns F after the vector become T_F ← T_F − Σ_p (T_p − Ŵ_p) · N_pF. For V = 1 that is exact: it is GPTQ.

    Args:
        weight: float32[m, n].
        factors: of the damped second moment, with V = 1.
        codebook: [2^L, V], as stored.
        scales: float16[m], as stored.
        batch_columns: columns a batch, a multiple of V.
    """
    entries, row_scales = codebook.float(), scales.float()
    vector, columns = entries.shape[1], weight.shape[1]
    identity = torch.eye(columns, device=weight.device)
    feed = torch.linalg.solve_triangular(factors.unit, identity, upper=True, unitriangular=True)
    pivots = factors.pivots.flatten()
    targets, error = weight.clone(), torch.empty_like(weight)
    indices = torch.empty(weight.shape[0], columns // vector, dtype=torch.uint8, device=weight.device)
    for first in range(0, columns, batch_columns):
        last = min(first + batch_columns, columns)
        for at in range(first, last, vector):
            block = slice(at, at + vector)
            chosen = nearest_entries(targets[:, block], pivots[block].diag(), entries, row_scales)
            indices[:, at // vector] = chosen
            error[:, block] = targets[:, block] - entries[chosen.long()] * row_scales[:, None]
            targets[:, at + vector : last] -= error[:, block] @ feed[block, at + vector : last]
        targets[:, last:] -= error[:, first:last] @ feed[first:last, last:]
    return indices


def refitted(problem: Problem, moment: Tensor, indices: Tensor, codebook: Tensor, scales: Tensor) -> Tensor:
    """float32[2^L, V]: the codebook refitted to these indices, in weights at unit scale."""
    flat, vector = indices.long().flatten(), codebook.shape[1]

    def gather(gradient: Tensor) -> Tensor:
        return sum_by_index((gradient * scales.float()[:, None]).reshape(-1, vector), flat, len(codebook))

    def decode(entries: Tensor) -> Tensor:
        return decode_stacked(indices, entries, scales)

    return refit_codebook(problem.weight, moment, codebook.float(), decode, gather, REFIT_STEPS)


def quantize_group(
    weights: list[Tensor], moment: Tensor, code: VQCode, options: Options, generator: torch.Generator
) -> VQGroup:
    """A codebook trained in the diagonal metric, one sweep with diagonal feedback, codebook and scales fitted to
    codes.
    """
    problem = stack_group(weights, moment, code)
    factors = factor_moment(problem.moment, problem.columns, 1, options.damping)
    start = rms_scales(problem.weight, problem.columns)
    unit = problem.weight / safe_divisor(start)[:, None]
    metrics = factors.pivots.reshape(-1, code.vector).diag_embed()
    samples = draw_samples(unit, metrics, start.square(), options.samples, generator)
    codebook, cells = train_codebook(samples, code.entries, options.lloyd_rounds, generator)
    stored, step = round_codebook(codebook, cells, code)
    scales = stored_scales(start * step)
    indices = diagonal_sweep(problem.weight, factors, stored, scales, options.batch_columns)
    fitted, factor = round_codebook(refitted(problem, factors.damped, indices, stored, scales), cells, code)
    tried = [(stored, scales), (fitted, stored_scales(scales.float() * factor))]
    unit = decode_stacked(indices, fitted, torch.ones_like(scales))
    tried.append((fitted, stored_scales(refit_scales(problem.weight, unit, factors.damped, tried[-1][1].float()))))
    losses = [float(output_errors(problem.weight - decode_stacked(indices, *one), problem).sum()) for one in tried]
    stored, scales = tried[losses.index(min(losses))]
    return pack_group(problem, indices, stored, scales, code)
