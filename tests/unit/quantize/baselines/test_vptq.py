from __future__ import annotations

import pytest
import torch
from layer_problems import random_layer

from toolchain.errors import UnsupportedError, UsageError
from toolchain.quantize.baselines import nearest, vptq
from toolchain.quantize.methods import parse_method, stored_method
from toolchain.values import PLAIN_CODE_NAMES, VQCode
from toolchain.vq.factor import factor_moment
from toolchain.vq.weights import Options

FAST = Options(lloyd_rounds=4, samples=4_000)


def run(weights, moment, code="4,8,8", seed=0):
    return vptq.quantize_group(weights, moment, VQCode.parse(code), FAST, torch.Generator().manual_seed(seed))


def test_a_vector_runs_down_the_rows():
    matrix = torch.arange(12.0).reshape(4, 3)
    assert vptq.vectors_of(matrix, 2).tolist() == [[[0, 3], [1, 4], [2, 5]], [[6, 9], [7, 10], [8, 11]]]
    codebook, scales = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, 10.0, 1.0, 1.0])
    decoded = vptq.decode_columns(torch.tensor([[0, 1], [1, 1]]), codebook, scales)
    assert decoded.tolist() == [[1, 3], [20, 40], [3, 3], [4, 4]]


def test_every_vector_gets_its_nearest_entry_after_feedback():
    weight, moment = random_layer(8, 5)
    unit = factor_moment(moment, 5, 1, 0.01).unit
    codebook = torch.randn(16, 2, generator=torch.Generator().manual_seed(0)).half()
    scales = weight.square().mean(dim=1).sqrt().half()
    indices = vptq.column_sweep(weight, unit, codebook, scales)
    error = weight - vptq.decode_columns(indices, codebook, scales)
    targets = weight + error @ torch.triu(unit, 1)
    for row in range(4):
        own = slice(2 * row, 2 * row + 2)
        entries = codebook.float() * scales[own].float()
        for column in range(5):
            distances = (targets[own, column] - entries).square().sum(dim=1)
            assert int(indices[row, column]) == int(distances.argmin())


@pytest.mark.parametrize("code", PLAIN_CODE_NAMES)
def test_feedback_beats_plain_vectors(code):
    weight, moment = random_layer(128, 128)
    found = run([weight], moment, code)
    plain = nearest.quantize_group([weight], moment, VQCode.parse(code), FAST, torch.Generator().manual_seed(0))
    assert sum(found.errors) < plain.loss


@pytest.mark.parametrize("code", PLAIN_CODE_NAMES)
def test_errors_are_those_of_the_weights_and_bytes_those_of_the_format(code):
    first, moment = random_layer(102, 40)
    second, _ = random_layer(31, 40, seed=1)
    group = run([first, second], moment, code)
    vq_code = VQCode.parse(code)
    expected = vq_code.codebook_bytes + sum(vq_code.codes_bytes(m, 40) + 2 * m for m in (102, 31))
    assert group.bytes == expected
    for weight, decoded, error, reference in zip((first, second), group.weights, group.errors, group.references):
        assert decoded.shape == weight.shape
        off = (weight - decoded).double()
        assert error == pytest.approx(float(((off @ moment.double()) * off).sum()), rel=1e-4)
        assert reference == pytest.approx(float(((weight @ moment) * weight).sum()), rel=1e-4)


def test_the_bytes_hold_the_weights():
    """No more distinct vectors a row group than indices, and each an entry times its rows' scales."""
    weight, moment = random_layer(16, 64)
    decoded = run([weight], moment, "2,6,6").weights[0]
    for row in range(0, 16, 2):
        assert len(decoded[row : row + 2].T.unique(dim=0)) <= 64


def test_the_generator_is_all_that_is_random():
    weight, moment = random_layer(64, 300)
    first, again, other = (run([weight], moment, seed=seed).weights[0] for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_rows_of_zeros_and_dead_columns():
    weight, moment = random_layer(40, 20)
    weight[3] = 0
    moment[5] = moment[:, 5] = 0
    decoded = run([weight], moment).weights[0]
    assert bool(torch.isfinite(decoded).all())
    assert bool((decoded[3] == 0).all())


def test_overlapping_codes_are_refused():
    weight, moment = random_layer(16, 16)
    with pytest.raises(UnsupportedError, match="needs L = k"):
        run([weight], moment, "2,4,8")


def test_it_is_named_for_comparison_only():
    assert not parse_method("vptq").fits_checkpoint
    with pytest.raises(UsageError, match="'vptq' is for mgvq compare alone"):
        stored_method("vptq")


def test_refitted_scales_win(monkeypatch):
    weight, moment = random_layer(96, 64)
    found = sum(run([weight], moment).errors)
    monkeypatch.setattr(vptq, "refit_scales", lambda _weight, _unit, _moment, start: start)
    assert found < sum(run([weight], moment).errors)
