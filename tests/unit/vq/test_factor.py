from __future__ import annotations

import pytest
import torch
from layer_problems import random_moment

from toolchain.errors import NumericGateError
from toolchain.vq.factor import block_udu, factor_moment


def block_diagonal(pivots):
    return torch.block_diag(*pivots)


@pytest.mark.parametrize("vector", [2, 4])
def test_udu_gives_the_matrix_back(vector):
    moment = random_moment(32, torch.Generator().manual_seed(0)).double() + 0.01 * torch.eye(32)
    unit, pivots = block_udu(moment, vector)
    torch.testing.assert_close(unit @ block_diagonal(pivots) @ unit.T, moment, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("vector", [2, 4])
def test_unit_factor_is_block_upper_with_identity_blocks(vector):
    moment = random_moment(16, torch.Generator().manual_seed(1)).double()
    unit, _ = block_udu(moment, vector)
    for row in range(16 // vector):
        for column in range(row + 1):
            block = unit[row * vector : (row + 1) * vector, column * vector : (column + 1) * vector]
            expected = torch.eye(vector, dtype=torch.float64) if row == column else torch.zeros_like(block)
            torch.testing.assert_close(block, expected, rtol=0, atol=1e-12)


def test_the_loss_splits_into_pivots():
    generator = torch.Generator().manual_seed(2)
    moment = random_moment(16, generator).double()
    error = torch.randn(5, 16, generator=generator).double()
    unit, pivots = block_udu(moment, 4)
    eta = (error @ unit).reshape(5, 4, 4)
    split = torch.einsum("mbv,bvw,mbw->", eta, pivots, eta)
    torch.testing.assert_close(split, torch.trace(error @ moment @ error.T))


def test_an_indefinite_matrix_is_not_factored():
    assert block_udu(torch.diag(torch.tensor([1.0, -1.0, 1.0, 1.0])), 2) is None


def test_damping_grows_until_the_factor_exists():
    # A slightly indefinite moment, as rounding makes them: eigenvalue −0.02 of a mean diagonal of 1.
    moment = torch.eye(16)
    moment[0, 0], moment[1, 1] = -0.02, 2.02
    factors = factor_moment(moment, 16, 4, damping=0.01)
    assert factors.damping == pytest.approx(0.03)
    damped = factors.unit @ block_diagonal(factors.pivots) @ factors.unit.T
    torch.testing.assert_close(damped, moment + 0.03 * torch.eye(16))


def test_dead_columns_keep_a_small_metric_and_padding_none():
    moment = random_moment(12, torch.Generator().manual_seed(3))
    moment[5], moment[:, 5] = 0, 0
    padded = torch.nn.functional.pad(moment, (0, 4, 0, 4))
    factors = factor_moment(padded, 12, 4, damping=0.01)
    mean = moment.diagonal().mean()
    torch.testing.assert_close(factors.pivots[1, 1, 1], 0.01 * mean)
    assert float(factors.pivots[3].abs().max()) == 0
    assert float(factors.damped[12:].abs().max()) == 0


@pytest.mark.parametrize("moment", [torch.zeros(16, 16), torch.full((16, 16), torch.inf)])
def test_unusable_moments_are_refused(moment):
    with pytest.raises(NumericGateError, match="second moment of 16 inputs: expected finite"):
        factor_moment(moment, 16, 4, damping=0.01)


def test_a_hopeless_moment_is_refused():
    moment = torch.diag(torch.tensor([-8.0] + [1.0] * 15))
    moment[1, 1] = 20
    with pytest.raises(NumericGateError, match="cannot be factored"):
        factor_moment(moment, 16, 4, damping=0.001)
