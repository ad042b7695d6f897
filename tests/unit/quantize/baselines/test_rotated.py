from __future__ import annotations

import pytest
import torch
from layer_problems import random_layer

from toolchain.quantize.baselines import gptq, rotated
from toolchain.values import PLAIN_CODE_NAMES, VQCode
from toolchain.vq.rotation import hadamard
from toolchain.vq.weights import Options

CODE = VQCode.parse("4,8,8")


def run(method, weights, moment, code=CODE, seed=0):
    return method(weights, moment, code, Options(), torch.Generator().manual_seed(seed))


def outlier_layer(rows=96, columns=128, seed=0):
    """Weights with rare large entries and inputs of one loudness: where a rotation is known to help."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= 1 + 12 * (torch.rand(rows, columns, generator=generator) < 0.02)
    return weight, torch.eye(columns)


@pytest.mark.parametrize(("columns", "size"), [(1176, 8), (256, 128), (384, 128), (64, 64), (7, 1), (96, 32)])
def test_blocks_are_the_largest_that_divide(columns, size):
    assert rotated.block_size(columns) == size


def test_hadamard_by_hand():
    expected = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    assert torch.equal(hadamard(4), expected)


@pytest.mark.parametrize("columns", [128, 48, 7])
def test_a_rotation_is_orthogonal_and_mixes_its_blocks(columns):
    signs = rotated.random_signs(columns, torch.Generator().manual_seed(0))
    matrix = rotated.rotate(torch.eye(columns), signs)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(columns), atol=1e-5, rtol=0)
    torch.testing.assert_close(rotated.rotate_back(matrix, signs), torch.eye(columns), atol=1e-5, rtol=0)
    size = rotated.block_size(columns)
    torch.testing.assert_close(matrix[0, :size].abs(), torch.full((size,), size**-0.5))


@pytest.mark.parametrize("code", PLAIN_CODE_NAMES)
def test_errors_are_those_of_the_weights_turned_back(code):
    first, moment = random_layer(102, 40)
    second, _ = random_layer(31, 40, seed=1)
    group = run(rotated.quantize_rotated, [first, second], moment, VQCode.parse(code))
    for weight, decoded, error, reference in zip((first, second), group.weights, group.errors, group.references):
        off = (weight - decoded).double()
        assert error == pytest.approx(float(((off @ moment.double()) * off).sum()), rel=1e-3)
        assert reference == pytest.approx(float(((weight @ moment) * weight).sum()), rel=1e-3)


def test_weights_turned_are_levels_of_their_row():
    weight, moment = random_layer(20, 64)
    decoded = run(rotated.quantize_rotated, [weight], moment).weights[0]
    signs = rotated.random_signs(64, torch.Generator().manual_seed(0))
    for row in rotated.rotate(decoded, signs):
        levels = (row / row.abs().min()).round(decimals=2).unique()
        assert set(levels.tolist()) <= {-3.0, -1.0, 1.0, 3.0}


def test_outliers_are_spread():
    weight, moment = outlier_layer()
    turned = sum(run(rotated.quantize_rotated, [weight], moment).errors)
    assert turned < 0.8 * run(gptq.quantize_group, [weight], moment).loss


@pytest.mark.parametrize("layer", [random_layer(64, 96), outlier_layer()], ids=["structured", "outliers"])
def test_the_better_of_the_two_is_taken(layer):
    weight, moment = layer
    plain = run(gptq.quantize_group, [weight], moment).loss
    turned = sum(run(rotated.quantize_rotated, [weight], moment).errors)
    found = run(rotated.quantize_group, [weight], moment)
    assert sum(found.errors) == pytest.approx(min(plain, turned), rel=1e-6)


def test_bytes_are_those_of_gptq():
    first, moment = random_layer(102, 40)
    second, _ = random_layer(31, 40, seed=1)
    found = run(rotated.quantize_group, [first, second], moment)
    assert found.bytes == CODE.codebook_bytes + sum(CODE.codes_bytes(m, 40) + 2 * m for m in (102, 31))


def test_the_generator_is_all_that_is_random():
    weight, moment = outlier_layer()
    first, again, other = (run(rotated.quantize_rotated, [weight], moment, seed=s).weights[0] for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
