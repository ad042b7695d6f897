"""The shift for inputs that quantized layers really give, and the gate that lets it through, against regression."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from toolchain.vq.drift import (
    DAMPINGS,
    LEAST_STEP,
    TALL,
    TRUST,
    Pair,
    PairMoments,
    fitted_shift,
    gated_shift,
    pull,
    regression,
)

INFINITE = 1e30  # a quantization error so large that the trust region never binds


def inputs(count: int, columns: int = 12, noise: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(x_q, x_f float32[N, n]): x_f = A x_q, A near the identity, and noise of its own on top."""
    fixed = torch.Generator().manual_seed(99)
    mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=fixed) / columns**0.5
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, columns, generator=generator)
    return rows, rows @ mix.T + noise * torch.randn(count, columns, generator=generator)


def halves_of(rows: Tensor, full: Tensor) -> PairMoments:
    """Even and odd tokens, all of one token weight."""
    token_weight = torch.full((len(rows),), 1 / len(rows))
    return PairMoments.merged([Pair.of(rows[k::2], full[k::2], token_weight[k::2]) for k in (0, 1)])


def weight_of(columns: int = 12, rows: int = 6) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(5))


def same(first: Pair, second: Pair) -> None:
    for field in fields(Pair):
        a, b = (torch.as_tensor(getattr(pair, field.name)) for pair in (first, second))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_sums_are_written_out():
    rows, full = inputs(5, 3)
    token_weight = torch.tensor([0.1, 0.2, 0.0, 0.3, 0.4])
    pair = Pair.of(rows, full, token_weight)
    assert pair.token_weight == pytest.approx(1)
    torch.testing.assert_close(pair.moment, sum(m * torch.outer(x, x) for m, x in zip(token_weight, rows)))
    torch.testing.assert_close(pair.cross, sum(m * torch.outer(f, x) for m, f, x in zip(token_weight, full, rows)))
    torch.testing.assert_close(pair.mean, token_weight @ rows)
    torch.testing.assert_close(pair.full_mean, token_weight @ full)


def test_sums_of_parts_are_the_sum_of_all():
    rows, full = inputs(10, 4)
    token_weight = torch.rand(10, generator=torch.Generator().manual_seed(0))
    first, second = (Pair.of(rows[part], full[part], token_weight[part]) for part in (slice(0, 3), slice(3, 10)))
    same(first.added(second), Pair.of(rows, full, token_weight))
    same(second.added(first), first.added(second))
    assert first.added(None) is first


def test_inputs_without_drift_have_one_moment():
    rows, _ = inputs(10, 4)
    token_weight = torch.full((10,), 0.1)
    pair, copied = Pair.of(rows, rows, token_weight), Pair.of(rows, rows.clone(), token_weight)
    assert pair.cross is pair.moment
    same(pair, copied)


def test_halves_merge_into_the_whole():
    rows, full = inputs(9, 4)
    token_weight = torch.full((9,), 1 / 9)
    pairs = halves_of(rows, full)
    same(pairs.whole, Pair.of(rows, full, token_weight))
    assert pairs.halves is not None
    assert [half.token_weight for half in pairs.halves] == pytest.approx([5 / 9, 4 / 9])


@pytest.mark.parametrize("missing", [0, 1])
def test_one_half_alone_gives_nothing_to_hold_a_step_against(missing):
    rows, full = inputs(6, 4)
    pair = Pair.of(rows, full, torch.full((6,), 1 / 6))
    pairs = PairMoments.merged([None, pair] if missing == 0 else [pair, None])
    assert pairs.whole is pair
    assert pairs.halves is None
    shift = gated_shift(weight_of(4), pairs, INFINITE)
    assert (shift.step, float(shift.value.abs().max())) == (0.0, 0.0)


def test_the_regression_is_least_squares():
    """W + W P from moments, against lstsq on the tokens themselves (equation 13)."""
    rows, full = inputs(200, noise=0.5)
    weight = weight_of()
    found = weight + weight @ regression(Pair.of(rows, full, torch.full((200,), 3.0)), 0.0)
    expected = torch.linalg.lstsq(rows.double(), (full @ weight.T).double()).solution.T
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_regression_shrinks_with_damping():
    rows, full = inputs(200, noise=0.5)
    pair = Pair.of(rows, full, torch.full((200,), 1 / 200))
    sizes = [float(regression(pair, damping).norm()) for damping in (0.0, *DAMPINGS)]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("rows", [3, 12, 12 * TALL, 12 * TALL + 1])
@pytest.mark.parametrize("damping", DAMPINGS)
def test_solving_for_rows_is_the_map_applied_to_the_weight(rows, damping):
    """W P from m right-hand sides, against P from n of them: equal but for rounding, wide layers and tall."""
    pair = Pair.of(*inputs(60, noise=0.5), torch.full((60,), 3.0))
    weight = weight_of(rows=rows)
    found = fitted_shift(weight, pull(weight, pair), pair, damping)
    expected = weight.double() @ regression(pair, damping).double()
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_equal_inputs_need_no_shift():
    rows, _ = inputs(50)
    for full in (rows, rows.clone()):
        shift = gated_shift(weight_of(), halves_of(rows, full), INFINITE)
        assert shift.step == 0
        assert torch.equal(shift.value, torch.zeros(6, 12))


def test_without_noise_the_whole_step_is_taken():
    """x_f = A x_q exactly, on the grid's least damping: the shift is W (A − I) but for that damping."""
    rows, full = inputs(2000)
    pairs, weight = halves_of(rows, full), weight_of()
    shift = gated_shift(weight, pairs, INFINITE)
    assert shift.damping == DAMPINGS[0]
    assert shift.step == pytest.approx(1, abs=0.01)
    exact = weight @ regression(pairs.whole, 0.0)
    torch.testing.assert_close(rows @ (weight + exact).T, full @ weight.T, rtol=1e-3, atol=1e-3)
    assert float((shift.value - exact).norm() / exact.norm()) < 0.01


def test_noise_closes_the_gate():
    """Drift that says nothing about the next sample: a regression on 30 tokens of 12 columns must not be followed."""
    generator = torch.Generator().manual_seed(0)
    weight = weight_of()
    for _ in range(5):
        rows = torch.randn(30, 12, generator=generator)
        full = rows + torch.randn(30, 12, generator=generator)
        shift = gated_shift(weight, halves_of(rows, full), INFINITE)
        whole = weight @ regression(halves_of(rows, full).whole, DAMPINGS[0])
        assert float(shift.value.norm()) < 0.5 * float(whole.norm())
    # The same samples in both halves, drift turned round: all of it disagrees.
    full = rows + torch.randn(30, 12, generator=generator)
    token_weight = torch.full((30,), 1 / 60)
    opposed = PairMoments.merged([Pair.of(rows, full, token_weight), Pair.of(rows, 2 * rows - full, token_weight)])
    shift = gated_shift(weight, opposed, INFINITE)
    assert shift.step == 0
    assert torch.equal(shift.value, torch.zeros(6, 12))


def test_the_step_shrinks_with_noise():
    steps = [gated_shift(weight_of(), halves_of(*inputs(120, noise=noise)), INFINITE).step for noise in (0.0, 0.5, 4.0)]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] > 0.95
    assert steps[2] < 0.5


@pytest.mark.parametrize(("share", "is_taken"), [(0.004, False), (0.1, True)])
def test_a_step_below_the_least_is_left_out(share, is_taken):
    """The second half drifts as the first, but by a share c of it: η is about 2c at the least damping, 4c at most."""
    rows, full = inputs(60)
    token_weight = torch.full((60,), 1 / 120)
    agreeing = Pair.of(rows, rows + share * (full - rows), token_weight)
    shift = gated_shift(weight_of(), PairMoments.merged([Pair.of(rows, full, token_weight), agreeing]), INFINITE)
    assert (shift.step >= LEAST_STEP) == is_taken
    assert (shift.step > 0) == is_taken
    assert bool(shift.value.any()) == is_taken


def held_out_loss(weight: Tensor, step: float, damping: float, rows: Tensor, full: Tensor) -> float:
    """Σ over both ways of fitting on one half: mean ‖y_f − (W + η W P_A) x_q‖² of the other, token by token."""
    losses = []
    for fitted, other in ((0, 1), (1, 0)):
        pair = Pair.of(rows[fitted::2], full[fitted::2], torch.ones(len(rows[fitted::2])))
        moved = weight + step * weight @ regression(pair, damping)
        losses.append((full[other::2] @ weight.T - rows[other::2] @ moved.T).square().sum(dim=1).mean())
    return float(sum(losses))


@pytest.mark.parametrize("noise", [0.3, 1.0, 2.0])
def test_step_and_damping_are_those_the_other_half_likes_best(noise):
    """Equation 14 by trial: every damping and step of a fine grid, on the tokens of the half not fitted."""
    rows, full = inputs(80, noise=noise, seed=3)
    weight = weight_of()
    grid = [(step / 200, damping) for step in range(201) for damping in DAMPINGS]
    best, damping = min(grid, key=lambda one: held_out_loss(weight, *one, rows, full))
    shift = gated_shift(weight, halves_of(rows, full), INFINITE)
    assert shift.damping == damping
    assert shift.step == pytest.approx(2 * best / (1 + best), abs=0.01)


def test_the_trust_region_binds():
    """‖ηN‖_S is at most TRUST times the quantization error's, and exactly that where the gate asks for more."""
    rows, full = inputs(2000)
    pairs, weight = halves_of(rows, full), weight_of()

    def length(shift) -> float:
        return float(((shift.value @ pairs.whole.moment) * shift.value).sum())

    free = gated_shift(weight, pairs, INFINITE)
    for share in (0.5, 0.1):
        bound = gated_shift(weight, pairs, (share / TRUST) ** 2 * length(free))
        assert length(bound) == pytest.approx(share**2 * length(free), rel=1e-4)
        torch.testing.assert_close(bound.value, share * free.value, rtol=1e-4, atol=1e-6)
        assert bound.step == pytest.approx(share * free.step, rel=1e-4)
    loose = gated_shift(weight, pairs, 1.01 * length(free) / TRUST**2)
    assert torch.equal(loose.value, free.value)


def test_a_layer_that_loses_nothing_is_not_moved():
    rows, full = inputs(200)
    assert float(gated_shift(weight_of(), halves_of(rows, full), 0.0).value.abs().max()) == 0


def test_masses_are_what_counts_not_their_sum():
    rows, full = inputs(80, noise=0.5)
    doubled = [Pair.of(rows[k::2], full[k::2], torch.full((40,), 2 / 80)) for k in (0, 1)]
    found, expected = (
        gated_shift(weight_of(), pairs, INFINITE) for pairs in (PairMoments.merged(doubled), halves_of(rows, full))
    )
    torch.testing.assert_close(found.value, expected.value, rtol=1e-4, atol=1e-6)
