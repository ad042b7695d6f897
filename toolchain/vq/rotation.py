"""Rotations of a layer's inputs: W x = (W R)(Rᵀ x), R orthogonal, so that W R can be coded in the place of W.

R repeats one block down its diagonal: signs, then Sylvester's Hadamard matrix. Coordinates of Rᵀ x are sums of `block`
inputs, so that a high-energy column's energy, and a heavy tail of weights, is spread over a block (QuIP#, arXiv
2402.04396; QuaRot, arXiv 2404.00456). Signs are the Rudin-Shapiro sequence: its Hadamard transform has one magnitude,
so that what all columns have in common is spread too, and nothing is drawn. Blocks are powers of four, whose entries
±1/√block are exact in float16.

A moment and a weight are turned together: H' = Rᵀ H R goes with W' = W R, and tr(W' H' W'ᵀ) = tr(W H Wᵀ).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from toolchain.errors import ShapeError

BLOCKS = (64, 16)  # larger ones cost more arithmetic a token; 4 would spread nothing


def block_of(columns: int) -> int:
    """The largest block that divides `columns`; 0 where none does and the inputs cannot be rotated."""
    return next((block for block in BLOCKS if columns % block == 0), 0)


def hadamard(size: int) -> Tensor:
    """float32[size, size]: Sylvester's Hadamard matrix over √size, orthogonal and symmetric; `size` is a power of 2."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix / math.sqrt(size)


def rudin_shapiro(size: int) -> Tensor:
    """float32[size] of 1 and −1: −1 where the index has an odd number of neighbouring ones in binary."""
    return torch.tensor([-1.0 if (i & (i >> 1)).bit_count() % 2 else 1.0 for i in range(size)])


def rotation_block(block: int) -> Tensor:
    """float32[block, block], the block of R: diag(signs) · Hadamard, orthogonal.

    Raises:
        ShapeError: a block that no layer can have.
    """
    if block not in BLOCKS:
        raise ShapeError(f"rotation in blocks of {block}: expected one of {BLOCKS}; quantize the checkpoint again")
    return rudin_shapiro(block)[:, None] * hadamard(block)


def rotate(rows: Tensor, block: int) -> Tensor:
    """rows [..., n] · R in the dtype they have; n a multiple of the block. Weights and inputs alike: Rᵀ x, as a row."""
    return _blockwise(rows, _block_like(block, rows.dtype, rows.device))


def inverse_rotate(rows: Tensor, block: int) -> Tensor:
    """rows [..., n] · Rᵀ, what undoes `rotate`."""
    return _blockwise(rows, _block_like(block, rows.dtype, rows.device).T)


def rotate_moment(moment: Tensor, block: int) -> Tensor:
    """Rᵀ H R float32[n, n] of H float32[n, n]."""
    return rotate(rotate(moment, block).T, block).T


@lru_cache(maxsize=16)
def _block_like(block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The block in a dtype on a device, made once; usable where gradients are wanted, whatever the mode is now."""
    with torch.inference_mode(False):
        return rotation_block(block).to(device, dtype)


def _blockwise(rows: Tensor, matrix: Tensor) -> Tensor:
    block = len(matrix)
    if rows.shape[-1] % block:
        raise ShapeError(f"rotation in blocks of {block}: expected columns in whole blocks, found {rows.shape[-1]}")
    return (rows.unflatten(-1, (-1, block)) @ matrix).flatten(-2)
