"""Row scales: where they start, and the best ones for given codes."""

from __future__ import annotations

import torch
from torch import Tensor

REFIT_RANGE = (0.5, 2.0)  # a refit may move a scale this far from where it started


def rms_scales(weight: Tensor, columns: int) -> Tensor:
    """float32[m]: root mean square of each row over its first `columns` entries; 0 for a row of zeros."""
    return weight[:, :columns].square().mean(dim=1).sqrt()


def stored_scales(scales: Tensor) -> Tensor:
    """float16[m], as they are stored; every later step computes with these."""
    return scales.clamp(0, torch.finfo(torch.float16).max).to(torch.float16)


def refit_scales(weight: Tensor, unit: Tensor, moment: Tensor, start: Tensor) -> Tensor:
    """float32[m]: a_i = ⟨w_i, q_i⟩ / ⟨q_i, q_i⟩ in the metric of `moment`, the least-squares scale of each row.

    Clamped to REFIT_RANGE times `start`, and `start` itself where the row decodes to nothing.

    Args:
        weight: float32[m, n].
        unit: float32[m, n], the decoded rows at scale 1.
        moment: float32[n, n].
        start: float32[m].
    """
    pulled = unit @ moment
    inner, norm = (pulled * weight).sum(dim=1), (pulled * unit).sum(dim=1)
    fitted = torch.where(norm > 0, inner / norm.clamp_min(torch.finfo(norm.dtype).tiny), start)
    return torch.clamp(fitted, REFIT_RANGE[0] * start, REFIT_RANGE[1] * start)
