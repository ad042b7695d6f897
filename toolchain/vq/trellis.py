"""Search of codes with overlapping windows (L > k): the cheapest path round the circle of a chunk's 16 windows.

A window leaves a node, its first L − k bits, and enters one, its last L − k bits, which the next window leaves. Two
windows may follow each other exactly where they share that node; its first k bits are the window's symbol.

    window of L bits     [ node left | k new bits ]  =  [ symbol | node entered ]

A chunk runs down the rows of one column block, so that its 16 targets depend on no choice made inside it: Viterbi's
search in the block metric is exact and needs no feedback. The last window wraps to the first symbols: the path must
enter the node that it left. A free search from the middle of the chunk, in both directions, ranks the nodes at the
seam; a second pass leaves and enters each of the best SEAMS of them.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from toolchain.values import CHUNK_ROWS, ROW_GROUP, ROW_STRIDE, VQCode
from toolchain.vq.assign import Search, index_dtype, nearest_entries

# Nodes tried at the seam. Gaussian MSE over that of all nodes tried: (2,3,8) 1.032 with one, 1.003 with four; (2,4,8)
# 1.022 and 1.001. Codes with at most four nodes, (2,6,8) (2,8,9) (4,8,9), are searched exactly.
SEAMS = 4
# Window costs held at a time: chunks are taken in pieces so that 16 · 2^L · chunks stays below this, 4 MiB of float32
# on a CPU, whose caches count, and 0.5 GiB on a device that wants many chunks at once.
COSTS_ON_CPU, COSTS_ON_DEVICE = 1 << 20, 1 << 27


def search_for(code: VQCode, row_weights: Tensor | None = None) -> Search:
    """What finds a column block's indices for the code: windows of tail-biting paths where L > k, nearest entries else.

    Args:
        row_weights: float32[m], what an error in each row counts; a nearest entry is the same whatever its row counts.
    """
    if code.window == code.shift:
        return nearest_entries
    return partial(cheapest_windows, code=code, row_weights=row_weights)


def cheapest_windows(
    targets: Tensor,
    metric: Tensor,
    codebook: Tensor,
    scales: Tensor,
    code: VQCode,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Windows [m] of nearly least Σ_i r_i (t_i − a_i·T[w_i]) D (t_i − a_i·T[w_i])ᵀ, closed in every chunk of 16 rows.

    Args:
        targets: float32[m, V], m a multiple of 128.
        metric: float32[V, V], symmetric positive semidefinite (D_b).
        codebook: float32[2^L, V].
        scales: float32[m], not negative; a row of scale 0 costs nothing and lends its bits to its neighbours.
        row_weights: float32[m], r; 1 where None.

    Returns:
        uint8[m], or int16[m] for codebooks of more than 256 entries.
    """
    norms = ((codebook @ metric) * codebook).sum(dim=1, keepdim=True)
    pulling = scales if row_weights is None else scales * row_weights
    pulled = -2 * pulling[:, None] * (targets @ metric)
    queries = torch.cat([pulled, (pulling * scales)[:, None]], dim=1)
    chunks = queries.view(-1, CHUNK_ROWS, ROW_STRIDE, queries.shape[1]).permute(1, 3, 0, 2).flatten(2)
    windows = tail_biting_paths(chunks, torch.cat([codebook, norms], dim=1), code)
    rows = windows.view(CHUNK_ROWS, -1, ROW_STRIDE).transpose(0, 1).reshape(-1)
    return rows.to(index_dtype(len(codebook)))


def chunk_rows(row_group: Tensor, inside: Tensor) -> Tensor:
    """int64[..., 16]: the rows of chunk g = `inside` of row group R = `row_group`, in the order of its windows."""
    steps = ROW_STRIDE * torch.arange(CHUNK_ROWS, device=inside.device)
    return (ROW_GROUP * row_group + inside)[..., None] + steps


def tail_biting_paths(queries: Tensor, entries: Tensor, code: VQCode) -> Tensor:
    """int64[T, N]: per chunk the windows of a tail-biting path of nearly least Σ_t entries[w_t] · queries[t].

    Args:
        queries: float32[T, F, N], the coefficients of the cost of window t of chunk n.
        entries: float32[2^L, F], what they multiply.
    """
    held = COSTS_ON_CPU if queries.device.type == "cpu" else COSTS_ON_DEVICE
    chunks = max(1, held // (len(queries) * code.entries))
    return torch.cat([_tail_biting_windows(entries @ part, code) for part in queries.split(chunks, dim=2)], dim=1)


def _tail_biting_windows(costs: Tensor, code: VQCode) -> Tensor:
    """int64[T, N] windows from the costs of all, float32[T, 2^L, N]."""
    steps, _, chunks = costs.shape
    shift, overlap = code.shift, code.window - code.shift
    if shift <= overlap:
        left = _tail_biting_nodes(costs, overlap, shift)
        return (left << shift) | (left.roll(-1, dims=0) & ((1 << shift) - 1))
    # The middle bits reach neither neighbour: of the windows between two nodes only the cheapest can be on the path.
    between = costs.view(steps, 1 << overlap, 1 << (shift - overlap), 1 << overlap, chunks)
    left = _tail_biting_nodes(between.amin(dim=2).flatten(1, 2), overlap, overlap)
    entered = left.roll(-1, dims=0)
    step, chunk = torch.arange(steps, device=costs.device)[:, None], torch.arange(chunks, device=costs.device)
    middle = between[step, left, :, entered, chunk].argmin(dim=-1)
    return (left << shift) | (middle << overlap) | entered


def _tail_biting_nodes(costs: Tensor, node_bits: int, shift: int) -> Tensor:
    """int64[T, N]: the node that each window of the path leaves, from costs float32[T, 2^(node_bits + shift), N]."""
    nodes = 1 << node_bits
    seams = _likely_seams(costs, nodes, shift)
    start = costs.new_full((len(seams), nodes, costs.shape[2]), torch.inf).scatter_(1, seams[:, None], 0.0)
    reached = _forward(costs, start, shift)
    best = reached[-1].gather(1, seams[:, None])[:, 0].argmin(dim=0, keepdim=True)
    seam = seams.gather(0, best)[0]
    left, node = [], seam
    for step in range(len(costs) - 1, 0, -1):
        windows = torch.arange(1 << shift, device=costs.device)[:, None] * nodes + node
        came = windows >> shift
        ways = costs[step].gather(0, windows) + reached[step].flatten(0, 1).gather(0, best * nodes + came)
        node = came.gather(0, ways.argmin(dim=0, keepdim=True))[0]
        left.append(node)
    return torch.stack([seam, *reversed(left)])


def _likely_seams(costs: Tensor, nodes: int, shift: int) -> Tensor:
    """int64[min(SEAMS, nodes), N]: the nodes at the seam that paths free in the middle of the chunk like best."""
    if nodes <= SEAMS:
        return torch.arange(nodes, device=costs.device)[:, None].expand(-1, costs.shape[2])
    middle = len(costs) // 2
    free = costs.new_zeros(nodes, costs.shape[2])
    before = _forward(costs[middle:], free[None], shift)[-1][0]
    after = free
    for cost in costs[:middle].flip(0):
        total = cost.view(1 << shift, nodes, -1) + after
        after = total.view(nodes, 1 << shift, -1).amin(dim=1)
    return (before + after).topk(SEAMS, dim=0, largest=False).indices


def _forward(costs: Tensor, start: Tensor, shift: int) -> list[Tensor]:
    """The cheapest way to every node before each window and after the last: T + 1 tensors float32[Q, nodes, N].

    Args:
        start: float32[Q, nodes, N], what it costs to begin at each node; Q searches at once over the same costs.
    """
    tried, nodes, chunks = start.shape
    reached = [start]
    for cost in costs:
        total = cost.view(nodes, 1 << shift, chunks) + reached[-1][:, :, None]
        reached.append(total.view(tried, 1 << shift, nodes, chunks).amin(dim=1))
    return reached
