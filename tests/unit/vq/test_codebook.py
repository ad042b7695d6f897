from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from toolchain.values import CODES
from toolchain.vq.codebook import (
    Cells,
    Samples,
    draw_samples,
    entry_features,
    gather_cells,
    round_table,
    sample_features,
    seed_table,
    solve_cells,
    sweep_cells,
    train_table,
)


def random_samples(count: int = 600, vector: int = 4, seed: int = 0) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    roots = torch.randn(count, vector, vector, generator=generator)
    return Samples(torch.randn(count, vector, generator=generator), roots @ roots.mT)


def table_loss(samples: Samples, table: torch.Tensor) -> float:
    """Σ over samples of the least (t − c) M (t − c)ᵀ, the obvious way."""
    off = samples.vectors[:, None] - table[None]
    return float(torch.einsum("nkv,nvw,nkw->nk", off, samples.metrics, off).min(dim=1).values.sum())


@pytest.mark.parametrize("vector", [2, 4])
def test_features_give_the_weighted_distance(vector):
    samples = random_samples(50, vector)
    table = torch.randn(7, vector, generator=torch.Generator().manual_seed(1))
    off = samples.vectors[:, None] - table[None]
    expected = torch.einsum("nkv,nvw,nkw->nk", off, samples.metrics, off)
    own = torch.einsum("nv,nvw,nw->n", samples.vectors, samples.metrics, samples.vectors)
    found = sample_features(samples) @ entry_features(table).T + own[:, None]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_lloyd_never_gets_worse():
    samples = random_samples()
    losses = []
    for rounds in range(6):
        table, _ = train_table(samples, 16, rounds, torch.Generator().manual_seed(3))
        losses.append(table_loss(samples, table))
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(losses))
    assert losses[-1] < 0.9 * losses[0]


def test_training_depends_on_the_generator_alone():
    first, _ = train_table(random_samples(), 16, 4, torch.Generator().manual_seed(5))
    again, _ = train_table(random_samples(), 16, 4, torch.Generator().manual_seed(5))
    other, _ = train_table(random_samples(), 16, 4, torch.Generator().manual_seed(6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_metric_moves_the_entries():
    # Two samples, one entry: the mean where metrics are equal, the heavy sample where they are not.
    vectors = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    equal = Samples(vectors, torch.eye(2).expand(2, -1, -1))
    table, _ = train_table(equal, 1, 3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(table, torch.tensor([[0.5, 0.5]]), rtol=0, atol=1e-5)
    heavy = Samples(vectors, torch.stack([torch.eye(2), 3 * torch.eye(2)]))
    table, _ = train_table(heavy, 1, 3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(table, torch.tensor([[0.75, 0.75]]), rtol=0, atol=1e-5)


def test_solved_entries_are_stationary():
    samples = random_samples(200)
    chosen = torch.arange(200) % 8
    cells = gather_cells(samples, chosen, 8)
    table = solve_cells(cells, torch.zeros(8, 4)).requires_grad_()
    off = samples.vectors - table[chosen]
    torch.einsum("nv,nvw,nw->", off, samples.metrics, off).backward()
    assert float(table.grad.abs().max()) < 1e-2 * float(cells.moments.abs().max())


def test_unused_entries_stay_where_they_are():
    cells = Cells(torch.zeros(2, 2, 2), torch.zeros(2, 2))
    table = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    torch.testing.assert_close(solve_cells(cells, table), table)


def test_no_entry_is_wasted_on_clustered_data():
    # Eight far clusters, 16 entries, a start that may well put several entries into one cluster.
    generator = torch.Generator().manual_seed(0)
    vectors = 20 * torch.randn(8, 2, generator=generator).repeat(50, 1) + torch.randn(400, 2, generator=generator)
    samples = Samples(vectors, torch.eye(2).expand(400, -1, -1).contiguous())
    _, cells = train_table(samples, 16, 10, torch.Generator().manual_seed(1))
    assert bool((cells.weights[:, 0, 0] > 0).all())


def test_fewer_samples_than_entries_is_no_obstacle():
    samples = random_samples(5)
    table, _ = train_table(samples, 16, 3, torch.Generator().manual_seed(0))
    assert bool(torch.isfinite(table).all())
    assert table_loss(samples, table) == pytest.approx(0, abs=1e-3)


def test_seeds_are_samples_of_some_weight():
    samples = random_samples(100)
    samples.metrics[:50] = 0
    table = seed_table(samples, sample_features(samples), 20, torch.Generator().manual_seed(0))
    weighted = samples.vectors[50:]
    assert all(bool((weighted == entry).all(dim=1).any()) for entry in table)


def test_drawn_samples_come_from_all_rows():
    unit = torch.arange(64.0)[:, None].expand(64, 16)
    pivots = torch.eye(4).expand(4, -1, -1)
    drawn = draw_samples(unit, pivots, torch.ones(64), 64, torch.Generator().manual_seed(0))
    assert len(drawn.vectors) == 64
    assert len(drawn.vectors[:, 0].unique()) == 64
    everything = draw_samples(unit, pivots, torch.ones(64), 10_000, torch.Generator())
    assert len(everything.vectors) == 64 * 4


def test_sweep_cells_equal_gathered_ones():
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(4, 4, 4, generator=generator)
    pivots, scales = roots @ roots.mT, 0.5 + torch.rand(10, generator=generator)
    targets = torch.randn(10, 16, generator=generator)
    indices = torch.randint(0, 8, (10, 4), generator=generator).to(torch.uint8)
    samples = draw_samples(targets / scales[:, None], pivots, scales, 1_000, generator)
    expected = gather_cells(samples, indices.flatten().long(), 8)
    found = sweep_cells(targets, indices, pivots, scales, 8)
    torch.testing.assert_close(found.weights, expected.weights)
    torch.testing.assert_close(found.moments, expected.moments)


def test_pairs_round_to_float16():
    table = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    stored, step = round_table(table, Cells(torch.eye(2).expand(64, -1, -1), table), CODES["2,6,6"])
    assert (stored.dtype, step) == (torch.float16, 1.0)
    assert torch.equal(stored, table.half())


def test_quads_round_to_int8_within_half_a_step():
    table = torch.randn(256, 4, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    table[0, 0] = 3.0
    stored, step = round_table(table, Cells(torch.eye(4).expand(256, -1, -1), table), CODES["4,8,8"])
    assert stored.dtype == torch.int8
    assert step <= 3 / 127 * (1 + 1e-6)
    assert float((table - stored.float() * step).abs().max()) <= max(step / 2, 3 - 127 * step) * (1 + 1e-4)


def test_an_entry_nobody_weighs_does_not_set_the_step():
    table = torch.randn(256, 4, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    table[0, 0] = 5.0
    weights = torch.eye(4).repeat(256, 1, 1)
    weights[0] = 0
    _, step = round_table(table, Cells(weights, table), CODES["4,8,8"])
    assert step < 4 / 127


def test_a_table_of_zeros_rounds():
    stored, step = round_table(torch.zeros(256, 4), Cells(torch.zeros(256, 4, 4), torch.zeros(256, 4)), CODES["4,8,8"])
    assert step == 1.0
    assert int(stored.abs().max()) == 0
