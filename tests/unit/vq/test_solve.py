from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from layer_problems import random_layer

from toolchain.errors import ShapeError, UnsupportedError
from toolchain.quantize.baselines.registry import METHODS
from toolchain.values import CODES, PLAIN_CODE_NAMES
from toolchain.vq.solve import quantize_group
from toolchain.vq.weights import Options

SOLVERS = {"mgvq": quantize_group} | METHODS

FAST = Options(lloyd_rounds=4, samples=4_000)


def run(method, weights, moment, code, seed=0):
    return SOLVERS[method](weights, moment, CODES[code], FAST, torch.Generator().manual_seed(seed))


PAIRS = [(method, code) for method in SOLVERS for code in CODES if method == "mgvq" or code in PLAIN_CODE_NAMES]


@pytest.mark.parametrize(("method", "code"), PAIRS)
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


@pytest.mark.parametrize("code", PLAIN_CODE_NAMES)
def test_methods_rank_as_they_should(code):
    weight, moment = random_layer(128, 128)
    losses = {method: run(method, [weight], moment, code).loss for method in SOLVERS}
    assert losses["mgvq"] < 0.6 * losses["nearest"]
    assert losses["nearest"] < losses["rtn"]


def test_more_bits_never_lose():
    weight, moment = random_layer(64, 64)
    losses = [run("mgvq", [weight], moment, code).loss for code in ("4,8,8", "2,6,6", "2,8,8")]
    assert losses[0] > losses[1] > losses[2]
    losses = [run("mgvq", [weight], moment, code).loss for code in ("2,3,8", "2,4,8", "2,5,8", "2,6,8", "2,8,9")]
    assert all(finer < coarser for coarser, finer in pairwise(losses))


@pytest.mark.parametrize(("plain", "overlapping", "ratio"), [("2,6,6", "2,6,8", 0.85), ("2,8,8", "2,8,9", 0.95)])
def test_overlapping_windows_lose_less_at_equal_bits(plain, overlapping, ratio):
    weight, moment = random_layer(256, 64)
    losses = [run("mgvq", [weight], moment, code).loss for code in (plain, overlapping)]
    assert losses[1] < ratio * losses[0]


def test_further_rounds_never_lose():
    weight, moment = random_layer(96, 64)
    losses = []
    for rounds in (1, 2, 3):
        options = Options(rounds=rounds, lloyd_rounds=3, samples=2_000)
        losses.append(quantize_group([weight], moment, CODES["4,8,8"], options, torch.Generator()).loss)
    assert losses[0] >= losses[1] >= losses[2]


@pytest.mark.parametrize(
    ("method", "code"), [*((method, "4,8,8") for method in SOLVERS), ("mgvq", "2,4,8"), ("mgvq", "4,8,9")]
)
def test_a_group_shares_one_codebook(method, code):
    first, moment = random_layer(100, 32, seed=0)
    second, _ = random_layer(60, 32, seed=1)
    group = run(method, [first, second], moment, code)
    assert [layer.rows for layer in group.layers] == [100, 60]
    assert group.layers[0].codebook is group.layers[1].codebook
    for weight, layer, reference in zip((first, second), group.layers, group.references):
        assert float((weight - layer.decode()).norm()) < float(weight.norm())
        assert reference > 0


@pytest.mark.parametrize("method", SOLVERS)
def test_the_generator_is_all_that_is_random(method):
    weight, moment = random_layer(64, 32)
    code = "2,6,8" if method == "mgvq" else "2,6,6"
    first, again = (run(method, [weight], moment, code, seed=7).layers[0] for _ in range(2))
    assert torch.equal(first.codes, again.codes)
    assert torch.equal(first.codebook, again.codebook)
    assert torch.equal(first.scales, again.scales)


@pytest.mark.parametrize(("method", "code"), [*((method, "4,8,8") for method in SOLVERS), ("mgvq", "2,4,8")])
def test_rows_of_zeros_and_dead_columns_decode_to_something_finite(method, code):
    weight, moment = random_layer(40, 20)
    weight[3] = 0
    moment[7], moment[:, 7] = 0, 0
    layer = run(method, [weight], moment, code).layers[0]
    decoded = layer.decode()
    assert bool(torch.isfinite(decoded).all())
    assert float(decoded[3].abs().max()) == 0
    # A dead column is cheap, not free: it is still nearer to the weights than zeros are.
    assert float((weight[:, 7] - decoded[:, 7]).norm()) < 1.2 * float(weight[:, 7].norm())


def test_a_whole_layer_of_zeros_is_no_obstacle():
    layer = run("mgvq", [torch.zeros(20, 16)], torch.eye(16), "2,4,8").layers[0]
    assert float(layer.decode().abs().max()) == 0


@pytest.mark.parametrize("method", ["nearest", "rtn"])
def test_methods_without_a_path_search_refuse_overlapping_codes(method):
    weight, moment = random_layer(16, 16)
    with pytest.raises(UnsupportedError, match=r"code 2,4,8: .* needs L = k"):
        run(method, [weight], moment, "2,4,8")


def test_odd_shapes_are_refused():
    weight, moment = random_layer(16, 16)
    with pytest.raises(ShapeError, match="a moment"):
        quantize_group([weight], moment[:8, :8], CODES["4,8,8"], FAST, torch.Generator())
