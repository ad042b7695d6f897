from __future__ import annotations

import pytest
import torch
from layer_problems import random_layer

from toolchain.values import VQCode
from toolchain.vq.assign import nearest_entries
from toolchain.vq.factor import factor_moment
from toolchain.vq.sweep import sweep
from toolchain.vq.trellis import chunk_rows, search_for
from toolchain.vq.weights import decode_stacked


def resolved_loss(error_so_far: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Least e S eᵀ over everything not yet fixed, for the fixed errors [q]: their metric is the Schur complement."""
    fixed = len(error_so_far)
    known, cross, free = moment[:fixed, :fixed], moment[:fixed, fixed:], moment[fixed:, fixed:]
    metric = known - cross @ torch.linalg.solve(free, cross.T) if len(free) else known
    return error_so_far @ metric @ error_so_far


def exact_greedy_codes(weight, moment, codebook, scales):
    """The slow, obvious sweep: one row, one block, one entry at a time; every choice re-solves all columns after it."""
    vector = codebook.shape[1]
    rows, columns = weight.shape
    indices = torch.zeros(rows, columns // vector, dtype=torch.uint8)
    for row in range(rows):
        error = torch.zeros(0, dtype=torch.float64)
        for at in range(0, columns, vector):
            block = weight[row, at : at + vector]
            tried = [torch.cat([error, block - scales[row] * entry]) for entry in codebook]
            best = int(torch.stack([resolved_loss(e, moment) for e in tried]).argmin())
            indices[row, at // vector], error = best, tried[best]
    return indices


def small_problem(vector: int, seed: int):
    weight, moment = random_layer(6, 16, seed)
    generator = torch.Generator().manual_seed(seed + 100)
    codebook = (1.2 * torch.randn(12, vector, generator=generator)).half()
    scales = weight.square().mean(dim=1).sqrt().half()
    return weight, factor_moment(moment, 16, vector, damping=0.01), codebook, scales


def test_the_reference_resolves_by_hand():
    # One fixed column with error 1 and one free one: the best the free one can do is e = −S_12 / S_22.
    moment = torch.tensor([[2.0, 1.0], [1.0, 4.0]], dtype=torch.float64)
    loss = resolved_loss(torch.tensor([1.0], dtype=torch.float64), moment)
    assert float(loss) == pytest.approx(2 - 1 / 4)
    best = torch.tensor([1.0, -0.25], dtype=torch.float64)
    assert float(best @ moment @ best) == pytest.approx(float(loss))


@pytest.mark.parametrize("vector", [2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_equals_exact_resolving(vector, seed):
    weight, factors, codebook, scales = small_problem(vector, seed)
    found, _ = sweep(weight, factors, codebook, scales, batch_columns=128)
    expected = exact_greedy_codes(weight.double(), factors.damped.double(), codebook.double(), scales.double())
    assert torch.equal(found, expected)


@pytest.mark.parametrize("vector", [2, 4])
def test_batches_change_nothing_but_rounding(vector):
    weight, moment = random_layer(40, 96, seed=5)
    factors = factor_moment(moment, 96, vector, damping=0.01)
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(64, vector, generator=generator).half()
    scales = weight.square().mean(dim=1).sqrt().half()
    small, small_targets = sweep(weight, factors, codebook, scales, batch_columns=16)
    large, large_targets = sweep(weight, factors, codebook, scales, batch_columns=96)
    assert torch.equal(small, large)
    torch.testing.assert_close(small_targets, large_targets, rtol=1e-4, atol=1e-6)


def test_targets_carry_the_errors_before_them():
    weight, factors, codebook, scales = small_problem(4, seed=1)
    indices, targets = sweep(weight, factors, codebook, scales, batch_columns=8)
    error = weight - decode_stacked(indices, codebook, scales)
    strictly_upper = factors.unit - torch.block_diag(*[torch.eye(4)] * 4)
    torch.testing.assert_close(targets, weight + error @ strictly_upper)


def test_paths_are_the_cheapest_of_all_streams_given_the_blocks_before():
    # (2,1,2) has 2^16 streams a chunk: all are tried, in the metric of each block, on the errors of those before it.
    code = VQCode(2, 1, 2)
    weight, moment = random_layer(128, 16, seed=6)
    factors = factor_moment(moment, 16, 2, damping=0.01)
    codebook = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).half()
    scales = weight.square().mean(dim=1).sqrt().half()
    indices, targets = sweep(weight, factors, codebook, scales, 8, search_for(code))
    error = weight - decode_stacked(indices, codebook, scales)
    torch.testing.assert_close(targets, weight + error @ (factors.unit - torch.block_diag(*[torch.eye(2)] * 8)))
    symbols = torch.arange(1 << 16)[:, None] >> torch.arange(15, -1, -1) & 1
    streams = 2 * symbols + symbols.roll(-1, dims=1)
    for block, inside in ((0, 0), (3, 5), (7, 7)):
        rows = chunk_rows(torch.tensor(0), torch.tensor(inside))
        off = targets[rows, None, 2 * block : 2 * block + 2] - scales[rows, None, None].float() * codebook.float()
        losses = torch.einsum("tcv,vw,tcw->tc", off, factors.pivots[block], off)
        totals = losses.gather(1, streams.T).sum(dim=0)
        found = losses.gather(1, indices[rows, block].long()[:, None]).sum()
        assert float(found) == pytest.approx(float(totals.min()), rel=1e-4)


def test_feedback_beats_nearest_entries():
    weight, moment = random_layer(64, 64, seed=2)
    factors = factor_moment(moment, 64, 4, damping=0.01)
    codebook = torch.randn(256, 4, generator=torch.Generator().manual_seed(0)).half()
    scales = weight.square().mean(dim=1).sqrt().half()
    swept, _ = sweep(weight, factors, codebook, scales, batch_columns=32)
    plain = nearest_entries(weight.reshape(-1, 4), torch.eye(4), codebook.float(), scales.float().repeat_interleave(16))

    def loss(indices):
        error = weight - decode_stacked(indices, codebook, scales)
        return float(((error @ moment) * error).sum())

    assert loss(swept) < 0.7 * loss(plain.reshape(64, 16))
