"""Round to nearest: uniform symmetric levels and one searched clip a row, written exactly in the weight format.

2^(k/V) levels ±1, ±3, … times half a step. The codebook holds every combination of V levels, so a code is V level
numbers side by side and the decoded weight is the rounded one, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toolchain.errors import UnsupportedError
from toolchain.values import VQCode
from toolchain.vq.scales import stored_scales
from toolchain.vq.weights import Options, Problem, VQGroup, pack_group, stack_group

# Largest level over the row's largest weight; 2-bit rows do best well below 1.
CLIP_RATIOS = tuple(0.05 * step for step in range(4, 21))


def level_count(code: VQCode) -> int:
    """Levels a weight.

    Raises:
        UnsupportedError: the code's bits do not divide evenly over its weights.
    """
    if code.window != code.shift or code.shift % code.vector:
        raise UnsupportedError(
            f"code {code}: rounding to levels needs L = k and k a multiple of V; use one of 4,8,8 2,6,6 2,8,8"
        )
    return 1 << (code.shift // code.vector)


def level_codebook(code: VQCode) -> Tensor:
    """[2^L, V] in the code's codebook dtype: odd integers, the first weight's level number in the top bits."""
    levels = level_count(code)
    odd = torch.arange(1 - levels, levels, 2)
    codebook = torch.cartesian_prod(*[odd] * code.vector)
    return codebook.to(getattr(torch, code.codebook_dtype))


def round_rows(weight: Tensor, scales: Tensor, levels: int) -> Tensor:
    """Level numbers int64[m, n] in 0 … levels − 1; level number q is worth (2·q + 1 − levels) · scale."""
    steps = weight / (2 * torch.where(scales > 0, scales, 1.0))[:, None]
    return (steps.floor() + levels // 2).clamp(0, levels - 1).long()


def best_scales(weight: Tensor, levels: int, tried: Tensor, importance: Tensor) -> Tensor:
    """float16[m]: of the half steps float32[t, m] tried, rounded first, each row's with the least weighted error.

    Args:
        importance: float32[n], what a squared error costs in each column.
    """
    stored = stored_scales(tried)
    errors = []
    for scales in stored.float():
        rounded = (2 * round_rows(weight, scales, levels) + 1 - levels) * scales[:, None]
        errors.append((weight - rounded).square() @ importance)
    best = torch.stack(errors).argmin(dim=0)
    return stored.gather(0, best[None])[0]


def search_scales(weight: Tensor, levels: int) -> Tensor:
    """float16[m]: half steps of least squared error among CLIP_RATIOS of the row's largest weight."""
    ratios = torch.tensor(CLIP_RATIOS, device=weight.device)
    tried = ratios[:, None] * weight.abs().amax(dim=1) / (levels - 1)
    return best_scales(weight, levels, tried, torch.ones_like(weight[0]))


def pack_levels(problem: Problem, numbers: Tensor, scales: Tensor, code: VQCode) -> VQGroup:
    """A group whose weights are levels of their row, in its stored form: V level numbers are one index.

    Args:
        numbers: int64[m, n], below `level_count(code)`.
        scales: float16[m], half steps.
    """
    levels = level_count(code)
    places = levels ** torch.arange(code.vector - 1, -1, -1, device=numbers.device)
    indices = (numbers.reshape(len(scales), -1, code.vector) * places).sum(dim=-1).to(torch.uint8)
    return pack_group(problem, indices, level_codebook(code).to(scales.device), scales, code)


def quantize_group(
    weights: list[Tensor], moment: Tensor, code: VQCode, options: Options, generator: torch.Generator
) -> VQGroup:
    """Every weight rounded to its nearest level; `moment` only measures the result, nothing is random."""
    levels = level_count(code)
    problem = stack_group(weights, moment, code)
    scales = search_scales(problem.weight[:, : problem.columns], levels)
    return pack_levels(problem, round_rows(problem.weight, scales.float(), levels), scales, code)
