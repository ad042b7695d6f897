"""What units of columns lose: sums over units, gradients in factors against whole ones, and modalities apart."""

from __future__ import annotations

import pytest
import torch
from layer_problems import random_layer, random_moment

from toolchain.calibration.gradients import GradientSample
from toolchain.quantize.driver.sequence import group_generator
from toolchain.quantize.mgvq.proxy import quick
from toolchain.quantize.refine.unit_losses import RankedGroup, fisher_units, measure_units
from toolchain.values import VQCode
from toolchain.vq.segments import weighted_square
from toolchain.vq.sensitivity import fisher_losses
from toolchain.vq.weights import WORST, Options

CODES = [VQCode(2, 4, 4), VQCode(4, 8, 8)]


def gradient_samples(rows: int, columns: int, seed: int) -> list[GradientSample]:
    generator = torch.Generator().manual_seed(seed)
    marks = torch.tensor([True] * 5 + [False] * 4)
    return [
        GradientSample(torch.randn(9, rows, generator=generator), torch.randn(9, columns, generator=generator), marks)
        for _ in range(6)
    ]


def group() -> RankedGroup:
    """Two layers of 192 columns that read text and images, columns in some order."""
    weights = [random_layer(40, 192, 0)[0], random_layer(24, 192, 1)[0]]
    generator = torch.Generator().manual_seed(2)
    moments = {"text": random_moment(192, generator), "image": random_moment(192, generator)}
    order = torch.randperm(192, generator=generator)
    return RankedGroup(weights, moments, [gradient_samples(40, 192, 3), gradient_samples(24, 192, 4)], order)


def measured(case: RankedGroup, scale: float = 1.0, **options):
    return measure_units(case, CODES, scale, quick(Options(**options)), lambda: group_generator(0, "g"))


@pytest.fixture(scope="module")
def found():
    return measured(group())


def test_local_losses_add_up_to_the_relative_error(found):
    """To the damped one; the undamped one, which scales Ω, is a little less."""
    for code in map(str, CODES):
        assert len(found.local[code]) == 3
        relative = sum(found.losses[code])
        assert 0.9 * relative < sum(found.local[code]) < 1.5 * relative


def test_what_a_relative_error_is_worth_scales_all_losses(found):
    twice = measured(group(), scale=2.0)
    for code in map(str, CODES):
        assert twice.losses[code] == pytest.approx([2 * x for x in found.losses[code]], rel=1e-4)
        assert twice.local[code] == found.local[code]


def test_gradients_in_factors_are_gradients(found):
    case = group()
    error = torch.randn(64, 192, generator=torch.Generator().manual_seed(5))
    dense = torch.stack(
        [
            torch.cat([gradient_sample.outputs.T @ gradient_sample.inputs for gradient_sample in pair])[:, case.order]
            for pair in zip(*case.gradient_samples)
        ]
    )
    expected = fisher_losses(error, dense, [64, 64, 64])
    torch.testing.assert_close(fisher_units(case, error, [64, 64, 64], None), expected, rtol=1e-4, atol=0)


def test_a_modality_is_its_tokens_alone():
    case = group()
    error = torch.randn(64, 192, generator=torch.Generator().manual_seed(6))
    text_only = [
        [gradient_sample.of_tokens(~gradient_sample.is_image) for gradient_sample in layer]
        for layer in case.gradient_samples
    ]
    other = RankedGroup(case.weights, case.moments, text_only, case.order)
    found = fisher_units(case, error, [64, 64, 64], "text")
    torch.testing.assert_close(found, fisher_units(other, error, [64, 64, 64], None))
    assert not torch.allclose(found, fisher_units(case, error, [64, 64, 64], "image"))


def test_units_that_no_loss_reaches_count_by_what_their_output_loses():
    case = group()
    silent = [[GradientSample(0 * p.outputs, p.inputs, p.is_image) for p in layer] for layer in case.gradient_samples]
    found = measured(RankedGroup(case.weights, case.moments, silent, case.order))
    for code in map(str, CODES):
        assert sum(found.losses[code]) > 0
        assert min(found.losses[code]) > 0


def test_the_worst_modality_keeps_the_total_and_moves_the_shares(found):
    worst = measured(group(), modalities=WORST)
    for code in map(str, CODES):
        assert sum(worst.losses[code]) == pytest.approx(sum(found.losses[code]), rel=1e-4)
        assert worst.losses[code] != pytest.approx(found.losses[code], rel=1e-3)


def test_the_reference_is_the_damped_output_energy(found):
    case = group()
    whole = case.moments["text"] + case.moments["image"]
    plain = sum(weighted_square(weight, whole) for weight in case.weights)
    assert plain < found.reference < 1.1 * plain
