"""Every way to run a linear gives the same product: splits, tiles, int8 activations, from 1 token to several tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_problems import ALL_CODES, SEGMENTED, Problem, problem

from toolchain.errors import UnsupportedError
from toolchain.native import launch
from toolchain.values import CODES

SKINNY, TILED, INT8 = 1 << 16, 2 << 16, 1 << 8
INT8_CODES = [code for code in ALL_CODES if code.vector == 4]


@pytest.fixture
def kernels(runner):
    """The libraries that have tactics: all but the one behind the reference."""
    if "reference" in str(runner.library.path):
        pytest.skip("the reference has one way to run")
    return runner


def whole_numbers(given: Problem, tokens: int, largest: int) -> torch.Tensor:
    """float16[tokens, columns] of integers whose sums with small integer tables float32 holds."""
    rng = np.random.default_rng(tokens)
    x = rng.integers(-largest, largest + 1, size=(tokens, sum(given.columns)))
    return torch.from_numpy(x.astype(np.float16))


def run(kernels, given: Problem, x: torch.Tensor, tactic: int, bias: torch.Tensor | None = None) -> torch.Tensor:
    moved = None if bias is None else bias.to(kernels.device)
    weight = given.weight(kernels.device)
    return launch.linear(kernels.library, x.to(kernels.device), weight, moved, kernels.stream, tactic).cpu()


@pytest.mark.parametrize("tokens", [1, 9, 32])
@pytest.mark.parametrize("split", [1, 2, 3, 16])
def test_any_split_of_the_columns_adds_up(kernels, split, tokens):
    given = problem((CODES["2,4,8"], 656), rows=260, seed=split, is_exact=True)
    x, bias = whole_numbers(given, tokens, 4), torch.arange(260.0)
    expected = (x.float() @ torch.from_numpy(given.decoded()).T + bias).half()
    assert torch.equal(run(kernels, given, x, SKINNY | split, bias), expected)


@pytest.mark.parametrize("tokens", [17, 64, 65, 130])
@pytest.mark.parametrize("segments", [*([(code, 104)] for code in ALL_CODES), SEGMENTED], ids=str)
def test_tiles_of_many_tokens_are_exact(kernels, segments, tokens):
    given = problem(*segments, rows=136, seed=tokens, is_exact=True)
    x, bias = whole_numbers(given, tokens, 4), torch.arange(136.0)
    expected = (x.float() @ torch.from_numpy(given.decoded()).T + bias).half()
    assert torch.equal(run(kernels, given, x, TILED | 1, bias), expected)


@pytest.mark.parametrize("dtype", launch.ACTIVATIONS)
@pytest.mark.parametrize("tokens", [17, 64, 130])
def test_sums_of_segments_are_rounded_once(kernels, tokens, dtype):
    """A segment's sum needs more bits than y has; float32 holds them all, so that one rounding is the only one."""
    given = problem(*SEGMENTED, rows=136, seed=tokens, is_exact=True)
    x, bias = whole_numbers(given, tokens, 64).to(dtype), torch.arange(136.0)
    exact = x.float() @ torch.from_numpy(given.decoded()).T
    first = x[:, :64].float() @ torch.from_numpy(given.decoded()[:, :64]).T
    if dtype != torch.float32:
        assert (first.to(dtype).float() != first).any(), "the case would not show a second rounding"
    assert torch.equal(run(kernels, given, x, TILED | 1, bias), (exact + bias).to(dtype))


def test_panels_of_segments_are_the_whole(kernels):
    """More sums than the workspace holds: rows and tokens are done panel by panel."""
    given = problem((CODES["2,4,8"], 64), (CODES["4,8,9"], 16), rows=1030, is_exact=True)
    x, bias = whole_numbers(given, 4100, 4), torch.arange(1030.0)
    expected = (x.float() @ torch.from_numpy(given.decoded()).T + bias).half()
    assert torch.equal(run(kernels, given, x, TILED | 1, bias), expected)


@pytest.mark.parametrize("tokens", [5, 40])
@pytest.mark.parametrize("columns", [304, 299])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_off_their_alignment_give_the_same_bits(kernels, dtype, columns, tokens):
    given = problem((CODES["2,4,8"], columns), rows=130)
    wide = torch.randn(tokens, 2 * columns + 1, generator=torch.Generator().manual_seed(0)).to(kernels.device, dtype)
    weight = given.weight(kernels.device)
    for begin in (0, 1):
        x = wide[:, begin : begin + columns]
        y = launch.linear(kernels.library, x, weight, None, kernels.stream)
        assert torch.equal(y, launch.linear(kernels.library, x.clone(), weight, None, kernels.stream))


def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 values as float32, float32[tokens, 1] scale): the kernels' rule, in their arithmetic."""
    scale = x.float().abs().amax(dim=1, keepdim=True) / 127
    inverse = torch.where(scale > 0, 1 / scale, 0)
    return torch.round((x.float() * inverse).clamp(-127, 127)), scale


@pytest.mark.parametrize("tactic", [SKINNY | INT8 | 1, SKINNY | INT8 | 2, TILED | INT8 | 1], ids=hex)
@pytest.mark.parametrize("code", INT8_CODES, ids=str)
def test_int8_activations_are_summed_in_integers(kernels, code, tactic):
    given = problem((code, 304), rows=136, seed=3, is_exact=True)
    tokens = 19 if tactic & TILED else 9
    x = torch.randn(tokens, 304, generator=torch.Generator().manual_seed(0)).half()
    x[3] = 0
    values, scale = quantized(x)
    scales = torch.from_numpy(given.scales[0]).float()
    sums = values @ (torch.from_numpy(given.decoded()) / scales[:, None]).T
    assert torch.equal(sums, sums.round()), "integers"
    found, expected = run(kernels, given, x, tactic), sums * scales * scale
    if tactic & 0xFF == 1:
        assert torch.equal(found, expected.half())
    else:  # each part is scaled in float32 before the parts are added
        assert ((found.float() - expected).abs() <= (2.0**-11 + 2.0**-22) * expected.abs() + 2.0**-25).all()


@pytest.mark.parametrize("tactic", [SKINNY | INT8 | 1, TILED | INT8 | 1], ids=hex)
def test_int8_activations_do_not_hide_what_is_broken(kernels, tactic):
    given = problem((CODES["4,8,9"], 64), rows=128)
    x = torch.ones(19, 64).half()
    x[1, 5], x[17, 63] = float("nan"), float("inf")
    y = run(kernels, given, x, tactic)
    assert torch.isnan(y[[1, 17]]).all()
    assert torch.isfinite(y[[i for i in range(19) if i not in (1, 17)]]).all()


def test_int8_needs_int8_tables(kernels):
    given = problem((CODES["2,4,8"], 64), rows=128)
    with pytest.raises(UnsupportedError, match="valid_tactics"):
        run(kernels, given, torch.zeros(1, 64).half(), SKINNY | INT8 | 1)
