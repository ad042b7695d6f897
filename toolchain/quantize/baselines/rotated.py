"""Scalar GPTQ behind a rotation of its inputs, where that helps: W R is quantized for Rᵀ H R, and Ŵ is turned back.

R is a block-diagonal randomized Hadamard matrix, as in QuIP# (arXiv 2402.04396) and QuaRot (arXiv 2404.00456), with the
largest blocks that divide the columns, up to 128. It makes weights nearly Gaussian and high-energy columns alike.

Rotating the activations when the model runs is counted as time alone, not as bits: its signs are drawn from a seed.
That is another rotation than the one a checkpoint of ours can hold (`vq.rotation`), so that this method is for
`evaluate.compare` only, and `gptq`, which a checkpoint can hold, stays unrotated. To be the strongest scalar baseline
it takes, group by group, whichever of the two has the lower error on the calibration inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from toolchain.quantize.baselines import gptq
from toolchain.quantize.baselines.compared import ComparedGroup
from toolchain.values import VQCode
from toolchain.vq.rotation import hadamard
from toolchain.vq.weights import Options, VQGroup

LARGEST_BLOCK = 128


def block_size(columns: int) -> int:
    """The largest power of two up to LARGEST_BLOCK that divides `columns`; 1 for an odd number."""
    return math.gcd(columns, LARGEST_BLOCK)


def random_signs(columns: int, generator: torch.Generator) -> Tensor:
    """float32[n] of −1 and 1."""
    return 2.0 * torch.randint(2, (columns,), generator=generator, device=generator.device) - 1.0


def rotate(rows: Tensor, signs: Tensor) -> Tensor:
    """rows · R, float32[m, n], where R = diag(signs) · blockdiag(Hadamard): orthogonal, so that x Rᵀ undoes it."""
    size = block_size(len(signs))
    return ((rows * signs).reshape(len(rows), -1, size) @ hadamard(size).to(rows.device)).reshape(rows.shape)


def rotate_back(rows: Tensor, signs: Tensor) -> Tensor:
    """rows · Rᵀ, float32[m, n]."""
    size = block_size(len(signs))
    return (rows.reshape(len(rows), -1, size) @ hadamard(size).to(rows.device)).reshape(rows.shape) * signs


def quantize_rotated(
    weights: list[Tensor], moment: Tensor, code: VQCode, options: Options, generator: torch.Generator
) -> ComparedGroup:
    """`gptq` on W R with Rᵀ H R; tr(E H Eᵀ) is the same before and after E is turned back."""
    signs = random_signs(len(moment), generator).to(moment.device)
    turned = rotate(rotate(moment.float(), signs).T, signs)
    found = gptq.quantize_group([rotate(w.float(), signs) for w in weights], turned, code, options, generator)
    return _compared(found, [rotate_back(layer.decode().to(moment.device), signs) for layer in found.layers])


def quantize_group(
    weights: list[Tensor], moment: Tensor, code: VQCode, options: Options, generator: torch.Generator
) -> ComparedGroup:
    """The better of `gptq` and `quantize_rotated` by tr(E H Eᵀ) summed over the group."""
    plain = gptq.quantize_group(weights, moment, code, options, generator)
    turned = quantize_rotated(weights, moment, code, options, generator)
    if sum(turned.errors) < plain.loss:
        return turned
    return _compared(plain, [layer.decode() for layer in plain.layers])


def _compared(group: VQGroup, decoded: list[Tensor]) -> ComparedGroup:
    """The group with these decoded weights, and the bytes of its stored form."""
    size = group.layers[0].code.codebook_bytes
    size += sum(layer.codes.numel() + layer.scales.numel() * layer.scales.element_size() for layer in group.layers)
    return ComparedGroup(tuple(decoded), group.errors, group.references, size)
