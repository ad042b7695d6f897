from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from toolchain.values import CODE_NAMES, CODES, PLAIN_CODE_NAMES, VQCode
from toolchain.vq import format as vq_format
from toolchain.vq import trellis
from toolchain.vq.assign import nearest_entries
from toolchain.vq.trellis import cheapest_windows, chunk_rows, search_for, tail_biting_paths

OVERLAPPING = [CODES[name] for name in CODE_NAMES if name not in PLAIN_CODE_NAMES]
# Small enough to try everything: more shift than overlap, as much, less, and less than half.
TINY = [VQCode(2, 2, 3), VQCode(2, 1, 2), VQCode(2, 1, 3), VQCode(2, 1, 4), VQCode(2, 3, 4), VQCode(2, 2, 4)]


def windows_of_streams(code: VQCode, steps: int) -> torch.Tensor:
    """int64[2^(k·T), T]: the windows of every circular stream of T symbols, by shifting bits."""
    bits = torch.tensor(list(itertools.product((0, 1), repeat=code.shift * steps)))
    places = torch.arange(steps)[:, None] * code.shift + torch.arange(code.window)
    weights = 1 << torch.arange(code.window - 1, -1, -1)
    return (bits[:, places % bits.shape[1]] * weights).sum(dim=-1)


def cost_of(windows: torch.Tensor, queries: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """float64[N]: Σ_t entries[w_t] · queries[t] of windows [T, N]."""
    return torch.einsum("tnf,tfn->n", entries.double()[windows], queries.double())


def follows(windows: torch.Tensor, code: VQCode) -> bool:
    """Every window begins as the one before it ends, the first as the last."""
    overlap = code.window - code.shift
    return torch.equal(windows & ((1 << overlap) - 1), windows.roll(-1, dims=0) >> code.shift)


def random_search(code: VQCode, steps: int, chunks: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(steps, 3, chunks, generator=generator)
    return queries, torch.randn(code.entries, 3, generator=generator)


@pytest.mark.parametrize("code", TINY, ids=str)
@pytest.mark.parametrize("steps", [2, 4, 5])
def test_tiny_codes_find_the_cheapest_circle(code, steps, monkeypatch):
    monkeypatch.setattr(trellis, "SEAMS", 64)
    queries, entries = random_search(code, steps, chunks=30)
    found = tail_biting_paths(queries, entries, code)
    assert follows(found, code)
    streams = windows_of_streams(code, steps)
    costs = torch.stack([cost_of(s[:, None].expand(-1, 30), queries, entries) for s in streams])
    torch.testing.assert_close(cost_of(found, queries, entries), costs.amin(dim=0), rtol=1e-5, atol=1e-5)


def test_a_circle_by_hand():
    # (2,1,2): windows 01 and 10 alternate, 00 and 11 stay. Window 01 is dear in step 0 and 11 in step 1.
    entries = torch.eye(4)
    queries = torch.tensor([[0.5, 9.0, 0.3, 0.4], [1.0, 0.2, 9.0, 9.0]])[..., None]
    # 00 00 costs 1.5, 11 11 costs 9.4, 01 10 costs 18, 10 01 costs 0.5.
    assert tail_biting_paths(queries, entries, VQCode(2, 1, 2)).flatten().tolist() == [2, 1]


@pytest.mark.parametrize("code", OVERLAPPING, ids=str)
def test_paths_close_and_four_seams_nearly_suffice(code, monkeypatch):
    queries, entries = random_search(code, 16, chunks=40)
    found = tail_biting_paths(queries, entries, code)
    assert follows(found, code)
    assert int(found.min()) >= 0
    assert int(found.max()) < code.entries
    monkeypatch.setattr(trellis, "SEAMS", 64)
    best = cost_of(tail_biting_paths(queries, entries, code), queries, entries)
    assert bool((cost_of(found, queries, entries) >= best - 1e-4).all())
    assert float(cost_of(found, queries, entries).sum()) <= 0.99 * float(best.sum())  # costs are negative


@pytest.mark.parametrize("code", OVERLAPPING, ids=str)
def test_symbols_give_back_the_windows(code):
    found = tail_biting_paths(*random_search(code, 16, chunks=20), code)
    symbols = (found >> (code.window - code.shift)).T.numpy().astype(np.uint8)
    assert np.array_equal(vq_format.windows_from_symbols(symbols, code), found.T.numpy())


def test_taking_chunks_in_pieces_changes_nothing(monkeypatch):
    code = CODES["2,4,8"]
    queries, entries = random_search(code, 16, chunks=25)
    whole = tail_biting_paths(queries, entries, code)
    monkeypatch.setattr(trellis, "COSTS_ON_CPU", 16 * 256 * 7)
    assert torch.equal(tail_biting_paths(queries, entries, code), whole)


@pytest.mark.parametrize("code", [VQCode(2, 1, 2), CODES["2,4,8"], CODES["4,8,9"]], ids=str)
def test_rows_become_chunks_as_the_format_cuts_them(code):
    generator = torch.Generator().manual_seed(3)
    targets, scales = torch.randn(256, code.vector, generator=generator), torch.rand(256, generator=generator)
    codebook = torch.randn(code.entries, code.vector, generator=generator)
    root = torch.randn(code.vector, code.vector, generator=generator)
    metric = root @ root.T
    found = cheapest_windows(targets, metric, codebook, scales, code)
    assert found.dtype == (torch.int16 if code.entries > 256 else torch.uint8)
    windows = vq_format.chunks_from_matrix(found[:, None].numpy().astype(np.uint16), code)
    symbols = (windows >> (code.window - code.shift)).astype(np.uint8)
    assert np.array_equal(vq_format.windows_from_symbols(symbols, code), windows)
    # Each chunk is what the search finds for its 16 rows alone, the loss written out.
    group, inside = torch.tensor([1]), torch.tensor([5])
    rows = chunk_rows(group, inside)[0]
    assert rows.tolist() == list(range(128 + 5, 256, 8))
    off = targets[rows][:, None] - scales[rows][:, None, None] * codebook
    losses = torch.einsum("tcv,vw,tcw->tc", off, metric, off)
    alone = tail_biting_paths(losses[..., None], torch.eye(code.entries), code).flatten()
    assert torch.equal(found[rows].long(), alone)


def test_rows_of_scale_zero_leave_their_neighbours_free():
    # With every other row silent, (2,4,8) has eight bits for each row that counts: it is the nearest entry.
    code = CODES["2,4,8"]
    generator = torch.Generator().manual_seed(4)
    targets, codebook = torch.randn(128, 2, generator=generator), torch.randn(256, 2, generator=generator)
    scales = torch.ones(128)
    silent = (torch.arange(128) // 8) % 2 == 1
    scales[silent] = 0
    found = cheapest_windows(targets, torch.eye(2), codebook, scales, code)
    nearest = nearest_entries(targets, torch.eye(2), codebook, scales)
    assert torch.equal(found[~silent], nearest[~silent])


def test_plain_codes_take_the_nearest_entry():
    assert search_for(CODES["4,8,8"]) is nearest_entries
    assert search_for(CODES["2,4,8"]) is not nearest_entries
