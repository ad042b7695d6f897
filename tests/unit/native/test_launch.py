"""The launchers against the format, the same tests on every library there is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_problems import ALL_CODES, SEGMENTED, problem
from kernel_products import FEW_TOKENS, check_product, one_hot_rows, scale_rows

from toolchain.errors import ShapeError, UnsupportedError
from toolchain.native import launch
from toolchain.native.launch import Weight
from toolchain.values import CODES

SEGMENTS = [*([(code, 80)] for code in ALL_CODES), SEGMENTED]


@pytest.mark.parametrize("tokens", FEW_TOKENS)
@pytest.mark.parametrize("segments", SEGMENTS, ids=str)
def test_sums_that_float32_holds_are_exact(runner, segments, tokens):
    given = problem(*segments, rows=150, seed=tokens, is_exact=True)
    rng = np.random.default_rng(tokens)
    x = rng.integers(-16, 17, size=(tokens, sum(given.columns))).astype(np.float32)
    bias = rng.integers(-64, 65, size=given.rows).astype(np.float32)
    expected = torch.from_numpy(x @ given.decoded().T + bias)
    for dtype in launch.ACTIVATIONS:
        tensors = [torch.from_numpy(a).to(runner.device, dtype) for a in (x, bias)]
        y = launch.linear(runner.library, tensors[0], given.weight(runner.device), tensors[1], runner.stream)
        assert y.dtype == dtype
        assert torch.equal(y.cpu(), expected.to(dtype)), dtype


@pytest.mark.parametrize("segments", SEGMENTS, ids=str)
def test_one_hot_rows_give_the_weights(runner, segments):
    given = problem(*segments, rows=200, seed=7)
    expected = torch.from_numpy(given.decoded())
    for x in one_hot_rows(sum(given.columns), runner.device):
        y = launch.linear(runner.library, x, given.weight(runner.device), None, runner.stream)
        assert torch.equal(y.cpu(), expected[:, x.float().argmax(dim=1).cpu()].T.half())
    assert torch.equal(
        launch.dequantize(runner.library, given.weight(runner.device), runner.stream).cpu(), expected.half()
    )


@pytest.mark.parametrize("dtype", launch.ACTIVATIONS)
@pytest.mark.parametrize("segments", SEGMENTS, ids=str)
def test_products_of_random_numbers_are_within_rounding(runner, segments, dtype):
    check_product(runner, problem(*segments, rows=150, seed=3), 5, dtype)


def test_strided_and_many_dimensional_activations(runner):
    given = problem((CODES["2,4,8"], 48), rows=130)
    wide = torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(0)).half().to(runner.device)
    weight = given.weight(runner.device)
    y = launch.linear(runner.library, wide[..., :48], weight, None, runner.stream)
    assert y.shape == (2, 3, 130)
    assert torch.equal(y, launch.linear(runner.library, wide[..., :48].contiguous(), weight, None, runner.stream))
    turned = wide[..., ::2].transpose(0, 1)
    same = launch.linear(runner.library, turned.contiguous(), weight, None, runner.stream)
    assert torch.equal(launch.linear(runner.library, turned, weight, None, runner.stream), same)
    assert launch.linear(runner.library, wide[:0, :, :48], weight, None, runner.stream).shape == (0, 3, 130)


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", launch.ACTIVATIONS)
def test_embedding_rows_are_rounded_once(runner, ids, dtype):
    given = problem(*SEGMENTED, rows=140)
    wanted = torch.tensor([[139, 0, 5], [77, -1, 140]], dtype=ids, device=runner.device)
    found = launch.embedding(runner.library, wanted, given.weight(runner.device), dtype, runner.stream).cpu()
    expected = torch.from_numpy(given.decoded()).to(dtype)
    assert torch.equal(found[0], expected[[139, 0, 5]])
    assert torch.equal(found[1, 0], expected[77])
    assert not found[1, 1:].any()


def test_repeats_are_the_same_bits(runner):
    given = problem((CODES["2,4,8"], 512), rows=256)
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(0)).half().to(runner.device)
    weight = given.weight(runner.device)
    once = launch.linear(runner.library, x, weight, None, runner.stream)
    for _ in range(3 if runner.is_slow else 100):
        assert torch.equal(launch.linear(runner.library, x, weight, None, runner.stream), once)


def test_the_reader_reads(runner):
    data = torch.arange(1024, dtype=torch.int32).to(runner.device)
    sink = torch.zeros(1, dtype=torch.int32, device=runner.device)
    runner.library.read(data.data_ptr(), 4096, sink.data_ptr(), runner.stream)
    with pytest.raises(UnsupportedError, match="multiple of 16"):
        runner.library.read(data.data_ptr(), 8, sink.data_ptr(), runner.stream)


def test_misaligned_codes_are_refused(runner):
    given = problem((CODES["2,4,8"], 64), rows=128).weight(runner.device)
    room = torch.zeros(len(given.codes[0]) + 1, dtype=torch.uint8, device=runner.device)
    weight = Weight([room[1:]], given.tables, given.scales, given.formats, given.rows)
    x = torch.zeros(1, 64, dtype=torch.float16, device=runner.device)
    with pytest.raises(UnsupportedError, match="align"):
        launch.linear(runner.library, x, weight, None, runner.stream)


def test_what_a_kernel_has_not_is_refused(runner):
    given = problem((CODES["2,4,8"], 64), rows=128).weight(runner.device)
    x = torch.zeros(1, 64, dtype=torch.float16, device=runner.device)
    with pytest.raises(UnsupportedError, match="mgvq_linear"):
        launch.linear(runner.library, x, given, None, runner.stream, tactic=999_999)
    narrow = problem((CODES["2,4,8"], 48), (CODES["2,4,8"], 16), rows=128).weight(runner.device)
    with pytest.raises(UnsupportedError, match="64"):
        launch.linear(runner.library, x, narrow, None, runner.stream)


def test_shapes_and_types_are_checked_before_anything_is_launched(runner):
    given = problem((CODES["2,4,8"], 64), rows=128).weight(runner.device)
    x = torch.zeros(2, 64, dtype=torch.float16, device=runner.device)
    with pytest.raises(ShapeError, match=r"expected \[\.\.\., 64\] on"):
        launch.linear(runner.library, x[:, :63], given, None, runner.stream)
    with pytest.raises(ShapeError, match=r"bias: expected \[128\]"):
        launch.linear(runner.library, x, given, x[0], runner.stream)
    with pytest.raises(UnsupportedError, match=r"found torch\.float64; convert them, or decode with torch"):
        launch.linear(runner.library, x.double(), given, None, runner.stream)
    short = Weight([given.codes[0][:-1]], given.tables, given.scales, given.formats, given.rows)
    with pytest.raises(ShapeError, match=r"codes 0: expected contiguous torch.uint8\[2048\]"):
        launch.linear(runner.library, x, short, None, runner.stream)
    with pytest.raises(ShapeError, match="of every segment"):
        Weight(given.codes, given.tables, [], given.formats, given.rows).checked()
    with pytest.raises(ShapeError, match="ids: expected int32 or int64"):
        launch.embedding(runner.library, x, given, torch.float16, runner.stream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_any_size_neither_overflow_nor_vanish(runner, dtype):
    given = problem((CODES["2,4,8"], 64), rows=128, seed=5)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    sizes = torch.tensor([1e30, 1e-30, 65504.0, 1e6, 1.0, 2.0**-14, 0.0, 1e-38])
    x = (x * sizes[:, None]).to(dtype)
    y = launch.linear(runner.library, x.to(runner.device), given.weight(runner.device), None, runner.stream).cpu()
    weight = torch.from_numpy(given.decoded()).double()
    magnitude = x.double().abs() @ weight.abs().T
    # float16 keeps 11 bits of x, the result as many as its own type.
    error = (y.double() - x.double() @ weight.T).abs() / magnitude.clamp_min(1e-300)
    print(f"largest error over the sum of magnitudes: {error[:6].max():.2e}")
    assert error[:6].max() <= 2.0**-11 + torch.finfo(dtype).eps
    assert not y[6].any()
    assert torch.isfinite(y).all()


def test_rows_that_are_not_finite_stay_so(runner):
    given = problem((CODES["2,4,8"], 64), rows=128, seed=5)
    x = torch.ones(3, 64)
    x[0, 3], x[1, 60] = float("inf"), float("nan")
    y = launch.linear(runner.library, x.to(runner.device), given.weight(runner.device), None, runner.stream).cpu()
    assert torch.isnan(y[:2]).all()
    assert torch.isfinite(y[2]).all()


def test_scaled_rows_are_x_exactly_where_eleven_bits_hold_it():
    x = torch.tensor([[1.5, -3.0, 2.0**-20], [2.0**100, 2.0**90, -(2.0**100)], [2.0**-99, 0, 0], [0, 0, 0]])
    scaled, back = scale_rows(x)
    assert scaled.dtype == torch.float16
    assert back.shape == (4, 1)
    assert torch.equal(scaled.double() * back.double(), x.double())
    assert ((scaled.abs().amax(1)[:3] >= 2.0**14) & (scaled.abs().amax(1)[:3] < 2.0**15)).all()
    assert torch.equal(torch.frexp(back[:, 0])[0], torch.full((4,), 0.5)), "powers of two"
