"""Device order in place: the same permutation as the format's, invisible to everything but the kernels."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from kernel_problems import ALL_CODES, problem
from torch import nn

from toolchain.checkpoint.modules import VQEmbedding, VQLinear
from toolchain.native import order
from toolchain.values import CODES
from toolchain.vq import format as vq_format


@pytest.mark.parametrize("shape", [(1, 1), (130, 33), (256, 64)], ids=str)
@pytest.mark.parametrize("code", ALL_CODES, ids=str)
def test_it_is_the_formats_permutation_and_back(code, shape):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, size=code.codes_bytes(*shape), dtype=np.uint8)
    device = order.device_from_checkpoint(torch.from_numpy(codes), code, *shape)
    assert np.array_equal(device.numpy(), vq_format.device_from_checkpoint(codes, code, *shape))
    assert np.array_equal(order.checkpoint_from_device(device, code, *shape).numpy(), codes)


def filled(kind: type, rows: int = 130, columns: int = 40):
    given = problem((CODES["2,6,8"], columns), rows=rows)
    module = kind(given.codes[0], rows, columns, "t0", torch.float32)
    module.codes.copy_(torch.from_numpy(given.stored[0]))
    module.scales.copy_(torch.from_numpy(given.scales[0]))
    module.codebook.copy_(torch.from_numpy(given.tables[0]))
    return module, given


def test_only_the_kernels_see_device_order():
    module, given = filled(VQLinear)
    before, weight = module.codes, module.weight
    kept = before.clone()
    device = module.device_codes()
    assert dict(module.named_buffers())["codes"] is device, "one takes the other's place: no second copy"
    assert torch.equal(before, kept), "who holds the old tensor has what it held"
    assert np.array_equal(device.numpy(), given.in_device_order()[0])
    assert module.device_codes() is device
    assert np.array_equal(device.numpy(), given.in_device_order()[0]), "permuted once"
    assert torch.equal(module.codes, before)
    assert torch.equal(module.weight, weight)
    assert torch.equal(module.state_dict()["codes"], before)
    x = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(module(x), x @ weight.T)


def test_tied_modules_share_the_bytes_and_their_order():
    embedding, given = filled(VQEmbedding)
    head = VQLinear(embedding.code, 130, 40, "t0", torch.float32)
    head.tie_to(embedding)
    device = head.device_codes()
    assert embedding.device_codes() is device
    assert np.array_equal(device.numpy(), given.in_device_order()[0])
    model = nn.ModuleDict({"embedding": embedding, "head": head})
    assert set(model.state_dict()) == {"embedding.codes", "embedding.scales"}
    assert np.array_equal(model.state_dict()["embedding.codes"].numpy(), given.stored[0])
    moved = copy.deepcopy(model).to(torch.bfloat16)
    for name in ("embedding", "head"):
        assert np.array_equal(moved[name].codes.numpy(), given.stored[0])
    assert moved["head"].device_codes() is moved["embedding"].device_codes()
    assert np.array_equal(moved["head"].device_codes().numpy(), given.in_device_order()[0])


def test_loading_and_moving_start_from_checkpoint_order():
    module, given = filled(VQLinear)
    other = np.random.default_rng(9).integers(0, 256, size=given.stored[0].size, dtype=np.uint8)
    module.device_codes()
    module.load_state_dict({"codes": torch.from_numpy(other), "scales": module.scales})
    assert np.array_equal(module.codes.numpy(), other)
    module.device_codes()
    assert np.array_equal(module.half().codes.numpy(), other)
    module.device_codes()
    assert np.array_equal(copy.deepcopy(module).codes.numpy(), other)
    module.codes = torch.from_numpy(given.stored[0])
    assert np.array_equal(module.device_codes().numpy(), given.in_device_order()[0])


def test_a_module_first_used_in_inference_mode_can_be_loaded_after_it():
    module, given = filled(VQLinear)
    with torch.inference_mode():
        assert np.array_equal(module.device_codes().numpy(), given.in_device_order()[0])
    module.load_state_dict(module.state_dict())
    assert np.array_equal(module.codes.numpy(), given.stored[0])
