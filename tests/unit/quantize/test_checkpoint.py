"""Quantizing, storing and loading the tiny model: what is written is what was optimised, and loads whole or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from heard_progress import Heard, Stops
from safetensors.torch import load_file, save_file

from toolchain.bits.bitplan import real_bits
from toolchain.calibration.manifest import read_manifest
from toolchain.checkpoint.folder import open_checkpoint
from toolchain.checkpoint.loading import load_any, load_model, load_quantized
from toolchain.checkpoint.modules import vq_modules
from toolchain.checkpoint.permuted import load_permuted, read_permutations
from toolchain.errors import InputDataError, UsageError
from toolchain.models.registry import family_for
from toolchain.quantize.checkpoint import quantize_checkpoint
from toolchain.quantize.driver.request import QuantizeSettings
from toolchain.quantize.driver.sequence import group_generator
from toolchain.values import SILENT, BitPlan
from toolchain.vq.weights import Options

FAST = Options(rounds=1, lloyd_rounds=3, samples=2_000)


def quantize(model, manifest, out, progress=SILENT, **settings):
    return quantize_checkpoint(
        model, read_manifest(manifest), out, QuantizeSettings(options=FAST, **settings), progress
    )


@pytest.fixture(scope="module")
def quantized(tiny_qwen2_vl, tiny_manifest, tmp_path_factory):
    return quantize(tiny_qwen2_vl, tiny_manifest, tmp_path_factory.mktemp("q") / "out", bits=2.3)


@pytest.fixture
def copied(quantized, tmp_path):
    return shutil.copytree(quantized.folder, tmp_path / "copy")


def model_inputs(folder, manifest, index=0):
    config = json.loads((Path(folder) / "config.json").read_text())
    sample = read_manifest(manifest)[index]
    return family_for(config).load_processor(Path(folder)).model_inputs(sample)


def test_everything_is_quantized_and_said(quantized):
    layers = {layer.name for layer in quantized.plan.layers if not layer.tied_to}
    assert {result.name for result in quantized.layers} == layers
    assert all(0 < result.relative_error < 0.5 for result in quantized.layers)
    assert quantized.plan.index_bits() <= 2.3
    stored = json.loads((quantized.folder / "bitplan.json").read_text())
    assert BitPlan.from_json(stored) == quantized.plan
    per_layer = json.loads((quantized.folder / "layers.json").read_text())["layers"]
    assert [entry["name"] for entry in per_layer] == [result.name for result in quantized.layers]
    config = json.loads((quantized.folder / "config.json").read_text())["quantization_config"]
    assert set(config) >= {"quant_method", "format_version", "tool_version", "layers", "bits", "calibration"}
    assert config["calibration"]["samples"] == 6


def test_the_file_holds_what_the_plan_counts(quantized):
    tensors = load_file(quantized.folder / "model.safetensors")
    assert not any(name.startswith("lm_head") for name in tensors)
    kept = {name: t for name, t in tensors.items() if name in quantized.plan.kept}
    assert {t.dtype for t in kept.values()} == {torch.float16}
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == real_bits(quantized.plan)["total"].bytes
    assert set(quantized.plan.codebooks()) == {n.rpartition(".")[2] for n in tensors if n.startswith("mgvq_tables.")}


def permuted_base(folder, quantized):
    """The float model with its columns where the quantized one has them."""
    config = json.loads((Path(folder) / "config.json").read_text())
    return load_permuted(open_checkpoint(folder), family_for(config), read_permutations(quantized.folder))


def test_kept_tensors_are_the_base_models_but_for_corrected_biases(quantized, tiny_qwen2_vl):
    dense, loaded = permuted_base(tiny_qwen2_vl, quantized), load_quantized(quantized.folder)
    layers = {layer.name for layer in quantized.plan.layers}
    corrected = {name for name in quantized.plan.kept if name.rpartition(".")[0] in layers}
    for name in set(quantized.plan.kept) - corrected:
        assert torch.equal(loaded.get_parameter(name), dense.get_parameter(name))
    moved = [n for n in corrected if not torch.equal(loaded.get_parameter(n), dense.get_parameter(n))]
    assert moved, "no bias was corrected"


def test_columns_are_interleaved_and_the_file_says_how(quantized, tiny_qwen2_vl):
    permutations = read_permutations(quantized.folder)
    assert permutations
    assert any(order.tolist() != sorted(order.tolist()) for order in permutations.values())
    plain = load_model(tiny_qwen2_vl).state_dict()
    assert any(
        not torch.equal(w, plain[name]) for name, w in permuted_base(tiny_qwen2_vl, quantized).state_dict().items()
    )


def test_loaded_weights_are_near_the_dense_ones(quantized, tiny_qwen2_vl):
    dense, loaded = permuted_base(tiny_qwen2_vl, quantized), vq_modules(load_quantized(quantized.folder))
    for layer in quantized.plan.layers:
        weight = dense.get_submodule(layer.name).weight
        weight, decoded = weight.detach(), loaded[layer.name].weight
        assert decoded.shape == weight.shape
        assert float((decoded - weight).norm()) < 0.8 * float(weight.norm())


def test_head_and_embedding_are_one(quantized):
    model = load_quantized(quantized.folder)
    assert model.lm_head.codes is model.get_input_embeddings().codes
    assert model.lm_head.scales is model.get_input_embeddings().scales


def test_the_quantized_model_computes_nearly_the_same(quantized, tiny_qwen2_vl, tiny_manifest):
    inputs = model_inputs(quantized.folder, tiny_manifest)
    with torch.no_grad():
        expected = load_model(tiny_qwen2_vl)(**inputs).logits
        found = load_any(quantized.folder)(**inputs).logits
    assert float((found - expected).norm()) < 0.6 * float(expected.norm())


def test_same_seed_same_bytes(quantized, tiny_qwen2_vl, tiny_manifest, tmp_path):
    again = quantize(tiny_qwen2_vl, tiny_manifest, tmp_path / "again", bits=2.3)
    other = quantize(tiny_qwen2_vl, tiny_manifest, tmp_path / "other", bits=2.3, seed=1)
    weights = (quantized.folder / "model.safetensors").read_bytes()
    assert (again.folder / "model.safetensors").read_bytes() == weights
    assert (other.folder / "model.safetensors").read_bytes() != weights


def test_generators_differ_by_group_and_seed():
    draws = {float(torch.rand(1, generator=group_generator(s, g))) for s in (0, 1) for g in ("a", "b")}
    assert len(draws) == 4


def test_sweeping_beats_the_baselines(quantized, tiny_qwen2_vl, tiny_manifest, tmp_path):
    means = {}
    for method in ("mgvq", "nearest", "rtn"):
        result = quantize(tiny_qwen2_vl, tiny_manifest, tmp_path / method, method=method)
        means[method] = sum(layer.relative_error for layer in result.layers) / len(result.layers)
        load_quantized(result.folder)
    assert means["mgvq"] < 0.6 * means["nearest"]
    assert means["nearest"] < means["rtn"]


def test_progress_is_reported_layer_by_layer(tiny_qwen2_vl, tiny_manifest, tmp_path):
    heard = Heard()
    result = quantize(tiny_qwen2_vl, tiny_manifest, tmp_path / "o", heard, method="rtn")
    assert [done for done, _, _ in heard.layers] == list(range(1, len(heard.layers) + 1))
    assert {total for _, total, _ in heard.layers} == {len(heard.layers)}
    assert [name for _, _, name in heard.layers] == [layer.name for layer in result.layers]


def test_an_untied_internvl_goes_the_same_way(tiny_internvl, tiny_manifest, tmp_path):
    result = quantize(tiny_internvl, tiny_manifest, tmp_path / "out")
    model = load_quantized(result.folder)
    assert model.lm_head.codes is not model.get_input_embeddings().codes
    inputs = model_inputs(result.folder, tiny_manifest)
    with torch.no_grad():
        assert bool(torch.isfinite(model(**inputs).logits).all())


def test_a_used_output_is_refused_before_work(tiny_qwen2_vl, tiny_manifest, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        quantize(tiny_qwen2_vl, tiny_manifest, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failure_leaves_no_checkpoint(tiny_qwen2_vl, tiny_manifest, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_qwen2_vl, tiny_manifest, tmp_path / "out", Stops(layers_done=1), method="rtn")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"], "only what a later run goes on with"


def test_quantizing_twice_is_refused(quantized, tiny_manifest, tmp_path):
    with pytest.raises(UsageError, match="is quantized already"):
        quantize(quantized.folder, tiny_manifest, tmp_path / "out")


def rewrite(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


CODES = "model.language_model.layers.0.mlp.down_proj.codes"
SCALES = "model.visual.blocks.1.attn.qkv.scales"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(CODES), f"lacks 1 tensors .{CODES}"),
        (lambda t: t.pop("model.language_model.norm.weight"), "lacks 1 tensors"),
        (lambda t: t.pop("mgvq_tables.t0"), r"lacks 1 tensors .mgvq_tables\.t0"),
        (lambda t: t.update(extra=torch.zeros(1)), "has, but the architecture does not, 1 tensors .extra"),
        (lambda t: t.update({CODES: t[CODES][:-1].clone()}), rf"{CODES}: expected U8\[\d+\], found U8"),
        (lambda t: t.update({SCALES: t[SCALES].float()}), rf"{SCALES}: expected F16\[96\], found F32\[96\]"),
        (lambda t: t[SCALES].fill_(float("nan")), r"qkv\.scales: expected finite values"),
        (lambda t: t[SCALES].fill_(-1), r"qkv\.scales: expected finite values of at least 0"),
        (
            lambda t: t.update({"mgvq_tables.t0": t["mgvq_tables.t0"][:128].clone()}),
            r"expected (I8|F16)\[\d+, \d\], found",
        ),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(copied, change, message):
    rewrite(copied, change)
    with pytest.raises(InputDataError, match=message):
        load_quantized(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(format_version=2), "weight format version 2, this mgvq reads 1"),
        (lambda q: q.update(quant_method="gptq"), "not an mgvq checkpoint"),
        (lambda q: q.update(layers={}), "names no layers"),
        (lambda q: q["layers"]["lm_head"].pop("code"), r"layer lm_head: keys \['code'\] are missing"),
        (lambda q: q["layers"].update(nobody=q["layers"]["lm_head"]), "layer nobody .* no such module"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(copied, change, message):
    path = copied / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))
    with pytest.raises(InputDataError, match=message):
        load_quantized(copied)


def test_a_float_checkpoint_that_is_not_whole_is_refused(tiny_qwen2_vl, tmp_path):
    folder = shutil.copytree(tiny_qwen2_vl, tmp_path / "copy")
    rewrite(folder, lambda t: t.pop(next(name for name in t if name.endswith("o_proj.weight"))))
    with pytest.raises(InputDataError, match=r"lacks 1 tensors .*o_proj\.weight"):
        load_model(folder)
