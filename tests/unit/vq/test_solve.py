from __future__ import annotations

import pytest
import torch
from layer_problems import random_layer

from toolchain.errors import ShapeError, UnsupportedError
from toolchain.methods import METHODS
from toolchain.values import CODES, VQCode
from toolchain.vq.solve import quantize_group
from toolchain.vq.weights import Options

FAST = Options(lloyd_rounds=4, samples=4_000)


def run(method, weights, moment, code, seed=0):
    return METHODS[method](weights, moment, CODES[code], FAST, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("code", CODES)
def test_reported_errors_are_those_of_the_stored_bytes(method, code):
    weight, moment = random_layer(150, 40)
    group = run(method, [weight], moment, code)
    stored = group.layers[0]
    assert stored.codes.dtype == torch.uint8
    assert stored.codes.shape == (CODES[code].codes_bytes(150, 40),)
    assert stored.scales.dtype == torch.float16
    error = (weight - stored.decode()).double()
    assert group.errors[0] == pytest.approx(float(((error @ moment.double()) * error).sum()), rel=1e-4)
    assert group.references[0] == pytest.approx(float(((weight @ moment) * weight).sum()), rel=1e-4)


@pytest.mark.parametrize("code", CODES)
def test_methods_rank_as_they_should(code):
    weight, moment = random_layer(128, 128)
    losses = {method: run(method, [weight], moment, code).loss for method in METHODS}
    assert losses["mgvq"] < 0.6 * losses["nearest"]
    assert losses["nearest"] < losses["rtn"]


def test_more_bits_never_lose():
    weight, moment = random_layer(64, 64)
    losses = [run("mgvq", [weight], moment, code).loss for code in ("4,8,8", "2,6,6", "2,8,8")]
    assert losses[0] > losses[1] > losses[2]


def test_further_rounds_never_lose():
    weight, moment = random_layer(96, 64)
    losses = []
    for rounds in (1, 2, 3):
        options = Options(rounds=rounds, lloyd_rounds=3, samples=2_000)
        losses.append(quantize_group([weight], moment, CODES["4,8,8"], options, torch.Generator()).loss)
    assert losses[0] >= losses[1] >= losses[2]


@pytest.mark.parametrize("method", METHODS)
def test_a_group_shares_one_table(method):
    first, moment = random_layer(100, 32, seed=0)
    second, _ = random_layer(60, 32, seed=1)
    group = run(method, [first, second], moment, "4,8,8")
    assert [layer.rows for layer in group.layers] == [100, 60]
    assert group.layers[0].table is group.layers[1].table
    for weight, layer, reference in zip((first, second), group.layers, group.references):
        assert float((weight - layer.decode()).norm()) < float(weight.norm())
        assert reference > 0


@pytest.mark.parametrize("method", METHODS)
def test_the_generator_is_all_that_is_random(method):
    weight, moment = random_layer(64, 32)
    first, again = (run(method, [weight], moment, "2,6,6", seed=7).layers[0] for _ in range(2))
    assert torch.equal(first.codes, again.codes)
    assert torch.equal(first.table, again.table)
    assert torch.equal(first.scales, again.scales)


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_zeros_and_dead_columns_decode_to_something_finite(method):
    weight, moment = random_layer(40, 20)
    weight[3] = 0
    moment[7], moment[:, 7] = 0, 0
    layer = run(method, [weight], moment, "4,8,8").layers[0]
    decoded = layer.decode()
    assert bool(torch.isfinite(decoded).all())
    assert float(decoded[3].abs().max()) == 0
    # A dead column is cheap, not free: it is still nearer to the weights than zeros are.
    assert float((weight[:, 7] - decoded[:, 7]).norm()) < 1.2 * float(weight[:, 7].norm())


def test_overlapping_codes_and_odd_shapes_are_refused():
    weight, moment = random_layer(16, 16)
    with pytest.raises(UnsupportedError, match="code 2,4,8: these methods search codes with L = k"):
        quantize_group([weight], moment, VQCode(2, 4, 8), FAST, torch.Generator())
    with pytest.raises(ShapeError, match="a moment"):
        quantize_group([weight], moment[:8, :8], CODES["4,8,8"], FAST, torch.Generator())
