"""The block-LDL sweep: columns are coded block by block, and each block's error is fed to the blocks after it."""

from __future__ import annotations

import torch
from torch import Tensor

from toolchain.vq.assign import Search, index_dtype, nearest_entries
from toolchain.vq.factor import Factors


def sweep(
    weight: Tensor,
    factors: Factors,
    codebook: Tensor,
    scales: Tensor,
    batch_columns: int,
    search: Search = nearest_entries,
) -> tuple[Tensor, Tensor]:
    """Codes that minimise tr(E S Eᵀ) greedily, one block of V columns after the other, exact given the earlier ones.

    Block k's target is T_k = W_k + Σ_{j<k} E_j U_jk with E = W − Ŵ, and its codes the nearest in the metric D_k: LDLQ
    (QuIP, arXiv 2307.13304) with blocks of V columns, first column first. Rows do not feed each other, so a code
    whose windows overlap down the rows is searched in the same metric.
    Blocks are taken in batches: what earlier batches feed into a batch is
    one matrix product, so that the arithmetic is that of a few large products whatever V is.

    Args:
        weight: float32[m, n].
        factors: of the damped second moment, n columns, blocks of V.
        codebook: [2^L, V], as stored (int8 or float16).
        scales: float16[m], as stored.
        batch_columns: columns a batch, a multiple of V.
        search: finds the indices of a block (`trellis.search_for`); overlapping codes want m a multiple of 128.

    Returns:
        (indices uint8[m, n / V], int16 for codebooks of more than 256 entries; targets T float32[m, n]).
    """
    entries, row_scales = codebook.float(), scales.float()
    vector, columns = entries.shape[1], weight.shape[1]
    error = torch.zeros_like(weight)
    targets = torch.empty_like(weight)
    indices = torch.empty(weight.shape[0], columns // vector, dtype=index_dtype(len(codebook)), device=weight.device)
    for first in range(0, columns, batch_columns):
        last = min(first + batch_columns, columns)
        targets[:, first:last] = weight[:, first:last] + error[:, :first] @ factors.unit[:first, first:last]
        for at in range(first, last, vector):
            block = slice(at, at + vector)
            target = targets[:, block]
            target += error[:, first:at] @ factors.unit[first:at, block]
            chosen = search(target, factors.pivots[at // vector], entries, row_scales)
            indices[:, at // vector] = chosen
            error[:, block] = weight[:, block] - entries[chosen.long()] * row_scales[:, None]
    return indices, targets
