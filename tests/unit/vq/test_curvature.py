"""token weights, Kronecker factors and solves, on cases worked by hand and against dense float64 algebra."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layer_problems import random_moment

from toolchain.errors import NumericGateError
from toolchain.vq import curvature
from toolchain.vq.curvature import (
    LEAST_SHARE,
    balanced_token_weights,
    capped_token_weights,
    damp,
    half_iteration,
    kronecker_scale,
    newton_shift,
    quadratic,
    solve_factor,
    unit_mean,
)


@st.composite
def tokens(draw):
    """(s float32[N], is_image bool[N] or None, power)."""
    norms = draw(st.lists(st.floats(0, 1e4, width=32), min_size=1, max_size=30))
    mask = draw(st.none() | st.lists(st.booleans(), min_size=len(norms), max_size=len(norms)))
    power = draw(st.sampled_from([0.0, 0.5, 1.0]))
    return torch.tensor(norms), None if mask is None else torch.tensor(mask), power


@given(tokens())
def test_masses_are_shares(problem):
    token_weights = balanced_token_weights(*problem)
    assert bool((token_weights >= 0).all())
    assert float(token_weights.sum()) == pytest.approx(1, abs=1e-5)


def test_masses_by_hand():
    """Image tokens ask for 3/4 of the loss, text for 1/4: both above the least share, so that nothing is lifted."""
    norms = torch.tensor([4.0, 2.0, 1.0, 1.0])
    image = torch.tensor([True, True, False, False])
    torch.testing.assert_close(balanced_token_weights(norms, image), torch.tensor([0.5, 0.25, 0.125, 0.125]))
    half = balanced_token_weights(norms[:2], None, power=0.5)
    torch.testing.assert_close(half, torch.tensor([2.0, 2**0.5]) / (2 + 2**0.5))


def test_a_quiet_modality_is_lifted():
    """Equation 2: shares 0.9998 and 0.0002 become max(·, 0.2) over their sum, however they are split inside."""
    norms = torch.tensor([3.0, 1.0, 2e-4, 6e-4])
    image = torch.tensor([True, True, False, False])
    token_weights = balanced_token_weights(norms, image)
    share = LEAST_SHARE / (LEAST_SHARE + 4 / 4.0008)
    torch.testing.assert_close(token_weights[2:], share * torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(token_weights[:2], (1 - share) * torch.tensor([0.75, 0.25]))


def test_power_0_counts_tokens_alike_and_gives_either_modality_half():
    norms = torch.tensor([5.0, 0.0, 1e-3, 7.0, 2.0])
    image = torch.tensor([True, False, False, False, True])
    expected = torch.tensor([1 / 4, 1 / 6, 1 / 6, 1 / 6, 1 / 4])
    torch.testing.assert_close(balanced_token_weights(norms, image, power=0.0), expected)
    torch.testing.assert_close(balanced_token_weights(norms, None, power=0.0), torch.full((5,), 0.2))


@pytest.mark.parametrize("image", [True, False])
def test_a_modality_that_is_missing_leaves_its_mass_to_the_other(image):
    norms = torch.tensor([1.0, 3.0])
    token_weights = balanced_token_weights(norms, torch.tensor([image, image]))
    torch.testing.assert_close(token_weights, torch.tensor([0.25, 0.75]))


def test_a_modality_that_no_loss_reaches_has_no_mass():
    """The last block's image positions: only what text asks for is left."""
    token_weights = balanced_token_weights(torch.tensor([0.0, 0.0, 1.0, 3.0]), torch.tensor([True, True, False, False]))
    torch.testing.assert_close(token_weights, torch.tensor([0.0, 0.0, 0.25, 0.75]))


def test_where_no_loss_reaches_anything_all_tokens_count_alike():
    torch.testing.assert_close(
        balanced_token_weights(torch.zeros(4), torch.tensor([True, False, False, False])), torch.ones(4) / 4
    )


def test_norms_near_nothing_keep_their_mass():
    """The least float32 there is: its share of itself is 1, though half of it is 0."""
    norms = torch.tensor([1.0, 1e-45])
    token_weights = balanced_token_weights(norms, torch.tensor([True, False]))
    torch.testing.assert_close(token_weights, torch.tensor([5 / 6, 1 / 6]))


def test_the_scale_of_the_gradients_is_no_matter():
    generator = torch.Generator().manual_seed(0)
    norms, image = torch.rand(40, generator=generator), torch.rand(40, generator=generator) < 0.7
    for power in (0.0, 0.5, 1.0):
        torch.testing.assert_close(
            balanced_token_weights(1e-3 * norms, image, power), balanced_token_weights(norms, image, power)
        )


def test_unit_mean_by_hand():
    torch.testing.assert_close(unit_mean(torch.diag(torch.tensor([1.0, 3.0]))), torch.diag(torch.tensor([0.5, 1.5])))
    assert torch.equal(unit_mean(torch.zeros(2, 2)), torch.zeros(2, 2))


def test_damping_is_a_share_of_the_mean_diagonal_and_symmetric():
    factor = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    torch.testing.assert_close(damp(factor, 0.5), torch.tensor([[2.0, 1.0], [1.0, 4.0]]))


def test_half_iteration_is_the_mean_over_sequences_in_unit_mean():
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(50, 3, 5, generator=generator)
    rows, columns = half_iteration(gradients)
    torch.testing.assert_close(rows, unit_mean(torch.stack([g @ g.T for g in gradients]).mean(dim=0)))
    torch.testing.assert_close(columns, unit_mean(torch.stack([g.T @ g for g in gradients]).mean(dim=0)))
    assert float(rows.diagonal().mean()) == pytest.approx(1, rel=1e-6)


def test_kronecker_scale_goes_with_the_tokens_and_against_the_factors():
    generator = torch.Generator().manual_seed(2)
    gradients = torch.randn(20, 3, 5, generator=generator)
    rows, columns = half_iteration(gradients)
    scale = kronecker_scale(gradients, rows, columns)
    assert kronecker_scale(gradients, rows, columns, tokens=7) == pytest.approx(7 * scale, rel=1e-6)
    assert kronecker_scale(gradients, 2 * rows, 5 * columns) == pytest.approx(scale / 10, rel=1e-6)
    assert kronecker_scale(2 * gradients, rows, columns) == pytest.approx(4 * scale, rel=1e-6)


def test_solve_factor_is_the_damped_solve():
    factor = random_moment(24, torch.Generator().manual_seed(3))
    right = torch.randn(24, 7, generator=torch.Generator().manual_seed(4))
    expected = torch.linalg.solve(damp(factor.double(), 0.01), right.double())
    torch.testing.assert_close(solve_factor(factor, right, 0.01).double(), expected, rtol=1e-3, atol=1e-4)


def test_damping_is_tripled_until_the_factor_is_definite():
    """Eigenvalue −0.02 at a mean diagonal of 1: a share of 0.01 is not enough, 0.03 is."""
    factor = torch.eye(8)
    factor[0, 0], factor[1, 1] = -0.02, 2.02
    found = solve_factor(factor, torch.eye(8), 0.01)
    torch.testing.assert_close(found, torch.linalg.inv(factor + 0.03 * torch.eye(8)), rtol=1e-4, atol=1e-4)


def test_float64_takes_over_where_float32_fails(monkeypatch):
    """1 + 1e-9 is 1 in float32, and the factor stays singular; in float64 the damping is there."""
    monkeypatch.setattr(curvature, "RETRIES", 1)
    found = solve_factor(torch.ones(2, 2), torch.tensor([[1.0], [-1.0]]), 1e-9)
    torch.testing.assert_close(found, torch.tensor([[1e9], [-1e9]]), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "factor",
    [torch.diag(torch.tensor([-8.0, 9.0, 1.0])), torch.full((3, 3), torch.nan), torch.zeros(3, 3)],
    ids=["indefinite", "not a number", "zero"],
)
def test_a_hopeless_factor_is_refused_by_name(factor):
    message = r"output curvature of 3: not positive definite even in float64 with damping 2\.43; calibrate with more"
    with pytest.raises(NumericGateError, match=message):
        solve_factor(factor, torch.ones(3, 1), 0.01, "output curvature")


def test_newton_shift_is_the_dense_solve():
    """vec(N) = (S_o ⊗ S_i)⁻¹ vec(G), row-major, both factors damped by shares of their own mean diagonals."""
    generator = torch.Generator().manual_seed(5)
    rows, columns = random_moment(6, generator), random_moment(8, generator)
    gradient = torch.randn(6, 8, generator=generator)
    dense = torch.kron(damp(rows.double(), 0.05), damp(columns.double(), 0.01))
    expected = torch.linalg.solve(dense, gradient.double().flatten()).reshape(6, 8)
    found = newton_shift(gradient, rows, columns, (0.05, 0.01))
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_newton_shift_says_which_factor_is_not_definite():
    good, bad = torch.eye(2), torch.diag(torch.tensor([-8.0, 9.0]))
    with pytest.raises(NumericGateError, match="output curvature of 2"):
        newton_shift(torch.ones(2, 2), bad, good, (0.01, 0.01))
    with pytest.raises(NumericGateError, match="input moment of 2"):
        newton_shift(torch.ones(2, 2), good, bad, (0.01, 0.01))


def test_quadratic_by_hand():
    # E = (1, 2): ½ (1·2·1 + 2·1·1·2 + 2·3·2) = ½ (2 + 4 + 12) = 9; S_o = 5 makes five of it.
    error, columns = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    assert quadratic(error, None, columns) == 9
    assert quadratic(error, torch.tensor([[5.0]]), columns) == 45


def test_quadratic_without_row_factor_is_that_of_the_identity():
    generator = torch.Generator().manual_seed(6)
    error, columns = torch.randn(5, 8, generator=generator), random_moment(8, generator)
    assert quadratic(error, None, columns) == pytest.approx(quadratic(error, torch.eye(5), columns), rel=1e-6)


def test_caps_by_hand():
    token_weights, norms = torch.tensor([0.25, 0.25, 0.25, 0.25]), torch.tensor([1.0, 2.0, 1.0, 200.0])
    # The third quarter of the norms is 2: the sink counts a hundredth of itself, and the sum stays.
    capped = torch.tensor([1.0, 1.0, 1.0, 0.01]) / 3.01
    torch.testing.assert_close(capped_token_weights(token_weights, norms, 0.75), capped)
    torch.testing.assert_close(capped_token_weights(2 * token_weights, 5 * norms, 0.75), 2 * capped)


def test_no_token_outweighs_the_loudest_ordinary_one():
    generator = torch.Generator().manual_seed(0)
    norms = torch.rand(1_000, generator=generator) + 0.5
    norms[17] = 1e5
    token_weights = torch.rand(1_000, generator=generator)
    found = capped_token_weights(token_weights, norms, 0.999)
    assert float(found.sum()) == pytest.approx(float(token_weights.sum()), rel=1e-5)
    contributions = found / token_weights * norms
    assert int(contributions.argmax()) in (17, int(norms[norms < 2].argmax())) or contributions[17] < 2
    assert float(contributions[17]) < 2
    ordinary = torch.arange(1_000) != 17
    ratios = (found / token_weights)[ordinary]
    torch.testing.assert_close(ratios, ratios[:1].expand(999))


def test_a_quantile_of_1_and_silent_tokens_change_nothing():
    token_weights, norms = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([1.0, 9.0, 3.0])
    assert torch.equal(capped_token_weights(token_weights, norms, 1.0), token_weights)
    assert torch.equal(capped_token_weights(token_weights, torch.zeros(3), 0.5), token_weights)
