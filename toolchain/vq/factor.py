"""H = U D Uᵀ with U unit block-upper-triangular: the factors that turn a quadratic loss into column-by-column feedback.

With E = W − Ŵ and η_k = E_k + Σ_{j<k} E_j U_jk:  tr(E H Eᵀ) = Σ_k tr(η_k D_k η_kᵀ).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from toolchain.errors import NumericGateError

RETRY_FACTOR = 3.0
RETRIES = 6


@dataclass(frozen=True)
class Factors:
    """U float32[n, n], D float32[n / V, V, V], and the damped moment S = U D Uᵀ they are factors of, float32[n, n].

    D is zero on padding columns: nothing there is ever paid for. `damping` is the share that was needed.
    """

    unit: Tensor
    pivots: Tensor
    damped: Tensor
    damping: float


def block_udu(moment: Tensor, vector: int) -> tuple[Tensor, Tensor] | None:
    """(U [n, n], D [n / V, V, V]) of a symmetric positive definite matrix, in its dtype; None where it is not definite.

    From the reversed Cholesky factor S = R Rᵀ, R upper triangular: D_k = R_kk R_kkᵀ and U_jk = R_jk R_kk⁻¹.
    """
    lower, failed = torch.linalg.cholesky_ex(moment.flip(0, 1))
    if int(failed):
        return None
    upper = lower.flip(0, 1)
    size = upper.shape[0]
    columns = upper.reshape(size, size // vector, vector).permute(1, 0, 2)
    diagonal = upper.reshape(size // vector, vector, size // vector, vector).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    unit = torch.linalg.solve_triangular(diagonal, columns, upper=True, left=False)
    return unit.permute(1, 0, 2).reshape(size, size), diagonal @ diagonal.mT


def factor_moment(moment: Tensor, columns: int, vector: int, damping: float) -> Factors:
    """Factors of S = H + damping · mean(diag H) · I; padding columns get the identity, then a zero metric.

    A column no input ever reached (H_jj = 0) is left with the damping alone: cheap to get wrong, not free. Damping is
    tripled as often as needed, first in float32, then in float64.

    Args:
        moment: float32[n, n], zero beyond the first `columns`.

    Raises:
        NumericGateError: H is not finite, is zero, or cannot be factored with any damping tried.
    """
    mean = float(moment.diagonal()[:columns].mean())
    if not (mean > 0 and bool(torch.isfinite(moment).all())):
        raise NumericGateError(
            f"second moment of {columns} inputs: expected finite values and a positive diagonal, found a mean diagonal "
            f"of {mean:g}; look for overflow in the activations, or inputs that never reach this layer"
        )
    symmetric = (moment + moment.T) / 2
    real = torch.arange(len(moment), device=moment.device) < columns
    for dtype in (torch.float32, torch.float64):
        for retry in range(RETRIES):
            share = damping * RETRY_FACTOR**retry
            shift = torch.where(real, share * mean, 1.0)
            damped = symmetric.to(dtype) + torch.diag(shift).to(dtype)
            factors = block_udu(damped, vector)
            if factors is not None:
                unit, pivots = (part.float() for part in factors)
                keep = real.reshape(-1, vector).float()
                damped = damped.float() * real.float()[:, None]
                return Factors(unit, pivots * keep[:, :, None] * keep[:, None, :], damped, share)
    raise NumericGateError(
        f"second moment of {columns} inputs cannot be factored, not even in float64 with damping {share:g}; "
        "calibrate with more, and more diverse, samples"
    )
