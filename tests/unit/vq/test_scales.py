from __future__ import annotations

import torch
from layer_problems import random_layer

from toolchain.vq.scales import refit_scales, rms_scales, stored_scales


def test_rms_by_hand():
    weight = torch.tensor([[3.0, 4.0, 9.0], [0.0, 0.0, 9.0]])
    torch.testing.assert_close(rms_scales(weight, 2), torch.tensor([(25 / 2) ** 0.5, 0.0]))


def test_refit_by_hand():
    weight, unit = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 1.0]])
    assert float(refit_scales(weight, unit, torch.eye(2), torch.tensor([1.0]))) == 1.5
    heavy_first = torch.diag(torch.tensor([3.0, 1.0]))
    assert float(refit_scales(weight, unit, heavy_first, torch.tensor([1.0]))) == 7 / 4


def test_refit_is_the_best_scale():
    weight, moment = random_layer(8, 32)
    unit = weight + 0.3 * torch.randn(8, 32, generator=torch.Generator().manual_seed(1)) * weight.std()
    best = refit_scales(weight, unit, moment, torch.ones(8))

    def loss(scales):
        error = weight - scales[:, None] * unit
        return ((error @ moment) * error).sum(dim=1)

    assert bool((loss(best) <= loss(best * 1.01)).all())
    assert bool((loss(best) <= loss(best * 0.99)).all())


def test_refit_stays_near_the_start_and_survives_empty_rows():
    weight = torch.tensor([[10.0, 10.0], [0.1, 0.1], [1.0, 1.0]])
    unit = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    found = refit_scales(weight, unit, torch.eye(2), torch.ones(3))
    assert found.tolist() == [2.0, 0.5, 1.0]


def test_stored_scales_are_finite_float16():
    found = stored_scales(torch.tensor([1e9, 0.1, 0.0]))
    assert found.dtype == torch.float16
    assert found.tolist() == [65504.0, float(torch.tensor(0.1).half()), 0.0]
