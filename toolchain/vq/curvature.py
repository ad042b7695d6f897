"""The curvature of a loss as a Kronecker product S_o ⊗ S_i: factors, scale, and the shift it turns a gradient into.

With E = Ŵ − W, the loss changes by about ⟨G, E⟩ + ½ tr(S_o E S_i Eᵀ), G the gradient of the mean loss.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from toolchain.errors import NumericGateError

RETRY_FACTOR = 3.0
RETRIES = 6
LEAST_SHARE = 0.2  # α_min, before shares are divided by their sum: a modality keeps 1/6 of the token weight at least


def balanced_token_weights(gradient_norms: Tensor, is_image: Tensor | None, power: float = 1.0) -> Tensor:
    """float32[N], summing to 1: how much each token counts in S_i.

    Each modality μ shares its token weight α_μ among its tokens as ω_t = s_t^power, s_t = ‖δ_t‖² / m, with α_μ its
    share of Σ ω, lifted to LEAST_SHARE and divided by their sum again (mgvq-algorithm 2.2, equation 2; GuidedQuant,
    arXiv 2505.07004, for one modality). Power 0 counts tokens of a modality alike and gives either modality half. A
    modality that no loss reaches at all has no token weight; where none is reached, all tokens count alike.

    Args:
        gradient_norms: float32[N], s_t; a token no loss reaches has 0.
        is_image: bool[N], or None where there is only one kind of token.
    """
    weights = gradient_norms.clamp_min(0) ** power
    kinds = [torch.ones_like(weights, dtype=torch.bool)] if is_image is None else [is_image, ~is_image]
    kinds = [kind for kind in kinds if bool((weights[kind] > 0).any())]
    if not kinds:
        return torch.full_like(weights, 1 / len(weights))
    even = torch.full((len(kinds),), 1 / len(kinds))
    shares = even if power == 0 else torch.stack([weights[kind].sum() for kind in kinds])
    shares = (shares / shares.sum()).clamp_min(LEAST_SHARE)
    shares = shares / shares.sum()
    token_weights = torch.zeros_like(weights)
    for kind, share in zip(kinds, shares):
        token_weights[kind] = share * (weights[kind] / weights[kind].sum())
    return token_weights


def capped_token_weights(token_weights: Tensor, norms: Tensor, quantile: float) -> Tensor:
    """float32[N] of the same sum: tokens of a larger norm than the quantile count in S_i as if they had that norm.

    ω_t ← ω_t · min(1, q / ‖x_t‖²): an attention sink, hundreds of times the norm of any other token, else makes most of
    S_i by itself (mgvq-algorithm 8).

    Args:
        token_weights: float32[N], ω, not negative.
        norms: float32[N], ‖x_t‖².
        quantile: of the norms, above 0 and at most 1; 1 changes nothing.
    """
    place = max(1, math.ceil(quantile * len(norms)))
    limit = norms.kthvalue(place).values
    capped = token_weights * torch.where(norms > limit, limit / norms.clamp_min(torch.finfo(norms.dtype).tiny), 1.0)
    total = capped.sum()
    return capped * (token_weights.sum() / total) if total > 0 else token_weights


def kronecker_scale(gradients: Tensor, row_factor: Tensor, column_factor: Tensor, tokens: float = 1.0) -> float:
    """c = T · E_b⟨G_b, S_o G_b S_i⟩ / (‖S_o‖²‖S_i‖²): c · S_o ⊗ S_i is the least-squares fit of T·E[vec G_b vec G_bᵀ].

    mgvq-algorithm 2.2, equation 6. Without it a gradient step has no length.

    Args:
        gradients: float32[B, m, n], gradients of the mean token loss of B sequences, labels drawn from the model.
        row_factor, column_factor: S_o float32[m, m] and S_i float32[n, n].
        tokens: scored tokens a sequence, T.
    """
    inner = torch.einsum("bij,bij->b", row_factor @ gradients, gradients @ column_factor).mean()
    return float(tokens * inner / (row_factor.square().sum() * column_factor.square().sum()))


def half_iteration(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """(S_o, S_i) of mean diagonal 1, in proportion to E[G_b G_bᵀ] and E[G_bᵀ G_b]: YAQA's sketch B (equation 3).

    Args:
        gradients: float32[B, m, n] of sequences whose labels are drawn from the model itself.
    """
    rows = torch.einsum("bij,bkj->ik", gradients, gradients)
    columns = torch.einsum("bij,bik->jk", gradients, gradients)
    return unit_mean(rows), unit_mean(columns)


def unit_mean(factor: Tensor) -> Tensor:
    """The factor over the mean of its diagonal; itself where that is 0."""
    mean = factor.diagonal().mean()
    return factor / mean if mean > 0 else factor


def damp(factor: Tensor, share: float) -> Tensor:
    """S + share · mean(diag S) · I, made symmetric: float32[n, n] that `solve_factor` can solve."""
    symmetric = (factor + factor.T) / 2
    return symmetric + share * symmetric.diagonal().mean() * torch.eye(len(factor), device=factor.device)


def solve_factor(factor: Tensor, right: Tensor, damping: float, what: str = "curvature factor") -> Tensor:
    """S⁻¹ R float32[n, p] by Cholesky; damping is tripled as often as needed, in float32 and then in float64.

    Raises:
        NumericGateError: no damping tried makes S definite.
    """
    for dtype in (torch.float32, torch.float64):
        for retry in range(RETRIES):
            damped = damp(factor.to(dtype), damping * RETRY_FACTOR**retry)
            lower, failed = torch.linalg.cholesky_ex(damped)
            if not int(failed) and bool(torch.isfinite(lower).all()):
                return torch.cholesky_solve(right.to(dtype), lower).float()
    raise NumericGateError(
        f"{what} of {len(factor)}: not positive definite even in float64 with damping "
        f"{damping * RETRY_FACTOR ** (RETRIES - 1):g}; calibrate with more, and more diverse, samples"
    )


def newton_shift(gradient: Tensor, row_factor: Tensor, column_factor: Tensor, damping: tuple[float, float]) -> Tensor:
    """N = S_o⁻¹ G S_i⁻¹ float32[m, n]: quantizing W − N without a gradient is quantizing W with it (equation 8).

    Args:
        gradient: float32[m, n], of the mean loss.
        row_factor, column_factor: S_o float32[m, m] and S_i float32[n, n], in the scale of `kronecker_scale`.
        damping: shares of the mean diagonals added to S_o and S_i.
    """
    rows = solve_factor(row_factor, gradient, damping[0], "output curvature")
    return solve_factor(column_factor, rows.T, damping[1], "input moment").T


def quadratic(difference: Tensor, row_factor: Tensor | None, column_factor: Tensor) -> float:
    """½ tr(S_o E S_i Eᵀ); S_o = I where it is None."""
    pulled = difference @ column_factor
    rows = pulled if row_factor is None else row_factor @ pulled
    return 0.5 * float((rows * difference).sum(dtype=torch.float64))
