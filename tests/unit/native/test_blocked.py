"""Blocked decoding on the CPU: the decoder's numbers, a bounded block, and the module's own product."""

from __future__ import annotations

import pytest
import torch
from kernel_problems import ALL_CODES, problem
from torch.nn import functional as F

from toolchain.checkpoint.modules import VQLinear, decode_weight
from toolchain.native import blocked
from toolchain.values import CODES


def tensors(given):
    return [torch.from_numpy(a[0]) for a in (given.stored, given.tables, given.scales)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("code", ALL_CODES, ids=str)
def test_a_block_is_its_rows_of_the_whole(code, dtype):
    stored = tensors(problem((code, 72), rows=300, seed=3))
    whole = decode_weight(*stored, code, 300, 72, dtype)
    for begin, end in ((0, 300), (128, 256), (256, 300)):
        assert torch.equal(blocked.decode_rows_between(*stored, code, 72, begin, end, dtype), whole[begin:end])


@pytest.mark.parametrize("has_bias", [False, True])
def test_many_blocks_are_one_linear_and_none_is_large(monkeypatch, has_bias):
    monkeypatch.setattr(blocked, "BLOCK_WEIGHTS", 1)
    decode, seen = blocked.decode_rows_between, []

    def watched(codes, table, scales, code, columns, begin, end, dtype):
        seen.append((begin, end))
        return decode(codes, table, scales, code, columns, begin, end, dtype)

    monkeypatch.setattr(blocked, "decode_rows_between", watched)
    module = VQLinear(CODES["2,4,8"], 500, 48, "t0", torch.float32, bias=has_bias)
    module.codes, module.codebook, module.scales = tensors(problem((module.code, 48), rows=500))
    if has_bias:
        module.bias.copy_(torch.arange(500.0))
    x = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(0))
    y = module(x)
    assert seen == [(0, 128), (128, 256), (256, 384), (384, 500)]
    torch.testing.assert_close(y, F.linear(x, module.weight, module.bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("columns", "rows"), [(16, 32768), (1536, 256), (18944, 128), (1 << 22, 128)])
def test_blocks_are_whole_row_groups_of_a_bounded_size(columns, rows):
    assert blocked.rows_a_block(columns) == rows


def test_a_gradient_for_the_input_goes_through_the_dense_weight():
    module = VQLinear(CODES["4,8,8"], 40, 32, "t0", torch.float32)
    module.codes, module.codebook, module.scales = tensors(problem((module.code, 32), rows=40))
    x = torch.randn(3, 32, requires_grad=True)
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, module.weight.sum(0).expand(3, 32))
