"""K-segments: the algebra of completing the square, what the feedback is worth, and how close to one code they come."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from layer_problems import random_layer, random_moment

from toolchain.errors import NumericGateError, ShapeError
from toolchain.values import Segment, VQCode, parse_format
from toolchain.vq.factor import block_udu
from toolchain.vq.segments import damped_square, quantize_segments, segment_steps, weighted_square
from toolchain.vq.solve import quantize_group
from toolchain.vq.weights import Options

FAST = Options(rounds=2, lloyd_rounds=4, samples=4_000)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def definite(columns: int, seed: int = 0) -> torch.Tensor:
    moment = random_moment(columns, seeded(seed))
    return moment + 0.01 * moment.diagonal().mean() * torch.eye(columns)


def close(found, expected, share=1e-4):
    assert float((found - expected).abs().max()) <= share * float(expected.abs().max())


def test_the_first_metric_is_what_the_rest_cannot_answer():
    s = definite(192).double()
    a, b = slice(0, 64), slice(64, 192)
    first, second = segment_steps(s.float(), [64, 128])
    across = s[a, b] @ torch.linalg.inv(s[b, b])
    close(first.metric.double(), s[a, a] - across @ s[b, a])
    close(second.feedback.double(), across)
    close(second.metric.double(), s[b, b])
    assert first.feedback.shape == (0, 64)


def test_three_segments_are_two_of_which_the_first_is_cut_again():
    """Recursion: the segments of a leading part are those of its Schur complement."""
    s = definite(192, 1)
    whole = segment_steps(s, [64, 64, 64])
    leading = segment_steps(segment_steps(s, [128, 64])[0].metric, [64, 64])
    for one, other in zip(whole[:2], leading, strict=True):
        close(one.metric, other.metric, 1e-3)
        close(one.feedback, other.feedback, 1e-3) if one.feedback.numel() else None


@pytest.mark.parametrize("widths", [[128], [64, 64], [64, 16, 48], [4, 60, 64]])
def test_completing_the_square_loses_and_counts_nothing_twice(widths):
    """tr(E S Eᵀ) = Σ tr(η_s D_s η_sᵀ), η_s = E_s + Σ_{r<s} E_r U_rs, for any error."""
    s, error = definite(128, 2), torch.randn(7, 128, generator=seeded(3))
    first, total = 0, 0.0
    for width, step in zip(widths, segment_steps(s, widths), strict=True):
        eta = error[:, first : first + width] + error[:, :first] @ step.feedback
        total += weighted_square(eta, step.metric)
        first += width
    assert total == pytest.approx(weighted_square(error, s), rel=1e-4)


def test_segments_of_one_vector_are_the_sweeps_own_factors():
    s = definite(32, 4)
    unit, pivots = block_udu(s, 4)
    for number, step in enumerate(segment_steps(s, [4] * 8)):
        close(step.metric, pivots[number])
        if number:
            close(step.feedback, unit[: 4 * number, 4 * number : 4 * number + 4], 1e-3)


def test_a_rest_that_is_free_answers_all_it_can():
    """With everything after the first segment coded without error from its target, the loss is the first's in D."""
    weight, moment = random_layer(64, 128, 5)
    rest = iter([False, True])

    def coder(targets, metric, code, options, generator):
        decoded = [t if next(rest) else torch.zeros_like(t) for t in targets]
        loss = sum(weighted_square(t - d, metric) for t, d in zip(targets, decoded))
        layers = tuple(SimpleNamespace(decode=lambda d=d: d) for d in decoded)
        return SimpleNamespace(layers=layers, loss=loss)

    segments = parse_format("2,4,8@64+2,4,8", 128)
    options = Options(damping=0.02)
    found = quantize_segments([weight], moment, segments, options, seeded(), coder)
    damped = moment + 0.02 * moment.diagonal().mean() * torch.eye(128)
    left = weighted_square(weight[:, :64], segment_steps(damped, [64, 64])[0].metric)
    assert found.losses == pytest.approx((left, 0.0), rel=1e-4)
    error = weight - found.layers[0].decode()
    assert weighted_square(error, damped) == pytest.approx(left, rel=1e-4)
    # The best that any W_B can do against E_A = W_A, found by moving it.
    moved = error.clone()
    moved[:, 64:] += 0.01 * torch.randn(64, 64, generator=seeded(6)) * weight.std()
    assert weighted_square(moved, damped) > left


def test_losses_add_up_to_the_damped_error():
    weight, moment = random_layer(200, 160, 7)
    weights = [weight[:128], weight[128:]]
    found = quantize_segments(weights, moment, parse_format("2,6,8@64+2,4,8@64+4,8,8", 160), FAST, seeded())
    errors = [w - layer.decode() for w, layer in zip(weights, found.layers)]
    damped = sum(damped_square(e, moment, FAST.damping) for e in errors)
    assert sum(found.losses) == pytest.approx(damped, rel=1e-3)
    assert found.errors == pytest.approx([weighted_square(e, moment) for e in errors])
    assert found.references == pytest.approx([weighted_square(w, moment) for w in weights])


def test_layers_share_every_segments_codebook_and_have_scales_of_their_own():
    weight, moment = random_layer(200, 160, 8)
    found = quantize_segments([weight[:128], weight[128:]], moment, parse_format("2,6,8@64+4,8,9", 160), FAST, seeded())
    first, second = found.layers
    assert first.code == second.code == "2,6,8@64+4,8,9"
    assert (first.rows, second.rows, first.columns) == (128, 72, 160)
    for one, other in zip(first.segments, second.segments, strict=True):
        assert torch.equal(one.codebook, other.codebook)
        assert (one.scales.shape, other.scales.shape) == ((128,), (72,))
    assert torch.equal(first.decode()[:, :64], first.segments[0].decode())


@pytest.mark.parametrize("code", ["2,4,8", "4,8,8", "2,6,6"])
def test_equal_codes_come_to_what_one_code_does(code):
    """A codebook and scales more a segment make up for shorter columns to train them on: 0.85 to 0.94 of one code here.
    Coded each for itself, without feedback between them, the segments lose more."""
    weight, moment = random_layer(256, 192, 9)
    one = quantize_group([weight], moment, VQCode.parse(code), FAST, seeded()).loss
    found = quantize_segments([weight], moment, parse_format(f"{code}@64+{code}", 192), FAST, seeded())
    apart = [
        quantize_group([weight[:, s]], moment[s, s], VQCode.parse(code), FAST, seeded()).layers[0].decode()
        for s in (slice(0, 64), slice(64, 192))
    ]
    alone = weighted_square(weight - torch.cat(apart, dim=1), moment)
    print(f"{code}: segments {sum(found.errors) / one:.3f} of one code, apart {alone / one:.3f}")
    assert 0.8 * one < sum(found.errors) < one
    assert sum(found.errors) < alone


def test_a_finer_code_in_one_segment_lowers_the_loss():
    weight, moment = random_layer(128, 128, 10)
    losses = [
        quantize_segments([weight], moment, parse_format(f"{code}@64+2,4,8", 128), FAST, seeded()).losses
        for code in ("2,3,8", "2,4,8", "2,6,8", "2,8,9")
    ]
    firsts, totals = [one[0] for one in losses], [sum(one) for one in losses]
    assert firsts == sorted(firsts, reverse=True)
    assert totals == sorted(totals, reverse=True)


def test_the_same_generator_gives_the_same_codes():
    weight, moment = random_layer(128, 128, 11)
    segments = parse_format("2,5,8@64+2,3,8", 128)
    first, second = (quantize_segments([weight], moment, segments, FAST, seeded()) for _ in range(2))
    for one, other in zip(first.layers[0].segments, second.layers[0].segments, strict=True):
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.codebook, other.codebook)


def test_what_does_not_fit_is_refused():
    weight, moment = random_layer(16, 128, 12)
    segments = [Segment(0, 64, VQCode(2, 4, 4)), Segment(64, 32, VQCode(2, 4, 4))]
    with pytest.raises(ShapeError, match=r"segments of \[64, 32\] columns: .* add up to 128"):
        quantize_segments([weight], moment, segments, FAST, seeded())
    with pytest.raises(ShapeError, match=r"expected weights .* and a moment"):
        quantize_segments([weight], moment[:64, :64], segments, FAST, seeded())
    with pytest.raises(NumericGateError, match="positive diagonal"):
        quantize_segments([weight], torch.zeros(128, 128), segments, FAST, seeded())
    with pytest.raises(NumericGateError, match="not positive definite"):
        segment_steps(-torch.eye(8), [4, 4])
