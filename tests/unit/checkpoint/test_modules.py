from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from toolchain.checkpoint.modules import (
    VQCodebooks,
    VQConv,
    VQEmbedding,
    VQLinear,
    VQModule,
    decode_rows,
    decode_weight,
    keep_decoded,
    patch_rows,
    replacement_for,
)
from toolchain.checkpoint.rotated import inverse_rotate_model, rotate_model
from toolchain.errors import ShapeError
from toolchain.values import CODES, LayerPlan, VQCode
from toolchain.vq import format as vq_format
from toolchain.vq.rotation import inverse_rotate, rotate
from toolchain.vq.weights import VQWeights

ALL_CODES = [VQCode(v, k, window) for v in (2, 4) for k in range(1, 9) for window in range(k, 10)]


def random_weights(code: VQCode, rows: int, columns: int, seed: int = 0) -> VQWeights:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, size=code.codes_bytes(rows, columns), dtype=np.uint8)
    shape = (code.entries, code.vector)
    codebook = rng.integers(-127, 128, size=shape).astype(np.int8) if code.vector == 4 else rng.normal(size=shape)
    scales = rng.uniform(0.01, 0.1, size=rows).astype(np.float16)
    arrays = (codes, codebook.astype(code.codebook_dtype), scales)
    return VQWeights(code, rows, columns, *(torch.from_numpy(a) for a in arrays))


def filled(module: VQModule, seed: int = 0) -> VQModule:
    module.set_weights(random_weights(module.code, module.rows, module.columns, seed))
    return module


def layer(kind: str, code: str, rows: int, columns: int) -> LayerPlan:
    return LayerPlan("m", "language", kind, rows, columns, "m", code, "t0")


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ALL_CODES), st.integers(1, 300), st.integers(1, 50), st.integers(0, 2**32))
def test_decode_equals_the_format_bit_for_bit(code, rows, columns, seed):
    w = random_weights(code, rows, columns, seed)
    expected = vq_format.decode(w.codes.numpy(), w.codebook.numpy(), w.scales.numpy(), code, rows, columns)
    found = decode_weight(w.codes, w.codebook, w.scales, code, rows, columns, torch.float32)
    assert np.array_equal(found.numpy(), expected)
    assert np.array_equal(w.decode().numpy(), expected)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(ALL_CODES), st.integers(1, 300), st.integers(1, 50), st.integers(0, 2**32))
def test_decoded_rows_are_rows_of_the_whole(code, rows, columns, seed):
    w = random_weights(code, rows, columns, seed)
    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, rows, size=(2, 3)))
    stored = (w.codes, w.codebook, w.scales, code, rows, columns, torch.float32)
    assert torch.equal(decode_rows(ids, *stored), decode_weight(*stored)[ids])


def test_linear_is_a_linear_of_the_decoded_weight():
    module = filled(VQLinear(CODES["4,8,8"], 24, 40, "t0", torch.float32, bias=True))
    module.bias.copy_(torch.arange(24.0))
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(module(x), F.linear(x, module.weight, torch.arange(24.0)))
    assert module(x.double()[..., :40].float()).shape == (2, 3, 24)


def rotated_module() -> VQLinear:
    dense = nn.Linear(128, 24)
    module = filled(replacement_for(dense, replace(layer("linear", "2,4,8", 24, 128), rotation=64)))
    assert isinstance(module, VQLinear)
    return module


def test_a_rotated_linear_multiplies_rotated_inputs():
    module, x = rotated_module(), torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(0))
    stored = module.dense(torch.float32)
    torch.testing.assert_close(module(x), F.linear(rotate(x, 64), stored, module.bias))
    torch.testing.assert_close(module(x), F.linear(x, module.weight, module.bias), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(module.weight, inverse_rotate(stored, 64))
    with keep_decoded(module):
        torch.testing.assert_close(module(x), F.linear(rotate(x, 64), stored, module.bias))


def test_a_copy_of_a_rotated_linear_rotates_once_and_watchers_see_what_the_weight_multiplies():
    module, x, seen = copy.deepcopy(rotated_module()), torch.ones(1, 128), []
    module.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0]))
    module(x)
    assert torch.equal(seen[0], rotate(x, 64))


def test_a_rotated_model_computes_the_same_and_turns_back():
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 8)).requires_grad_(False)
    before, x = copy.deepcopy(model), torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    rotate_model(model, {"0": 64, "1": 16})
    assert not torch.allclose(model[1].weight, before[1].weight, atol=1e-2)
    torch.testing.assert_close(model(x), before(x), atol=1e-5, rtol=1e-5)
    inverse_rotate_model(model, {"0": 64, "1": 16})
    assert not model[0]._forward_pre_hooks
    for one, other in zip(model, before, strict=True):
        torch.testing.assert_close(one.weight, other.weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kernel", [(3, 2), (2, 4, 4)])
def test_conv_equals_a_convolution(kernel):
    dense = (nn.Conv2d if len(kernel) == 2 else nn.Conv3d)(3, 10, kernel, stride=kernel)
    columns = dense.weight[0].numel()
    module = filled(replacement_for(dense, layer("conv", "2,6,6", 10, columns)))
    assert isinstance(module, VQConv)
    dense.weight.data = module.weight
    sizes = [3 * k + 1 for k in kernel]  # the odd column at the end belongs to no patch
    x = torch.randn(2, 3, *sizes, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module(x), dense(x))
    assert torch.equal(module.bias, dense.bias)


def test_patch_rows_by_hand():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    rows = patch_rows(x, (2, 2))
    assert rows.shape == (1, 2, 2, 4)
    assert rows[0, 0, 1].tolist() == [2, 3, 6, 7]


def test_embedding_looks_rows_up():
    module = filled(VQEmbedding(CODES["4,8,8"], 130, 20, "t0", torch.float16))
    ids = torch.tensor([[0, 129], [64, 0]])
    assert module(ids).dtype == torch.float16
    assert torch.equal(module(ids), module.weight[ids])


def test_keep_decoded_changes_no_number_and_ends():
    model = nn.Sequential(filled(VQEmbedding(CODES["4,8,8"], 30, 16, "t0", torch.float32)))
    model.append(filled(VQLinear(CODES["2,8,8"], 8, 16, "t1", torch.float32)))
    ids = torch.tensor([3, 29])
    plain = model(ids)
    with keep_decoded(model):
        assert model[1].weight is model[1].weight
        assert torch.equal(model(ids), plain)
    assert model[1].weight is not model[1].weight
    with pytest.raises(ZeroDivisionError), keep_decoded(model):
        _ = 1 / 0
    assert model[1].weight is not model[1].weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_moving_a_model_leaves_the_format_alone(dtype):
    module = filled(VQLinear(CODES["2,6,6"], 10, 16, "t0", torch.float32, bias=True))
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    model = nn.Sequential(module, VQCodebooks({"t0": CODES["2,6,6"]})).to(dtype)
    for name, buffer in model[0].named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name])
    assert model[1].t0.dtype == torch.float16
    assert model[0].weight.dtype == dtype
    assert model[0].bias.dtype == dtype
    assert model[0](torch.ones(1, 16, dtype=dtype)).dtype == dtype


def test_a_tied_module_shares_buffers_and_stores_none():
    embedding = filled(VQEmbedding(CODES["4,8,8"], 30, 16, "t0", torch.float32))
    head = VQLinear(CODES["4,8,8"], 30, 16, "t0", torch.float32)
    head.tie_to(embedding)
    model = nn.ModuleDict({"embedding": embedding, "head": head})
    assert set(model.state_dict()) == {"embedding.codes", "embedding.scales"}
    assert head.codes is embedding.codes
    assert torch.equal(head.weight, embedding.weight)
    moved = copy.deepcopy(model).to(torch.bfloat16)
    assert moved["head"].scales is moved["embedding"].scales
    assert moved["head"].codes is not head.codes


def test_what_does_not_fit_is_refused():
    code = CODES["4,8,8"]
    with pytest.raises(ShapeError, match="expected weights of 8x16 in code 4,8,8, found 8x32"):
        VQLinear(code, 8, 16, "t0", torch.float32).set_weights(random_weights(code, 8, 32))
    with pytest.raises(ShapeError, match="expected a weight of 8x16, found"):
        replacement_for(nn.Linear(16, 9), layer("linear", "4,8,8", 8, 16))
    for conv in (nn.Conv2d(3, 8, 4, stride=2), nn.Conv2d(3, 8, 4, stride=4, padding=1)):
        with pytest.raises(ShapeError, match="stride = kernel and no padding"):
            replacement_for(conv, layer("conv", "4,8,8", 8, 48))
    for kind, columns, rotation in (("linear", 24, 16), ("conv", 48, 16), ("linear", 64, 32)):
        dense = nn.Linear(columns, 8) if kind == "linear" else nn.Conv2d(3, 8, 4, stride=4)
        with pytest.raises(ShapeError, match=f"rotation in blocks of {rotation}: expected"):
            replacement_for(dense, replace(layer(kind, "4,8,8", 8, columns), rotation=rotation))
