"""A linear in K-segments computes with the decoded whole, stores what the plan says, and takes over nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from vq_samples import random_weights

from toolchain.checkpoint.install import check_values, install_layers
from toolchain.checkpoint.modules import keep_decoded, vq_modules
from toolchain.checkpoint.segmented import VQSegmentedLinear, segmented_replacement, vq_layers
from toolchain.errors import ShapeError
from toolchain.graph.export_modules import export_twins
from toolchain.native import ops, order
from toolchain.values import LayerPlan
from toolchain.vq import format as vq_format
from toolchain.vq.weights import SegmentedWeights, VQWeights

PLAN = LayerPlan("inner", "language", "linear", 70, 150, "inner", "2,6,8@64+4,8,9@64+2,3,8", "t0")


def weights(plan: LayerPlan = PLAN) -> SegmentedWeights:
    rng, found = np.random.default_rng(0), []
    for piece in plan.segments:
        code = piece.vq_code
        symbols, codebook, scales = random_weights(code, piece.rows, piece.columns, rng)
        stored = (vq_format.pack(symbols, code), codebook, scales)
        found.append(VQWeights(code, piece.rows, piece.columns, *(torch.from_numpy(a) for a in stored)))
    return SegmentedWeights(tuple(found))


def filled(bias: bool = True) -> VQSegmentedLinear:
    module = segmented_replacement(nn.Linear(150, 70, bias=bias), PLAN)
    module.set_weights(weights())
    return module


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(150,), (1, 150), (3, 5, 150)])
def test_it_computes_with_the_whole_decoded_weight(bias, shape):
    module, x = filled(bias), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    dense = weights().decode()
    assert torch.equal(module.weight, dense)
    expected = F.linear(x, dense, module.bias)
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
    with keep_decoded(module):
        torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)


def test_its_export_twins_compute_the_same():
    model = nn.Sequential(filled())
    x = torch.randn(3, 150, generator=torch.Generator().manual_seed(0))
    expected, named = model(x), repr(model)
    with export_twins(model):
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert "70x150, code=2,6,8@64+4,8,9@64+2,3,8" in repr(model)
    assert torch.equal(model(x), expected)
    assert repr(model) == named


def test_the_kernels_segments_are_these():
    """The op that takes all segments of a weight at once gives what the module's parts add up to."""
    module, x = filled(), torch.randn(4, 150, generator=torch.Generator().manual_seed(2))
    parts = module.parts
    codes = [order.device_from_checkpoint(p.codes, p.code, p.rows, p.columns) for p in parts]
    formats = [n for p in parts for n in (p.code.vector, p.code.shift, p.code.window, p.columns)]
    found = ops.linear(x, codes, [p.codebook for p in parts], [p.scales for p in parts], formats, 70, module.bias, 0)
    torch.testing.assert_close(found, module(x), rtol=1e-5, atol=1e-5)


def test_its_state_is_what_the_plan_names():
    model = nn.Module()
    model.inner = nn.Linear(150, 70)
    before = model.inner.bias.detach().clone()
    install_layers(model, (PLAN,))
    pieces = {f"{p.name}.{kind}" for p in PLAN.pieces for kind in ("codes", "scales")}
    codebooks = {f"mgvq_tables.{p.table}" for p in PLAN.pieces}
    assert set(model.state_dict()) == pieces | codebooks | {"inner.bias"}
    assert torch.equal(model.inner.bias, before)
    model.inner.set_weights(weights())
    check_values(model)
    for piece in PLAN.pieces:
        assert vq_modules(model)[piece.name].codebook_id == piece.table


def test_a_layer_in_segments_is_one_layer_and_several_modules():
    model = nn.Sequential(filled(), nn.Linear(70, 70))
    assert list(vq_layers(model)) == ["0"]
    assert list(vq_modules(model)) == ["0.segments.0", "0.segments.1", "0.segments.2"]
    assert vq_layers(model)["0"].code == PLAN.code


def test_dtypes_follow_the_model_and_the_format_stays():
    module = filled().to(torch.bfloat16)
    assert module(torch.ones(2, 150, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert {part.scales.dtype for part in module.parts} == {torch.float16}


def test_other_shapes_kinds_and_segments_are_refused():
    with pytest.raises(ShapeError, match="expected a linear of 70x150, found kind linear of"):
        segmented_replacement(nn.Linear(150, 71), PLAN)
    with pytest.raises(ShapeError, match="only linears are cut"):
        segmented_replacement(nn.Embedding(70, 150), LayerPlan(**(vars(PLAN) | {"kind": "embedding"})))
    other = LayerPlan(**(vars(PLAN) | {"code": "2,6,8@128+2,3,8"}))
    with pytest.raises(ShapeError, match=r"expected weights in segments 2,6,8@64.* found 2,6,8@128"):
        filled().set_weights(weights(other))
