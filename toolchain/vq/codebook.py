"""Tables trained in the metric they will be paid in: Lloyd's algorithm where every sample has its own V×V metric.

A sample is a vector t of V weights at unit row scale with metric M = a² · D_b; the loss is Σ (t − c) M (t − c)ᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from toolchain.values import VQCode

INT8_LIMIT = 127
# Scores a piece of samples makes: 1 MiB of float32 stays in cache between the product and the search for the least.
SCORES_AT_A_TIME = 1 << 18
# Clip ratios tried when a table becomes int8: one far entry must not cost all the others their resolution.
CLIP_RATIOS = tuple(1.0 - 0.05 * step for step in range(13))


@dataclass(frozen=True)
class Samples:
    """vectors float32[N, V] at unit row scale, metrics float32[N, V, V], symmetric positive semidefinite."""

    vectors: Tensor
    metrics: Tensor


@dataclass(frozen=True)
class Cells:
    """Normal equations of a table's entries: weights Σ M float32[K, V, V] and moments Σ M t float32[K, V]."""

    weights: Tensor
    moments: Tensor


def draw_samples(unit: Tensor, pivots: Tensor, scales: Tensor, count: int, generator: torch.Generator) -> Samples:
    """At most `count` vectors, one from each of `count` equal stretches of the matrix, so that all rows are heard.

    Args:
        unit: float32[m, n], weights divided by their row scale.
        pivots: float32[n / V, V, V] (D_b).
        scales: float32[m].
        generator: draws the place inside each stretch; the result depends on nothing else random.
    """
    blocks, vector = pivots.shape[0], pivots.shape[1]
    total = unit.shape[0] * blocks
    if total <= count:
        places = torch.arange(total, device=unit.device)
    else:
        inside = torch.rand(count, generator=generator, dtype=torch.float64, device=generator.device)
        starts = torch.arange(count, dtype=torch.float64, device=generator.device) + inside
        places = (starts * (total / count)).long().clamp(max=total - 1).to(unit.device)
    row, block = places // blocks, places % blocks
    metrics = pivots[block] * scales[row].square()[:, None, None]
    return Samples(unit.reshape(-1, blocks, vector)[row, block], metrics)


def train_table(samples: Samples, entries: int, rounds: int, generator: torch.Generator) -> tuple[Tensor, Cells]:
    """(table float32[entries, V] of locally least Σ (t − c) M (t − c)ᵀ, its cells): k-means++, then Lloyd rounds."""
    features = sample_features(samples)
    table = seed_table(samples, features, entries, generator)
    for _ in range(rounds):
        chosen, scores = _assign(features, table)
        cells = gather_cells(samples, chosen, entries)
        table = solve_cells(cells, table)
        table = _reseed_empty(table, cells, samples, scores)
    return table, gather_cells(samples, _assign(features, table)[0], entries)


def seed_table(samples: Samples, features: Tensor, entries: int, generator: torch.Generator) -> Tensor:
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


def entry_features(table: Tensor) -> Tensor:
    """float32[K, V + V·(V + 1)/2]; products of different coordinates count twice, for both halves of M."""
    row, column = torch.triu_indices(table.shape[1], table.shape[1])
    twice = torch.where(row == column, 1.0, 2.0).to(table.device)
    return torch.cat([table, twice * table[:, row] * table[:, column]], dim=1)


def _own_terms(samples: Samples) -> Tensor:
    """float32[N]: t M tᵀ, the loss of an entry at the origin."""
    return torch.einsum("nv,nvw,nw->n", samples.vectors, samples.metrics, samples.vectors)


def _assign(features: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """(entry int64[N], its score float32[N]); the loss is the score plus t M tᵀ, which no entry changes."""
    entries = entry_features(table).T
    rows = max(1, SCORES_AT_A_TIME // len(table))
    best = [(part @ entries).min(dim=1) for part in features.split(rows)]
    return torch.cat([b.indices for b in best]), torch.cat([b.values for b in best])


def gather_cells(samples: Samples, chosen: Tensor, entries: int) -> Cells:
    """The normal equations of every entry, from the samples that chose it."""
    vector = samples.vectors.shape[1]
    pulled = torch.einsum("nvw,nw->nv", samples.metrics, samples.vectors)
    weights = samples.metrics.new_zeros(entries, vector, vector).index_add_(0, chosen, samples.metrics)
    return Cells(weights, pulled.new_zeros(entries, vector).index_add_(0, chosen, pulled))


def sweep_cells(targets: Tensor, indices: Tensor, pivots: Tensor, scales: Tensor, entries: int) -> Cells:
    """The normal equations of every entry from a whole sweep's fed-back targets: t = T / a, M = a² · D_b.

    Args:
        targets: float32[m, n].
        indices: uint8[m, n / V].
        pivots: float32[n / V, V, V].
        scales: float32[m], the scales at which a table entry is a weight.
    """
    blocks, vector = pivots.shape[0], pivots.shape[1]
    chosen = indices.long()
    # Σ a² per (entry, block) first: then the V×V sums are one product over blocks instead of one per weight.
    mass = targets.new_zeros(entries * blocks)
    place = chosen * blocks + torch.arange(blocks, device=chosen.device)
    mass.index_add_(0, place.flatten(), scales.square()[:, None].expand_as(chosen).flatten())
    weights = (mass.reshape(entries, blocks) @ pivots.flatten(1)).reshape(entries, vector, vector)
    scaled = targets.reshape(-1, blocks, vector) * scales[:, None, None]
    pulled = torch.einsum("mbv,bvw->mbw", scaled, pivots)
    moments = targets.new_zeros(entries, vector).index_add_(0, chosen.flatten(), pulled.reshape(-1, vector))
    return Cells(weights, moments)


def solve_cells(cells: Cells, table: Tensor) -> Tensor:
    """float32[K, V]: c = (Σ M)⁻¹ Σ M t, held to the present entry along directions no sample weighs."""
    vector = table.shape[1]
    traces = cells.weights.diagonal(dim1=1, dim2=2).sum(dim=1)
    ridge = torch.where(traces > 0, 1e-6 * traces, 1.0)[:, None]
    identity = torch.eye(vector, device=table.device)
    return torch.linalg.solve(cells.weights + ridge[:, :, None] * identity, cells.moments + ridge * table)


def _reseed_empty(table: Tensor, cells: Cells, samples: Samples, scores: Tensor) -> Tensor:
    """Entries that no sample chose move onto the samples with the largest weighted error."""
    empty = (cells.weights.diagonal(dim1=1, dim2=2).sum(dim=1) <= 0).nonzero().flatten()
    if not len(empty):
        return table
    worst = (scores + _own_terms(samples)).topk(min(len(empty), len(scores))).indices
    result = table.clone()
    result[empty[: len(worst)]] = samples.vectors[worst]
    return result


def round_table(table: Tensor, cells: Cells, code: VQCode) -> tuple[Tensor, float]:
    """(table as stored, step): entries are worth step · stored. float16 pairs have step 1, int8 quads one common step.

    The step is the one, among CLIP_RATIOS of the largest entry, whose rounding costs the cells least.
    """
    if code.table_dtype == "float16":
        return table.to(torch.float16), 1.0
    largest = float(table.abs().max())
    if largest == 0:
        return table.to(torch.int8), 1.0
    tried = []
    for ratio in CLIP_RATIOS:
        step = ratio * largest / INT8_LIMIT
        stored = (table / step).round().clamp(-INT8_LIMIT, INT8_LIMIT)
        off = table - stored * step
        tried.append((float(torch.einsum("kv,kvw,kw->", off, cells.weights, off)), step, stored.to(torch.int8)))
    _, step, stored = min(tried, key=lambda item: item[0])
    return stored, step
