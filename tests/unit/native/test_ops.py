"""The torch ops: their rules (schema, shapes without data, gradients), and what modules do without a device."""

from __future__ import annotations

import pytest
import torch
from kernel_problems import SEGMENTED, problem
from torch.nn import functional as F

from toolchain.checkpoint.modules import VQLinear
from toolchain.errors import EnvironmentMismatch
from toolchain.native import forward, ops
from toolchain.native.choice import decodes_with_torch, torch_decode
from toolchain.native.library import DEFAULT_TACTIC
from toolchain.values import CODES


def arguments(*segments, rows=140):
    given = problem(*segments, rows=rows)
    weight = given.weight()
    return given, (list(weight.codes), list(weight.tables), list(weight.scales), list(weight.formats), weight.rows)


@pytest.mark.parametrize("segments", [[(CODES["2,6,8"], 40)], SEGMENTED], ids=str)
def test_ops_compute_with_the_weight(segments):
    given, weight = arguments(*segments)
    dense = torch.from_numpy(given.decoded())
    x = torch.randn(2, 3, dense.shape[1], generator=torch.Generator().manual_seed(0))
    bias = torch.arange(140.0)
    torch.testing.assert_close(ops.linear(x, *weight, bias, DEFAULT_TACTIC), F.linear(x, dense, bias))
    assert torch.equal(ops.dequantize(*weight), dense.half())
    ids = torch.tensor([[3, 139]])
    assert torch.equal(ops.embedding(ids, *weight, torch.bfloat16), dense[ids].bfloat16())


@pytest.mark.parametrize("segments", [[(CODES["2,6,8"], 40)], SEGMENTED], ids=str)
@pytest.mark.parametrize("wants_gradient", [False, True])
def test_torch_finds_the_ops_well_formed(segments, wants_gradient):
    given, weight = arguments(*segments)
    x = torch.randn(2, sum(given.columns), requires_grad=wants_gradient)
    torch.library.opcheck(torch.ops.mgvq.linear.default, (x, *weight, torch.randn(140), DEFAULT_TACTIC))
    torch.library.opcheck(torch.ops.mgvq.embedding.default, (torch.tensor([1, 2]), *weight, torch.float16))
    torch.library.opcheck(torch.ops.mgvq.dequantize.default, weight)


def test_gradients_are_those_of_the_dense_linear():
    given, weight = arguments(*SEGMENTED)
    x = torch.randn(2, 3, sum(given.columns), generator=torch.Generator().manual_seed(0), requires_grad=True)
    bias = torch.zeros(140, requires_grad=True)
    seed = torch.randn(2, 3, 140, generator=torch.Generator().manual_seed(1))
    ops.linear(x, *weight, bias, DEFAULT_TACTIC).backward(seed)
    dense = torch.from_numpy(given.decoded()).half().float()  # the way back has the weight in float16
    torch.testing.assert_close(x.grad, seed @ dense)
    torch.testing.assert_close(bias.grad, seed.sum((0, 1)))


def test_shapes_without_data():
    given, weight = arguments(*SEGMENTED)
    on_meta = [[t.to("meta") for t in part] for part in weight[:3]]
    x = torch.empty(5, sum(given.columns), dtype=torch.bfloat16, device="meta")
    y = ops.linear(x, *on_meta, *weight[3:], None, DEFAULT_TACTIC)
    assert (y.shape, y.dtype, y.device.type) == ((5, 140), torch.bfloat16, "meta")
    ids = torch.empty(2, 7, dtype=torch.int64, device="meta")
    assert ops.embedding(ids, *on_meta, *weight[3:], torch.float16).shape == (2, 7, sum(given.columns))
    assert ops.dequantize(*on_meta, *weight[3:]).shape == (140, sum(given.columns))


def test_a_weight_left_on_the_cpu_is_named_for_what_it_is():
    module = VQLinear(CODES["2,4,8"], 8, 16, "t0", torch.float16)
    with pytest.raises(EnvironmentMismatch, match=r"8x16, code=2,4,8.* found it on cpu; move the model"):
        forward.op_arguments(module)


def test_torch_decode_is_asked_for_and_ends():
    assert not decodes_with_torch()
    with torch_decode():
        assert decodes_with_torch()
        with torch_decode():
            assert decodes_with_torch()
        assert decodes_with_torch()
    assert not decodes_with_torch()
