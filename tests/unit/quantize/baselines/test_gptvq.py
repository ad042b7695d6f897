from __future__ import annotations

import pytest
import torch
from layer_problems import random_layer

from toolchain.quantize.baselines import gptvq, nearest
from toolchain.values import PLAIN_CODE_NAMES, VQCode
from toolchain.vq import solve
from toolchain.vq.factor import factor_moment
from toolchain.vq.sweep import sweep
from toolchain.vq.weights import Options

FAST = Options(lloyd_rounds=4, samples=4_000)


def test_scalar_vectors_make_it_exact():
    """With V = 1 there is no coupling inside a vector to ignore: the indices are those of the exact sweep."""
    weight, moment = random_layer(50, 48)
    factors = factor_moment(moment, 48, 1, 0.01)
    codebook = torch.tensor([[-1.5], [-0.45], [0.45], [1.5]]).half()
    scales = weight.square().mean(dim=1).sqrt().half()
    exact, _ = sweep(weight, factors, codebook, scales, 16)
    assert torch.equal(gptvq.diagonal_sweep(weight, factors, codebook, scales, 16), exact)


def test_batches_change_nothing():
    weight, moment = random_layer(30, 64)
    factors = factor_moment(moment, 64, 1, 0.01)
    codebook = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)).half()
    scales = weight.square().mean(dim=1).sqrt().half()
    small, large = (gptvq.diagonal_sweep(weight, factors, codebook, scales, batch) for batch in (8, 64))
    assert (small != large).float().mean() < 0.01  # a rounding may tip a tie, and what follows it


def test_feedback_by_hand():
    """Two vectors of two columns, by the update rule written out with the inverse of U."""
    weight, moment = random_layer(1, 4)
    factors = factor_moment(moment, 4, 1, 0.01)
    codebook, scales = (
        torch.tensor([[-1.0, -1.0], [1.0, 1.0], [-1.0, 1.0], [1.0, -1.0]]).half(),
        torch.tensor([0.03]).half(),
    )
    entries, feed = codebook.float() * scales.float(), torch.linalg.inv(factors.unit)
    pivots = factors.pivots.flatten()
    first = int(((weight[0, :2] - entries).square() @ pivots[:2]).argmin())
    target = weight[0, 2:] - (weight[0, :2] - entries[first]) @ feed[:2, 2:]
    second = int(((target - entries).square() @ pivots[2:]).argmin())
    assert gptvq.diagonal_sweep(weight, factors, codebook, scales, 4).tolist() == [[first, second]]


@pytest.mark.parametrize("code", PLAIN_CODE_NAMES)
def test_it_stands_between_plain_vectors_and_the_exact_metric(code):
    weight, moment = random_layer(128, 128)
    losses = [
        method.quantize_group([weight], moment, VQCode.parse(code), FAST, torch.Generator().manual_seed(0)).loss
        for method in (solve, gptvq, nearest)
    ]
    assert losses[0] < losses[1] < losses[2]


def test_the_refitted_codebook_wins(monkeypatch):
    weight, moment = random_layer(96, 64)
    losses = []
    for steps in (gptvq.REFIT_STEPS, 0):
        monkeypatch.setattr(gptvq, "REFIT_STEPS", steps)
        group = gptvq.quantize_group([weight], moment, VQCode.parse("4,8,8"), FAST, torch.Generator().manual_seed(0))
        losses.append(group.loss)
    assert losses[0] < losses[1]


def test_refitted_scales_win(monkeypatch):
    weight, moment = random_layer(96, 64)
    found = gptvq.quantize_group([weight], moment, VQCode.parse("4,8,8"), FAST, torch.Generator().manual_seed(0))
    monkeypatch.setattr(gptvq, "refit_scales", lambda _weight, _unit, _moment, start: start)
    fixed = gptvq.quantize_group([weight], moment, VQCode.parse("4,8,8"), FAST, torch.Generator().manual_seed(0))
    assert found.loss < fixed.loss
