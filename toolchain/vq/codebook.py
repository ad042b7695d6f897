"""Codebooks trained in the metric they will be paid in: Lloyd's algorithm where every sample has its own V×V metric.

A sample is a vector t of V weights at unit row scale with metric M = a² · D_b; the loss is Σ (t − c) M (t − c)ᵀ.
The codebook of an overlapping code is trained on whole chunks, each coded by its cheapest path.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from toolchain.values import CHUNK_ROWS, ROW_STRIDE, VQCode
from toolchain.vq.trellis import chunk_rows, tail_biting_paths

INT8_LIMIT = 127
# Scores a piece of samples makes: 1 MiB of float32 stays in cache between the product and the search for the least.
SCORES_AT_A_TIME = 1 << 18
# Clip ratios tried when a codebook becomes int8: one far entry must not cost all the others their resolution.
CLIP_RATIOS = tuple(1.0 - 0.05 * step for step in range(13))


@dataclass(frozen=True)
class Samples:
    """vectors float32[N, V] at unit row scale, metrics float32[N, V, V], symmetric positive semidefinite."""

    vectors: Tensor
    metrics: Tensor


@dataclass(frozen=True)
class Cells:
    """Normal equations of a codebook's entries: weights Σ M float32[K, V, V] and moments Σ M t float32[K, V]."""

    weights: Tensor
    moments: Tensor


def draw_samples(
    unit: Tensor, pivots: Tensor, row_importance: Tensor, count: int, generator: torch.Generator
) -> Samples:
    """At most `count` vectors, one from each of `count` equal intervals of the matrix, so that all rows are seen.

    Args:
        unit: float32[m, n], weights divided by their row scale.
        pivots: float32[n / V, V, V] (D_b).
        row_importance: float32[m], r · a²: what an error at unit scale counts in each row.
        generator: draws the place inside each interval; the result depends on nothing else random.
    """
    blocks, vector = pivots.shape[0], pivots.shape[1]
    total = unit.shape[0] * blocks
    places = _one_per_interval(total, count, generator).to(unit.device)
    row, block = places // blocks, places % blocks
    metrics = pivots[block] * row_importance[row][:, None, None]
    return Samples(unit.reshape(-1, blocks, vector)[row, block], metrics)


def train_codebook(samples: Samples, entries: int, rounds: int, generator: torch.Generator) -> tuple[Tensor, Cells]:
    """(codebook float32[entries, V] of locally least Σ (t − c) M (t − c)ᵀ, its cells): k-means++, then Lloyd rounds."""
    features = sample_features(samples)
    codebook = seed_codebook(samples, features, entries, generator)
    for _ in range(rounds):
        chosen, scores = _assign(features, codebook)
        cells = gather_cells(samples, chosen, entries)
        codebook = solve_cells(cells, codebook)
        codebook = _reseed_empty(codebook, cells, samples, scores)
    return codebook, gather_cells(samples, _assign(features, codebook)[0], entries)


def draw_chunks(
    unit: Tensor, pivots: Tensor, row_importance: Tensor, count: int, generator: torch.Generator
) -> Samples:
    """At most `count` vectors in whole chunks of 16 as the format cuts them, one chunk from each equal interval.

    Args:
        unit, pivots, row_importance: as for `draw_samples`, m a multiple of 128.
    """
    blocks, vector = pivots.shape[0], pivots.shape[1]
    total = len(unit) // CHUNK_ROWS * blocks
    places = _one_per_interval(total, max(1, count // CHUNK_ROWS), generator).to(unit.device)
    chunk, block = places // blocks, places % blocks
    rows = chunk_rows(chunk // ROW_STRIDE, chunk % ROW_STRIDE).flatten()
    block = block.repeat_interleave(CHUNK_ROWS)
    metrics = pivots[block] * row_importance[rows][:, None, None]
    return Samples(unit.reshape(-1, blocks, vector)[rows, block], metrics)


def _one_per_interval(total: int, count: int, generator: torch.Generator) -> Tensor:
    """int64: one place from each of `count` equal intervals of 0 … total − 1, or all places where they are no more."""
    if total <= count:
        return torch.arange(total)
    inside = torch.rand(count, generator=generator, dtype=torch.float64, device=generator.device)
    starts = torch.arange(count, dtype=torch.float64, device=generator.device) + inside
    return (starts * (total / count)).long().clamp(max=total - 1)


def train_paths(samples: Samples, code: VQCode, rounds: int, generator: torch.Generator) -> tuple[Tensor, Cells]:
    """(codebook float32[2^L, V], its cells) for the cheapest paths of `draw_chunks` samples, L > k.

    A k-means codebook, drawn together and arranged over the windows, then rounds of search and least squares.
    """
    codebook, _ = train_codebook(samples, code.entries, rounds, generator)
    codebook = arrange_windows(path_spread(code) * codebook, code)
    features = sample_features(samples)
    queries = features.view(-1, CHUNK_ROWS, features.shape[1]).permute(1, 2, 0)
    for step in range(rounds + 1):
        chosen = tail_biting_paths(queries, entry_features(codebook), code).T.reshape(-1)
        cells = gather_cells(samples, chosen, code.entries)
        if step < rounds:
            codebook = solve_cells(cells, codebook)
    return codebook, cells


def path_spread(code: VQCode) -> float:
    """What a k-means codebook is multiplied by before it starts a codebook for paths; 1 where L = k.

    The entries of a k-means codebook lie as p^(V / (V + 2)) where the samples lie as p, for a Gaussian √((V + 2) / V)
    as wide; a code of many nodes draws from its entries as from random ones and wants them as wide as the samples. In
    between by overlapping bits, four counting as many: on random layers it takes 2 to 5 % off the loss of (2,3,8) and
    (2,4,8), and the same factor would add 25 % to that of (2,8,9).
    """
    share = min(code.window - code.shift, 4) / 4
    return 1 - share * (1 - (code.vector / (code.vector + 2)) ** 0.5)


def arrange_windows(codebook: Tensor, code: VQCode) -> Tensor:
    """The codebook's rows assigned to windows so that the 2^k that leave a node, or enter one, spread over all of
    space.

    Set partitioning (Ungerboeck 1982; for sources Marcellin & Fischer 1990): 2^k cells of neighbouring entries, of
    which every node leaves by one window and is entered by one. Gaussian MSE after 12 rounds, against a random order:
    (2,3,8) 0.1572, 0.1589; (2,4,8) 0.0823, 0.0840; (2,5,8) 0.0431, 0.0454; (2,6,8) 0.0234, 0.0249; (4,8,9) no better.
    """
    overlap = code.window - code.shift
    windows = torch.arange(code.entries, device=codebook.device)
    left, symbol = windows >> code.shift, windows >> overlap
    # A node's own bits decide which entry of a cell it has, and shift the cells against each other.
    cell = (windows ^ left) & ((1 << code.shift) - 1) if code.shift >= overlap else windows ^ symbol
    return codebook[_split_order(codebook).view(1 << code.shift, -1)[cell & ((1 << code.shift) - 1), left]]


def _split_order(codebook: Tensor) -> Tensor:
    """int64[2^L]: entries by repeated halving along the widest axis, so that leading bits name compact cells."""
    order = torch.arange(len(codebook), device=codebook.device)[None]
    while order.shape[1] > 1:
        inside = codebook[order]
        axis = inside.var(dim=1).argmax(dim=1)[:, None, None].expand(-1, order.shape[1], 1)
        sorting = inside.gather(2, axis)[..., 0].argsort(dim=1, stable=True)
        order = order.gather(1, sorting).view(2 * len(order), -1)
    return order.flatten()


def seed_codebook(samples: Samples, features: Tensor, entries: int, generator: torch.Generator) -> Tensor:
    """float32[entries, V] by k-means++: each entry is a sample, drawn by its weighted distance to those before it."""
    own = _own_terms(samples)
    draws = torch.rand(entries, generator=generator, dtype=torch.float64, device=generator.device).to(own.device)
    # The first is drawn by its weight alone.
    distance = samples.metrics.diagonal(dim1=1, dim2=2).sum(dim=1)
    chosen = []
    for step in range(entries):
        cumulative = distance.cumsum(0, dtype=torch.float64)
        place = torch.searchsorted(cumulative, draws[step] * cumulative[-1]).clamp(max=len(distance) - 1)
        chosen.append(place)
        fresh = (features @ entry_features(samples.vectors[place][None])[0] + own).clamp_min(0)
        distance = fresh if step == 0 else torch.minimum(distance, fresh)
    return samples.vectors[torch.stack(chosen)].clone()


def sample_features(samples: Samples) -> Tensor:
    """float32[N, V + V·(V + 1)/2], whose product with `entry_features` is (t − c) M (t − c)ᵀ − t M tᵀ."""
    pulled = torch.einsum("nvw,nw->nv", samples.metrics, samples.vectors)
    row, column = torch.triu_indices(*samples.metrics.shape[1:])
    return torch.cat([-2 * pulled, samples.metrics[:, row, column]], dim=1)


def entry_features(codebook: Tensor) -> Tensor:
    """float32[K, V + V·(V + 1)/2]; products of different coordinates count twice, for both halves of M."""
    row, column = torch.triu_indices(codebook.shape[1], codebook.shape[1])
    twice = torch.where(row == column, 1.0, 2.0).to(codebook.device)
    return torch.cat([codebook, twice * codebook[:, row] * codebook[:, column]], dim=1)


def _own_terms(samples: Samples) -> Tensor:
    """float32[N]: t M tᵀ, the loss of an entry at the origin."""
    return torch.einsum("nv,nvw,nw->n", samples.vectors, samples.metrics, samples.vectors)


def _assign(features: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """(entry int64[N], its score float32[N]); the loss is the score plus t M tᵀ, which no entry changes."""
    entries = entry_features(codebook).T
    rows = max(1, SCORES_AT_A_TIME // len(codebook))
    best = [(part @ entries).min(dim=1) for part in features.split(rows)]
    return torch.cat([b.indices for b in best]), torch.cat([b.values for b in best])


def gather_cells(samples: Samples, chosen: Tensor, entries: int) -> Cells:
    """The normal equations of every entry, from the samples that chose it."""
    vector = samples.vectors.shape[1]
    pulled = torch.einsum("nvw,nw->nv", samples.metrics, samples.vectors)
    weights = samples.metrics.new_zeros(entries, vector, vector).index_add_(0, chosen, samples.metrics)
    return Cells(weights, pulled.new_zeros(entries, vector).index_add_(0, chosen, pulled))


def sweep_cells(
    targets: Tensor, indices: Tensor, pivots: Tensor, scales: Tensor, entries: int, row_weights: Tensor | None = None
) -> Cells:
    """The normal equations of every entry from a whole sweep's fed-back targets: t = T / a, M = r · a² · D_b.

    Args:
        targets: float32[m, n].
        indices: uint8[m, n / V].
        pivots: float32[n / V, V, V].
        scales: float32[m], the scales at which a codebook entry is a weight.
        row_weights: float32[m], r; 1 where None.
    """
    blocks, vector = pivots.shape[0], pivots.shape[1]
    chosen = indices.long()
    pulling = scales if row_weights is None else scales * row_weights
    # Σ r a² per (entry, block) first: then the V×V sums are one product over blocks instead of one per weight.
    mass = targets.new_zeros(entries * blocks)
    place = chosen * blocks + torch.arange(blocks, device=chosen.device)
    mass.index_add_(0, place.flatten(), (pulling * scales)[:, None].expand_as(chosen).flatten())
    weights = (mass.reshape(entries, blocks) @ pivots.flatten(1)).reshape(entries, vector, vector)
    scaled = targets.reshape(-1, blocks, vector) * pulling[:, None, None]
    pulled = torch.einsum("mbv,bvw->mbw", scaled, pivots)
    moments = targets.new_zeros(entries, vector).index_add_(0, chosen.flatten(), pulled.reshape(-1, vector))
    return Cells(weights, moments)


def solve_cells(cells: Cells, codebook: Tensor) -> Tensor:
    """float32[K, V]: c = (Σ M)⁻¹ Σ M t, held to the present entry along directions no sample weighs."""
    vector = codebook.shape[1]
    traces = cells.weights.diagonal(dim1=1, dim2=2).sum(dim=1)
    ridge = torch.where(traces > 0, 1e-6 * traces, 1.0)[:, None]
    identity = torch.eye(vector, device=codebook.device)
    return torch.linalg.solve(cells.weights + ridge[:, :, None] * identity, cells.moments + ridge * codebook)


def _reseed_empty(codebook: Tensor, cells: Cells, samples: Samples, scores: Tensor) -> Tensor:
    """Entries that no sample chose move onto the samples with the largest weighted error."""
    empty = (cells.weights.diagonal(dim1=1, dim2=2).sum(dim=1) <= 0).nonzero().flatten()
    if not len(empty):
        return codebook
    worst = (scores + _own_terms(samples)).topk(min(len(empty), len(scores))).indices
    result = codebook.clone()
    result[empty[: len(worst)]] = samples.vectors[worst]
    return result


def round_codebook(codebook: Tensor, cells: Cells, code: VQCode) -> tuple[Tensor, float]:
    """(codebook as stored, step): entries are worth step · stored. float16 pairs have step 1, int8 quads one common
    step.

    The step is the one, among CLIP_RATIOS of the largest entry, whose rounding costs the cells least.
    """
    if code.codebook_dtype == "float16":
        return codebook.to(torch.float16), 1.0
    largest = float(codebook.abs().max())
    if largest == 0:
        return codebook.to(torch.int8), 1.0
    tried = []
    for ratio in CLIP_RATIOS:
        step = ratio * largest / INT8_LIMIT
        stored = (codebook / step).round().clamp(-INT8_LIMIT, INT8_LIMIT)
        off = codebook - stored * step
        tried.append((float(torch.einsum("kv,kvw,kw->", off, cells.weights, off)), step, stored.to(torch.int8)))
    _, step, stored = min(tried, key=lambda item: item[0])
    return stored, step
