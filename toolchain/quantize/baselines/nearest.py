"""Plain vector quantization: a k-means codebook in the Euclidean metric, each vector its nearest entry, no feedback."""

from __future__ import annotations

import torch
from torch import Tensor

from toolchain.values import VQCode
from toolchain.vq.assign import nearest_entries
from toolchain.vq.codebook import draw_samples, round_codebook, train_codebook
from toolchain.vq.scales import rms_scales, stored_scales
from toolchain.vq.solve import safe_divisor
from toolchain.vq.weights import Options, VQGroup, pack_group, stack_group


def quantize_group(
    weights: list[Tensor], moment: Tensor, code: VQCode, options: Options, generator: torch.Generator
) -> VQGroup:
    """Codes of least ‖W − Ŵ‖² for a codebook trained on the same; `moment` only measures the result."""
    problem = stack_group(weights, moment, code)
    start = rms_scales(problem.weight, problem.columns)
    unit = problem.weight / safe_divisor(start)[:, None]
    blocks = problem.weight.shape[1] // code.vector
    identity = torch.eye(code.vector, device=unit.device)
    samples = draw_samples(unit, identity.expand(blocks, -1, -1), start.square(), options.samples, generator)
    stored, step = round_codebook(*train_codebook(samples, code.entries, options.lloyd_rounds, generator), code)
    scales = stored_scales(start * step)
    vectors = problem.weight.reshape(-1, code.vector)
    indices = nearest_entries(vectors, identity, stored.float(), scales.float().repeat_interleave(blocks))
    return pack_group(problem, indices.reshape(-1, blocks), stored, scales, code)
