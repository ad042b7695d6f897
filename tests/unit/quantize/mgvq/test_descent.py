"""Every matrix keeps the sweep or takes a descent, whichever gradients it was not fitted to say loses least."""

from __future__ import annotations

import pytest
import torch
from layer_problems import random_layer

from toolchain.calibration.gradients import GradientSample
from toolchain.quantize.mgvq.descent import COUPLED, DESCENT, SWEEP, Fit, Gate, best_ways, gated_group, gated_segments
from toolchain.values import CODES, parse_format
from toolchain.vq.segments import quantize_segments
from toolchain.vq.solve import quantize_group
from toolchain.vq.weights import Options

FAST = Options(rounds=1, lloyd_rounds=3, samples=2_000)
ROWS, COLUMNS = (96, 128), 128


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def square_root(moment):
    values, vectors = torch.linalg.eigh(moment.double())
    return ((vectors * values.clamp_min(0).sqrt()) @ vectors.T).float()


def gradient_samples_of(column_root, row_root, seed, count=400, tokens=4):
    """Gradients Σ_t δ_t x_tᵀ with E[x xᵀ] and E[δ δᵀ] as their square roots say: E⟨G, E⟩² = t · tr(S_o E S Eᵀ)."""
    generator = seeded(seed)
    return [
        GradientSample(
            torch.randn(tokens, len(row_root), generator=generator) @ row_root,
            torch.randn(tokens, len(column_root), generator=generator) @ column_root,
        )
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def problem():
    """(targets of two layers, the moment of their inputs, the same from thirty tokens)."""
    weight, moment = random_layer(sum(ROWS), COLUMNS)
    few = torch.randn(30, COLUMNS, generator=seeded(1)) @ square_root(moment)
    return list(weight.split(ROWS)), moment, few.T @ few / 30


def gate_of(moment, row_roots=(None, None)):
    root = square_root(moment)
    own = [torch.eye(m) if r is None else r for m, r in zip(ROWS, row_roots)]
    return Gate([gradient_samples_of(root, r, seed) for seed, r in enumerate(own)])


def held_out_losses(gate, targets, group):
    return gate.losses([t - layer.decode() for t, layer in zip(targets, group.layers)])


def same_bytes(one, other):
    return all(
        torch.equal(a, b)
        for x, y in zip(one.layers, other.layers, strict=True)
        for a, b in ((x.codes, y.codes), (x.scales, y.scales), (x.codebook, y.codebook))
    )


def test_the_loss_of_a_gate_is_the_mean_square_of_whole_products():
    gradient_sample = GradientSample(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0, 1.0]]))
    twice = GradientSample(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    error = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, -1.0]])
    # ⟨δ xᵀ, E⟩: 1·(3·1) + 2·(1·−1) = 1 of the first; E_10 + E_01 = 2 of the second.
    assert Gate([[gradient_sample], [gradient_sample, twice]]).losses([error, error]) == [1.0, (1.0 + 4.0) / 2]


def test_the_first_of_equals_is_taken():
    assert best_ways({SWEEP: [1.0, 2.0, 3.0], DESCENT: [1.0, 1.0, 4.0], COUPLED: [2.0, 1.0, 2.0]}) == (
        SWEEP,
        DESCENT,
        COUPLED,
    )


@pytest.mark.parametrize("code", ["4,8,8", "2,4,8"])
def test_a_descent_that_overfits_is_refused(problem, code):
    """Thirty tokens' moment: descent takes much off its loss and adds to that of fresh inputs; the sweep stays."""
    targets, moment, few = problem
    gate = gate_of(moment)
    swept = quantize_group(targets, few, CODES[code], FAST, seeded())
    group, ways = gated_group(targets, Fit(few, few, (None, None)), gate, CODES[code], FAST, seeded())
    taken, forced = gated_group(targets, Fit(few, few, (None, None)), gate_of(few), CODES[code], FAST, seeded())
    assert forced == (DESCENT, DESCENT)
    assert taken.loss < 0.9 * swept.loss, "on the moment it was given the descent is the better one"
    assert all(a > b for a, b in zip(held_out_losses(gate, targets, taken), held_out_losses(gate, targets, swept)))
    assert ways == (SWEEP, SWEEP)
    assert same_bytes(group, swept)


@pytest.mark.parametrize("code", ["4,8,8", "2,4,8"])
def test_a_descent_that_helps_is_taken(problem, code):
    targets, moment, _ = problem
    gate = gate_of(moment)
    swept = quantize_group(targets, moment, CODES[code], FAST, seeded())
    group, ways = gated_group(targets, Fit(moment, moment, (None, None)), gate, CODES[code], FAST, seeded())
    assert ways == (DESCENT, DESCENT)
    assert group.loss < swept.loss
    assert all(a < b for a, b in zip(held_out_losses(gate, targets, group), held_out_losses(gate, targets, swept)))


def strong_coupling(rows, seed):
    """S_o float32[m, m] of mean diagonal 1 with few directions that count."""
    basis, _ = torch.linalg.qr(torch.randn(rows, rows, generator=seeded(seed)))
    values = 1 / torch.arange(1, rows + 1).float() ** 1.5 + 1e-2
    found = (basis * values) @ basis.T
    return found * (rows / found.trace())


def test_output_curvature_is_used_where_gradients_have_it(problem):
    targets, moment, _ = problem
    factors = [strong_coupling(m, seed) for seed, m in enumerate(ROWS)]
    gate = gate_of(moment, [square_root(factor) for factor in factors])
    fit = Fit(moment, moment, factors)
    alone, _ = gated_group(targets, Fit(moment, moment, (None, None)), gate, CODES["4,8,8"], FAST, seeded())
    group, ways = gated_group(targets, fit, gate, CODES["4,8,8"], FAST, seeded())
    assert ways == (COUPLED, COUPLED)
    assert sum(held_out_losses(gate, targets, group)) < 0.9 * sum(held_out_losses(gate, targets, alone))


@pytest.mark.parametrize("code", ["4,8,8", "2,4,8"])
def test_matrices_of_one_group_decide_differently(problem, code):
    """The first one's gradients see the inputs descent was fitted to, the second one's those it gave up for them."""
    targets, moment, few = problem
    gate = Gate([gate_of(few).gradient_samples[0], gate_of(moment).gradient_samples[1]])
    group, ways = gated_group(targets, Fit(few, few, (None, None)), gate, CODES[code], FAST, seeded())
    assert ways == (DESCENT, SWEEP)
    swept = quantize_group(targets, few, CODES[code], FAST, seeded())
    assert torch.equal(group.layers[1].codes, swept.layers[1].codes), "the second has its sweep's codes"
    assert not torch.equal(group.layers[0].codes, swept.layers[0].codes)
    assert torch.equal(group.layers[0].codebook, group.layers[1].codebook), "one codebook"
    assert sum(held_out_losses(gate, targets, group)) < sum(held_out_losses(gate, targets, swept))


def test_a_matrix_with_output_curvature_may_stand_beside_one_without(problem):
    targets, moment, _ = problem
    factor = strong_coupling(ROWS[1], 3)
    gate = gate_of(moment, [None, square_root(factor)])
    _, ways = gated_group(targets, Fit(moment, moment, (None, factor)), gate, CODES["2,4,8"], FAST, seeded())
    assert ways == (DESCENT, COUPLED)


def test_segments_go_one_way_and_report_the_error_on_all_inputs(problem):
    targets, moment, few = problem
    segments = parse_format("2,8,9@64+2,3,8", COLUMNS)
    swept = quantize_segments(targets, moment, segments, FAST, seeded())
    kept, ways = gated_segments(targets, Fit(moment, few, (None, None)), gate_of(moment), segments, FAST, seeded)
    assert ways == (SWEEP, SWEEP)
    assert all(torch.equal(a.decode(), b.decode()) for a, b in zip(kept.layers, swept.layers))
    gate = gate_of(few)
    group, ways = gated_segments(targets, Fit(moment, few, (None, None)), gate, segments, FAST, seeded)
    assert ways == (DESCENT, DESCENT)
    assert sum(held_out_losses(gate, targets, group)) < sum(held_out_losses(gate, targets, swept))
    for target, layer, error in zip(targets, group.layers, group.errors):
        off = (target - layer.decode()).double()
        assert error == pytest.approx(float(((off @ moment.double()) * off).sum()), rel=1e-4)
