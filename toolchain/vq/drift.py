"""The first-order term: weights shifted, once, towards what full precision would have put out for the inputs that the
quantized layers before really give.

With x_q the quantized prefix's inputs and x_f the full-precision ones, min over W' of E‖W x_f − W' x_q‖² is
W* = W C S_q⁻¹, C = E[x_f x_qᵀ], S_q = E[x_q x_qᵀ] (mgvq-algorithm 2.7, equation 13; the objective of GPTAQ,
arXiv 2504.02692). The step W* − W is taken as far as the other half of the samples agrees (2.8, equation 14).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toolchain.vq.curvature import solve_factor

# Shares of the mean diagonal tried as Tikhonov damping of S_q; the one whose step serves the other half best is kept.
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)
LEAST_STEP = 0.05  # below it the step is noise and is left out
# Rows per column above which W P is multiplied out. CPU seconds by the map against by the rows, one thread of a busy
# machine, interleaved: 384 rows of 2240 columns 4.1 against 1.5, 1152 of 896 0.69 against 0.51, 4480 of 448 0.51
# against 0.59.
TALL = 4
TRUST = 0.3  # of the quantization error's norm: as far as the quadratic model of the loss is believed


@dataclass(frozen=True)
class Pair:
    """Sums over tokens, weighted: token weight Σ w, S_q Σ w x_q x_qᵀ, C Σ w x_f x_qᵀ; means Σ w x_q and Σ w x_f,
    [n].
    """

    token_weight: float
    moment: Tensor
    cross: Tensor
    mean: Tensor
    full_mean: Tensor

    @property
    def second_moment(self) -> Tensor:
        """S_q float32[n, n], the mean over tokens."""
        return self.moment / self.token_weight

    @classmethod
    def of(cls, rows: Tensor, full: Tensor, token_weight: Tensor) -> Pair:
        """Of inputs x_q and x_f float32[N, n] with token weights float32[N]."""
        weighted = rows * token_weight[:, None]
        cross = weighted.T @ rows if full is rows else (full * token_weight[:, None]).T @ rows
        moment = cross if full is rows else weighted.T @ rows
        return cls(
            float(token_weight.sum()), moment, cross, weighted.sum(dim=0), (full * token_weight[:, None]).sum(dim=0)
        )

    def added(self, other: Pair | None) -> Pair:
        if other is None:
            return self
        moment = self.moment + other.moment
        is_shared = self.cross is self.moment and other.cross is other.moment  # x_f is x_q: held once
        return Pair(
            self.token_weight + other.token_weight,
            moment,
            moment if is_shared else self.cross + other.cross,
            self.mean + other.mean,
            self.full_mean + other.full_mean,
        )


@dataclass(frozen=True)
class PairMoments:
    """Both halves of the samples, `halves`, and their sum, `whole`, which has token weight 1."""

    whole: Pair
    halves: tuple[Pair, Pair] | None

    @classmethod
    def merged(cls, halves: Sequence[Pair | None]) -> PairMoments:
        """From the sums of both halves; with one alone there is nothing to hold a step against."""
        present = [half for half in halves if half is not None]
        if len(present) < 2:
            return cls(present[0], None)
        return cls(present[0].added(present[1]), (present[0], present[1]))


@dataclass(frozen=True)
class Shift:
    """The shift float32[m, n] to add to W (zero where the gate closed), its step η, and its regression's damping."""

    value: Tensor
    step: float
    damping: float


def regression(pair: Pair, damping: float) -> Tensor:
    """P = C S_q⁻¹ − I, float32[n, n]: W + W P maps x_q to what W makes of x_f, as nearly as a linear map can."""
    moment, cross = pair.second_moment, pair.cross / pair.token_weight
    return solve_factor(moment, (cross - moment).T, damping, "input moment").T


def pull(weight: Tensor, pair: Pair) -> Tensor:
    """W (C − S_q) float32[m, n]: what drift pulls W towards, the gradient of ½ E‖W x_f − W' x_q‖² at W, negated."""
    return weight @ ((pair.cross - pair.moment) / pair.token_weight)


def fitted_shift(weight: Tensor, pulled: Tensor, pair: Pair, damping: float) -> Tensor:
    """W P float32[m, n], `pulled` being `pull` of W: by its m rows where P has n; by P where W is TALL."""
    if len(weight) > TALL * weight.shape[1]:
        return weight @ regression(pair, damping)
    return solve_factor(pair.second_moment, pulled.T, damping, "input moment").T


def gated_shift(weight: Tensor, pairs: PairMoments, trusted: float) -> Shift:
    """η · W (C S_q⁻¹ − I), η what the held-out half allows, at most TRUST of the quantization error in length.

    Args:
        weight: float32[m, n].
        pairs: of the layer's inputs.
        trusted: tr(E S_q Eᵀ) of the error that quantizing W without a shift makes.
    """
    nothing = torch.zeros_like(weight)
    if pairs.halves is None:
        return Shift(nothing, 0.0, 0.0)
    pulled = [pull(weight, half) for half in pairs.halves]
    tried = []
    for damping in DAMPINGS:
        ways = zip(pulled, pulled[::-1], pairs.halves, pairs.halves[::-1], strict=True)
        agreements = [_held_out(weight, *way, damping) for way in ways]
        inner = sum(agreement[0] for agreement in agreements)
        length = sum(agreement[1] for agreement in agreements)
        step = min(max(inner / length, 0.0), 1.0) if length > 0 else 0.0
        tried.append((-step * inner + 0.5 * step**2 * length, step, damping))
    _, step, damping = min(tried)
    step = 2 * step / (1 + step)
    if step < LEAST_STEP:
        return Shift(nothing, 0.0, damping)
    value = fitted_shift(weight, pull(weight, pairs.whole), pairs.whole, damping)
    size = float(((value @ pairs.whole.second_moment) * value).sum(dtype=torch.float64))
    if step**2 * size > TRUST**2 * trusted:
        step = TRUST * (trusted / size) ** 0.5
    return Shift(step * value, step, damping)


def _held_out(
    weight: Tensor, pulled: Tensor, other_pulled: Tensor, fitted: Pair, other: Pair, damping: float
) -> tuple[float, float]:
    """(⟨−G_B, N_A⟩, tr(N_A S_B N_Aᵀ)) for N_A of the fitted half, G_B = −W (C_B − S_B) of the other."""
    shift = fitted_shift(weight, pulled, fitted, damping)
    inner = (other_pulled * shift).sum(dtype=torch.float64)
    return float(inner), float(((shift @ other.second_moment) * shift).sum(dtype=torch.float64))
