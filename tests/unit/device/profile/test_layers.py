"""Layer times by module: names of every backend find their module, and rows always sum to the whole."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolchain.device.profile.layers import (
    HOST,
    UNATTRIBUTED,
    LayerTime,
    block_of,
    module_of,
    origins_from_inspector,
    part_of,
    tally,
)

LAYER = "model.language_model.layers.3"


@pytest.mark.parametrize(
    ("layer", "module"),
    [
        (f"{LAYER}.self_attn.q_proj+k_proj+v_proj", f"{LAYER}.self_attn.q_proj+k_proj+v_proj"),
        (f"{LAYER}.self_attn/Softmax_0", f"{LAYER}.self_attn"),
        (f"{LAYER}.self_attn/MatMul_0/MatMulScaleFusion/", f"{LAYER}.self_attn"),
        ("decoder/Shape_0", "decoder"),
        ("lm_head", "lm_head"),
        (f"PWN({LAYER}.mlp/Sigmoid_0, {LAYER}.mlp/Mul_0)", f"{LAYER}.mlp"),
        (f"PWN(PWN({LAYER}.mlp/Sigmoid_0), {LAYER}.mlp/Mul_0)", f"{LAYER}.mlp"),
        (f"{LAYER}.mlp/Mul_0 + {LAYER}.input_layernorm/Pow_0", LAYER),
        (f"{{ForeignNode[{LAYER}.self_attn/Add_0...{LAYER}.self_attn/Mul_9]}}", f"{LAYER}.self_attn"),
        (f"Reformatting CopyNode for Input Tensor 0 to {LAYER}.mlp.down_proj", f"{LAYER}.mlp.down_proj"),
        (f"decoder/Cast_1 + {LAYER}.mlp/Mul_0", f"{LAYER}.mlp"),
        ("decoder/Cast_1 + decoder/Shape_0", "decoder"),
        ("model.visual.merger.mlp.0/Add_0 + model.language_model.embed_tokens", ""),
        (f"{LAYER}.mlp/Mul_0 + lm_head", ""),
        ("__myl_MulAddSum_myl0_12", ""),
        ("Transpose_token_57", ""),
        ("Reformatting CopyNode for Output Tensor 0", ""),
    ],
)
def test_module_of(layer, module):
    assert module_of(layer) == module


def test_origins_name_what_a_layers_own_name_does_not():
    information = {
        "Layers": [
            {
                "Name": "__myl_Fc_myl0_3",
                "Metadata": f"[ONNX Layer: {LAYER}.mlp/Mul_0]\x1e[ONNX Layer: {LAYER}.mlp/Add_0]",
            },
            {"Name": "copy", "Metadata": ""},
        ]
    }  # fmt: skip
    origins = origins_from_inspector(json.dumps(information))
    assert origins == {"__myl_Fc_myl0_3": (f"{LAYER}.mlp/Mul_0", f"{LAYER}.mlp/Add_0")}
    assert module_of("__myl_Fc_myl0_3", origins["__myl_Fc_myl0_3"]) == f"{LAYER}.mlp"
    assert module_of("copy") == ""
    assert module_of("__myl_Fc_myl0_4", ("decoder/Cast_1", f"{LAYER}.mlp/Mul_0")) == f"{LAYER}.mlp"


def test_an_engine_without_layer_details_has_no_origins():
    assert origins_from_inspector({"Layers": ["a", "b"]}) == {}
    with pytest.raises(ValueError, match="list of Layers"):
        origins_from_inspector("[]")


@pytest.mark.parametrize(
    ("module", "part"),
    [
        (f"{LAYER}.self_attn.q_proj+k_proj+v_proj", "attention"),
        (f"{LAYER}.self_attn.q_norm", "attention"),
        (f"{LAYER}.mlp.gate_proj+up_proj", "mlp"),
        (f"{LAYER}.input_layernorm", "norm"),
        ("model.visual.blocks.0.attn.qkv", "vision attention"),
        ("model.visual.blocks.0.norm1", "vision norm"),
        ("model.visual.patch_embed.proj", "vision other"),
        ("model.visual.merger.mlp.0", "projector"),
        ("model.vision_tower.encoder.layer.1.mlp.fc1", "vision mlp"),
        ("model.multi_modal_projector.linear_1", "projector"),
        ("model.language_model.embed_tokens", "embedding"),
        ("model.language_model.rotary_emb", "rotary"),
        ("lm_head", "head"),
        ("decoder", "graph"),
    ],
)
def test_part_of(module, part):
    assert part_of(module) == part


def test_block_of():
    assert block_of(f"{LAYER}.mlp.down_proj") == LAYER
    assert block_of("model.visual.blocks.11.attn") == "model.visual.blocks.11"
    assert block_of("model.language_model.norm") == "model.language_model.norm"


def test_a_case_worked_by_hand():
    layers = [
        LayerTime(f"{LAYER}.mlp/Mul_0", 1.0),
        LayerTime(f"{LAYER}.mlp.down_proj", 2.0),
        LayerTime(f"{LAYER}.self_attn/Add_0", 0.5),
        LayerTime("Transpose_token_1", 0.25),
    ]
    found = tally([(6.0, 5.0, layers), (8.0, 7.0, layers)])
    assert (found.total_ms, found.runs) == (7.0, 2)
    assert [(row.name, row.ms, row.layers) for row in found.by_part] == [
        ("mlp", 3.0, 2.0),
        ("attention", 0.5, 1.0),
        (UNATTRIBUTED, 2.5, 1.0),
        (HOST, 1.0, 0.0),
    ]
    assert [row.name for row in found.by_block] == [LAYER, UNATTRIBUTED, HOST]
    assert found.by_block[0].part == "several"
    assert [row.name for row in found.by_module][:2] == [f"{LAYER}.mlp.down_proj", f"{LAYER}.mlp"]


@given(
    st.lists(
        st.tuples(
            st.floats(0, 100),
            st.floats(0, 100),
            st.lists(st.tuples(st.sampled_from([f"{LAYER}.mlp/A", "lm_head", "?", "a.b.0.c"]), st.floats(0, 10))),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_rows_sum_to_the_phase_at_every_grain(runs):
    found = tally([(total, inside, [LayerTime(*pair) for pair in layers]) for total, inside, layers in runs])
    for rows in (found.by_module, found.by_block, found.by_part):
        assert sum(row.ms for row in rows) == pytest.approx(sum(run[0] for run in runs) / len(runs), abs=1e-9)
        assert [row.name for row in rows[-2:]] == [UNATTRIBUTED, HOST]
        assert len({row.name for row in rows}) == len(rows)
