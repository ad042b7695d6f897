"""Every part of the method runs on a model, alone and together, and what it leaves is a checkpoint like any other."""

from __future__ import annotations

import json
import re

import pytest
import torch

from toolchain.calibration import calibration_inputs, read_manifest
from toolchain.checkpoint import load_model, load_quantized
from toolchain.models.family import family_for, read_config
from toolchain.quantize import quantize_checkpoint
from toolchain.recipe import PARTS
from toolchain.statistics import answer_scores
from toolchain.vq.weights import Options

FAST = Options(rounds=1, lloyd_rounds=2, samples=1_000)


def quantized(model, manifest, out, method, **limits):
    return quantize_checkpoint(model, read_manifest(manifest), out, method=method, options=FAST, **limits)


PARTLY = ("mgvq-mix", "mgvq-deal", "mgvq-overlap", "mgvq-drift-bias", "mgvq+fisher+descent", "mgvq+rounds", "mgvq+tune")


@pytest.mark.parametrize("method", PARTLY)
def test_a_recipe_gives_a_checkpoint_that_loads_and_computes(tiny_qwen2_vl, tiny_manifest, tmp_path, method):
    result = quantized(tiny_qwen2_vl, tiny_manifest, tmp_path / "q", method, bits=2.0 if "mix" in method else 2.3)
    model = load_quantized(result.folder)
    one = calibration_inputs(
        family_for(read_config(result.folder)).load_processor(result.folder), read_manifest(tiny_manifest)
    )[0]
    with torch.no_grad():
        assert bool(torch.isfinite(answer_scores(model, one)).all())
    assert (result.folder / "orders.json").exists() == ("deal" not in method)
    assert (result.folder / "sensitivity.json").exists() == ("mix" not in method)
    codes = {layer.code for layer in result.plan.layers}
    plain = {code for code in codes if code.split(",")[1] == code.split(",")[2]}
    assert (codes == plain) == ("overlap" in method)


def test_sensitivity_is_measured_for_every_group(tiny_qwen2_vl, tiny_manifest, tmp_path):
    result = quantized(tiny_qwen2_vl, tiny_manifest, tmp_path / "q", "mgvq", bits=2.5)
    found = json.loads((result.folder / "sensitivity.json").read_text())
    groups = {layer.group for layer in result.plan.layers}
    assert groups == set(found["measured"]) == set(found["fisher"]) == set(found["local"])
    assert all(value >= 0 for values in (found["measured"], found["fisher"]) for value in values.values())
    for losses in found["local"].values():
        assert losses["2,3,8"] > losses["2,4,8"] > losses["2,5,8"] > losses["2,6,8"] > losses["2,8,9"]


def test_a_budget_is_kept(tiny_qwen2_vl, tiny_manifest, tmp_path):
    from toolchain.bitplan import real_bits

    free = quantized(tiny_qwen2_vl, tiny_manifest, tmp_path / "free", "mgvq-drift", bits=3.0)
    budget = real_bits(free.plan)["total"].bytes
    kept = quantized(tiny_qwen2_vl, tiny_manifest, tmp_path / "kept", "mgvq-drift", bits=None, budget_bytes=budget)
    assert real_bits(kept.plan)["total"].bytes <= budget


def test_tuning_brings_the_answers_nearer(tiny_qwen2_vl, tiny_manifest, tmp_path):
    result = quantized(tiny_qwen2_vl, tiny_manifest, tmp_path / "q", "mgvq+tune", bits=2.0)
    tuned = json.loads((result.folder / "mended.json").read_text())["tune"]
    assert tuned["loss_after"] <= tuned["loss_before"]
    assert tuned["improved"] == (tuned["loss_after"] < tuned["loss_before"])


def test_recipe_parts_are_all_tried_above():
    assert {part for name in PARTLY for part in re.findall("[a-z]+", name)[1:]} == set(PARTS)


def test_the_float_model_is_not_touched(tiny_qwen2_vl, tiny_manifest, tmp_path):
    before = {name: tensor.clone() for name, tensor in load_model(tiny_qwen2_vl).state_dict().items()}
    quantized(tiny_qwen2_vl, tiny_manifest, tmp_path / "q", "mgvq", bits=2.0)
    assert all(torch.equal(t, before[name]) for name, t in load_model(tiny_qwen2_vl).state_dict().items())
