"""A group cut along its inputs into K-segments, each in a code of its own; the error of one is answered by the others.

This is block LDL with the segment as the block (mgvq-algorithm 2.5). With S = U D Uᵀ, U unit block-upper-triangular:

    tr(E S Eᵀ) = Σ_s tr(η_s D_s η_sᵀ)        η_s = T_s − Ŵ_s,   T_s = W_s + Σ_{r<s} E_r U_rs

so every segment is coded for its target T_s in its metric D_s, the Schur complement that is left of S_ss once the
columns after s have answered, S_AA − S_AB S_BB⁻¹ S_BA for the first segment A of two: completing the square in W_B. It
is the metric that one sweep over all columns has there too: segments change the code, not the feedback.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from toolchain.errors import NumericGateError, ShapeError
from toolchain.values import Segment, VQCode
from toolchain.vq.solve import quantize_group
from toolchain.vq.weights import Options, SegmentedGroup, SegmentedWeights, VQGroup

# Of the mean diagonal, where a moment that is damped already is factored again: float32 rounding, no more.
ROUNDING_DAMPING = 1e-6

# (targets float32[m_i, n], S float32[n, n], code, options, generator) → the group in one code.
Coder = Callable[[list[Tensor], Tensor, VQCode, Options, torch.Generator], VQGroup]


@dataclass(frozen=True)
class Step:
    """A segment's metric D_s float32[w, w], and the feedback U_rs float32[first, w] of all columns before it."""

    metric: Tensor
    feedback: Tensor


def segment_steps(moment: Tensor, widths: Sequence[int]) -> list[Step]:
    """The metric and feedback of every segment, first to last, from S float32[n, n], symmetric positive definite.

    From the reversed Cholesky factor S = R Rᵀ, R upper triangular: D_s = R_ss R_ssᵀ and U_rs = R_rs R_ss⁻¹.

    Raises:
        ShapeError: widths do not add up to n.
        NumericGateError: S is not definite, in float64 either.
    """
    if not widths or min(widths) < 1 or sum(widths) != len(moment):
        raise ShapeError(f"segments of {list(widths)} columns: expected positive counts that add up to {len(moment)}")
    upper = _upper_factor((moment + moment.T) / 2)
    steps, first = [], 0
    for width in widths:
        own = slice(first, first + width)
        diagonal = upper[own, own]
        feedback = torch.linalg.solve_triangular(diagonal, upper[:first, own], upper=True, left=False)
        steps.append(Step((diagonal @ diagonal.T).float(), feedback.float()))
        first += width
    return steps


def damped_steps(moment: Tensor, segments: Sequence[Segment], damping: float) -> list[Step]:
    """`segment_steps` of the second moment H float32[n, n], damped once, over all columns."""
    return segment_steps(_damped(moment.float(), damping), [segment.columns for segment in segments])


def _upper_factor(moment: Tensor) -> Tensor:
    for dtype in (torch.float32, torch.float64):
        lower, failed = torch.linalg.cholesky_ex(moment.to(dtype).flip(0, 1))
        if not int(failed):
            return lower.flip(0, 1)
    raise NumericGateError(
        f"damped second moment of {len(moment)} inputs: not positive definite even in float64; calibrate with more, "
        "and more diverse, samples, or raise options.damping"
    )


def quantize_segments(
    weights: list[Tensor],
    moment: Tensor,
    segments: Sequence[Segment],
    options: Options,
    generator: torch.Generator,
    coder: Coder = quantize_group,
) -> SegmentedGroup:
    """Codes, and a codebook and row scales a segment, of least tr(E H Eᵀ), segment by segment, exact given the earlier.

    Args:
        weights: float32[m_i, n] of layers that read the same input.
        moment: float32[n, n], the second moment H of that input; damped once, over all columns.
        segments: that cover the columns, first to last.
        generator: seeds the codebooks; the result depends on nothing else random.
        coder: codes one segment in its metric.

    Raises:
        ShapeError: weights, moment and segments do not fit one another.
        NumericGateError: H is zero or not finite.
    """
    columns = weights[0].shape[1]
    if any(w.ndim != 2 or w.shape[1] != columns for w in weights) or moment.shape != (columns, columns):
        shapes = [list(w.shape) for w in weights]
        raise ShapeError(f"expected weights [m_i, n] and a moment [n, n], found {shapes} and {list(moment.shape)}")
    steps = damped_steps(moment, segments, options.damping)
    rows = [len(weight) for weight in weights]
    stacked = torch.cat([weight.float() for weight in weights])
    error = torch.zeros_like(stacked)
    inner = replace(options, damping=ROUNDING_DAMPING)
    stored, losses = [], []
    for segment, step in zip(segments, steps):
        own = slice(segment.first, segment.first + segment.columns)
        targets = stacked[:, own] + error[:, : segment.first] @ step.feedback
        found = coder(list(targets.split(rows)), step.metric, segment.code, inner, generator)
        error[:, own] = stacked[:, own] - torch.cat([layer.decode().to(stacked) for layer in found.layers])
        stored.append(found.layers)
        losses.append(found.loss)
    layers = tuple(SegmentedWeights(parts) for parts in zip(*stored, strict=True))
    h = moment.float()
    errors = tuple(weighted_square(w - layer.decode().to(w), h) for w, layer in zip(weights, layers))
    return SegmentedGroup(layers, errors, tuple(weighted_square(w, h) for w in weights), tuple(losses))


def _damped(moment: Tensor, damping: float) -> Tensor:
    mean = float(moment.diagonal().mean())
    if not (mean > 0 and bool(torch.isfinite(moment).all())):
        raise NumericGateError(
            f"second moment of {len(moment)} inputs: expected finite values and a positive diagonal, found a mean "
            f"diagonal of {mean:g}; look for overflow in the activations, or inputs that never reach this layer"
        )
    return (moment + moment.T) / 2 + damping * mean * torch.eye(len(moment), device=moment.device)


def weighted_square(matrix: Tensor, moment: Tensor) -> float:
    """tr(X H Xᵀ) of X [m, n], summed in float64."""
    matrix = matrix.float()
    return float(((matrix @ moment) * matrix).sum(dtype=torch.float64))


def damped_square(matrix: Tensor, moment: Tensor, damping: float) -> float:
    """tr(X S Xᵀ) of X float32[m, n], S the moment damped as `quantize_segments` damps it."""
    return weighted_square(matrix, _damped(moment.float(), damping))
