"""Every part of the method runs on a model, alone and together, and what it leaves is a checkpoint like any other."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from heard_progress import Stops

from toolchain.bits.bitplan import real_bits
from toolchain.calibration.gradients import answer_scores
from toolchain.calibration.inputs import calibration_inputs
from toolchain.calibration.manifest import read_manifest
from toolchain.checkpoint.loading import load_model, load_quantized
from toolchain.checkpoint.permuted import read_permutations
from toolchain.checkpoint.segmented import vq_layers
from toolchain.evaluate.layer_errors import checkpoint_layer_errors
from toolchain.models.configs import read_config
from toolchain.models.registry import family_for
from toolchain.quantize.checkpoint import quantize_checkpoint
from toolchain.quantize.driver.request import QuantizeSettings
from toolchain.quantize.mgvq.recipe import PARTS
from toolchain.values import SILENT
from toolchain.vq.weights import Options

FAST = Options(rounds=1, lloyd_rounds=2, samples=1_000)
CUTS = replace(FAST, segment_spread=1.0)  # every group is worth a look at its segments


def quantized(model, manifest, out, method, options=FAST, progress=SILENT, **limits):
    return quantize_checkpoint(
        model, read_manifest(manifest), out, QuantizeSettings(method=method, options=options, **limits), progress
    )


@pytest.fixture(scope="module")
def made(tiny_qwen2_vl, tiny_manifest, tmp_path_factory):
    """The tiny model quantized as asked for, once for all tests that ask for the same. Read only."""
    found = {}

    def make(method, bits=2.5, options=FAST, overrides=(), **limits):
        key = (method, bits, repr(options), tuple(overrides), repr(limits))
        if key not in found:
            folder = tmp_path_factory.mktemp("line") / "q"
            limits |= {"bits": bits, "overrides": overrides}
            found[key] = quantized(tiny_qwen2_vl, tiny_manifest, folder, method, options, **limits)
        return found[key]

    return make


# What is off by default is tried with plain codes, whose search is short; what overlapping codes do there is tested in
# the mathematics.
PARTLY = (
    "mgvq-mix",
    "mgvq-interleave",
    "mgvq+rotate",
    "mgvq-overlap",
    "mgvq-drift-bias",
    "mgvq-overlap+fisher+descent",
    "mgvq-overlap+rounds",
    "mgvq+tune",
    "mgvq+segments+sinkcap",
    "mgvq+fisher+sinkcap",
)


@pytest.mark.parametrize("method", PARTLY)
def test_a_recipe_gives_a_checkpoint_that_loads_and_computes(made, tiny_manifest, method):
    result = made(method, bits=2.0 if "mix" in method else 2.5)
    model = load_quantized(result.folder)
    one = calibration_inputs(
        family_for(read_config(result.folder)).load_processor(result.folder), read_manifest(tiny_manifest)
    )[0]
    with torch.no_grad():
        assert bool(torch.isfinite(answer_scores(model, one)).all())
    assert (result.folder / "orders.json").exists() == ("interleave" not in method)
    assert (result.folder / "sensitivity.json").exists() == ("mix" not in method)
    codes = {layer.code for layer in result.plan.layers}
    plain = {code for code in codes if code.split(",")[1] == code.split(",")[2]}
    assert (codes == plain) == ("overlap" in method)


def test_sensitivity_is_measured_for_every_group(made):
    result = made("mgvq")
    found = json.loads((result.folder / "sensitivity.json").read_text())
    groups = {layer.group for layer in result.plan.layers}
    assert groups == set(found["measured"]) == set(found["fisher"]) == set(found["local"])
    assert all(value >= 0 for values in (found["measured"], found["fisher"]) for value in values.values())
    for losses in found["local"].values():
        assert losses["2,3,8"] > losses["2,4,8"] > losses["2,5,8"] > losses["2,6,8"] > losses["2,8,9"]


def test_a_budget_is_kept(made):
    budget = real_bits(made("mgvq").plan)["total"].bytes
    kept = made("mgvq-drift", bits=None, budget_bytes=budget)
    assert real_bits(kept.plan)["total"].bytes <= budget


def test_tuning_brings_the_answers_nearer(made):
    result = made("mgvq+tune")
    tuned = json.loads((result.folder / "refinement.json").read_text())["tune"]
    assert tuned["loss_after"] <= tuned["loss_before"]
    assert tuned["improved"] == (tuned["loss_after"] < tuned["loss_before"])


def test_groups_are_cut_where_it_pays(tiny_with_loud_columns, tiny_manifest, tmp_path):
    """With every group worth a look the plan, the layers, what is stored and what is reported agree."""
    # Not interleaved: vectors that mix high-energy columns and low-energy ones leave cutting little to gain.
    result = quantized(
        tiny_with_loud_columns, tiny_manifest, tmp_path / "q", "mgvq+segments-interleave", CUTS, bits=2.4
    )
    found = json.loads((result.folder / "sensitivity.json").read_text())
    groups = {layer.group for layer in result.plan.layers if layer.name.endswith("down_proj")}
    assert groups <= set(found["units"])
    assert set(found["segmented"]) == set(found["units"])
    cut = [layer for layer in result.plan.layers if layer.segments]
    assert cut, "no group of this model is worth cutting: the test says nothing"
    assert result.plan.index_bits() <= 2.4
    codes = {layer.name: layer.code for layer in result.layers}
    for layer in cut:
        assert codes[layer.name] == layer.code
        assert layer.code in found["segmented"][layer.group]
    model = load_quantized(result.folder)
    assert {name: module.code for name, module in vq_layers(model).items() if "+" in str(module.code)} == {
        layer.name: layer.code for layer in cut
    }


def test_rounds_leave_layers_that_no_loss_reaches_as_they_are(made, tiny_qwen2_vl, tiny_manifest):
    """Of random weights an image says next to nothing: what a round does to the tower is noise, and stays small."""
    result = made("mgvq-overlap+rounds")
    assert json.loads((result.folder / "refinement.json").read_text())["rounds"][0]["changed"] > 0
    assert all(one["error_both"] < 0.1 for one in errors_of(result, tiny_qwen2_vl, tiny_manifest))


def errors_of(result, model, manifest):
    """Layer errors of a quantized checkpoint against the float one, its columns put in the same order."""
    samples, permutations = read_manifest(manifest), read_permutations(result.folder)
    return checkpoint_layer_errors(model, load_quantized(result.folder), samples, SILENT, permutations)


@pytest.mark.parametrize("method", ["mgvq+rotate+segments", "mgvq+rotate+descent+tune-interleave-overlap"])
def test_rotated_inputs_go_through_every_part(made, tiny_qwen2_vl, tiny_manifest, method):
    """With every rotation said to pay, plan, checkpoint, reports and the loaded model agree."""
    options = replace(CUTS, rotation_gain=100.0)
    result = made(method, 2.3 if "overlap" not in method else 2.5, options)
    tried = json.loads((result.folder / "rotations.json").read_text())
    rotated = {layer.name: layer.rotation for layer in result.plan.layers if layer.rotation}
    assert rotated
    assert {layer.group for layer in result.plan.layers if layer.rotation} == set(tried)
    assert not any(layer.rotation and (layer.segments or layer.kind != "linear") for layer in result.plan.layers)
    model = load_quantized(result.folder)
    assert {name: m.rotation for name, m in vq_layers(model).items() if getattr(m, "rotation", 0)} == rotated
    # Turned back, the weights are those that full precision has, its columns interleaved.
    errors = errors_of(result, tiny_qwen2_vl, tiny_manifest)
    assert all(0 < one["error_both"] < 0.5 for one in errors if one["name"] in rotated)


OVERRIDE = ("*.layers.0.mlp.down_proj", "2,8,9@64+2,3,8")


@pytest.mark.parametrize("method", ["mgvq", "mgvq-drift-interleave", "mgvq+descent-overlap"])
def test_a_layer_is_cut_by_order(made, method):
    """Its columns of most energy come first, and it is nearer its original than in the coarser code alone."""
    whole = made(method, overrides=((OVERRIDE[0], "2,3,8"),))
    result = made(method, overrides=(OVERRIDE,))
    (name,) = [layer.name for layer in result.plan.layers if layer.segments]
    errors = [{x.name: x.relative_error for x in one.layers}[name] for one in (whole, result)]
    assert errors[1] < errors[0]
    assert "orders.json" in {path.name for path in result.folder.iterdir()}


def test_a_cut_layer_is_resumed_and_gives_the_same_bytes(made, tiny_qwen2_vl, tiny_manifest, tmp_path):
    settings = {"method": "mgvq", "bits": 2.5, "overrides": (OVERRIDE,)}
    whole = made("mgvq", overrides=(OVERRIDE,))
    last = next(layer.name for layer in whole.plan.layers if layer.segments)

    with pytest.raises(KeyboardInterrupt):
        quantized(tiny_qwen2_vl, tiny_manifest, tmp_path / "again", progress=Stops(name=last), **settings)
    again = quantized(tiny_qwen2_vl, tiny_manifest, tmp_path / "again", resume="required", **settings)
    for name in ("model.safetensors", "bitplan.json", "orders.json"):
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name


def test_rounds_and_tuning_take_segments(made):
    result = made("mgvq-overlap+rounds+tune", overrides=(OVERRIDE,))
    tuned = json.loads((result.folder / "refinement.json").read_text())["tune"]
    assert tuned["loss_after"] <= tuned["loss_before"]


def test_modalities_are_reported_for_every_group(made):
    result = made("mgvq")
    found = json.loads((result.folder / "sensitivity.json").read_text())
    parts = {layer.group: layer.part for layer in result.plan.layers if not layer.tied_to}
    for group, losses in found["modal"].items():
        expected = {"language": {"text", "image"}, "embedding": {"text"}}.get(parts[group], {"image"})
        assert set(losses) == expected, group
        if len(losses) == 1:
            assert losses[expected.pop()]["fisher"] == pytest.approx(found["fisher"][group], rel=1e-6)


def test_recipe_parts_are_all_tried_above():
    assert {part for name in PARTLY for part in re.findall("[a-z]+", name)[1:]} == set(PARTS)


def test_the_float_model_is_not_touched(tiny_qwen2_vl, tiny_manifest, tmp_path):
    before = {name: tensor.clone() for name, tensor in load_model(tiny_qwen2_vl).state_dict().items()}
    quantized(tiny_qwen2_vl, tiny_manifest, tmp_path / "q", "mgvq-mix-overlap", bits=2.0)
    assert all(torch.equal(t, before[name]) for name, t in load_model(tiny_qwen2_vl).state_dict().items())
