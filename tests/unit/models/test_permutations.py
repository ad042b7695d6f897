"""Folded column permutations change no output; each of their places is needed; and they cover every layer's columns."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from published_models import INTERNVL_1B, QWEN2_VL_2B
from transformers import AutoModelForImageTextToText, InternVLConfig, InternVLForConditionalGeneration, Qwen2VLConfig

from toolchain.calibration.inputs import CalibrationInput, calibration_inputs
from toolchain.calibration.manifest import read_manifest
from toolchain.calibration.moments import collect_moments
from toolchain.models.configs import read_config
from toolchain.models.permutations import FreePermutation, apply_permutations, column_permutation
from toolchain.models.registry import family_for

TOLERANCE = 1e-10  # of the largest logit; float64 leaves 3e-15 over all permutations of these models
NEEDED = 1e-5  # a place left behind changes more than this; the least seen is 1.7e-4, a bias of the tiny Qwen2-VL

# The other choices a tower's config has (those of InternViT-6B among them), and a Llama whose heads are wider.
UNUSUAL = {
    "text_config": {
        "model_type": "llama",
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 64,
    },
    "vision_config": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "image_size": [56, 56],
        "patch_size": [14, 14],
        "norm_type": "rms_norm",
        "use_qk_norm": True,
        "attention_bias": True,
        "use_mean_pooling": False,
        "use_mask_token": True,
    },
    "image_token_id": 63,
}


class Loaded:
    """A model in float64, its family's free permutations, and inputs with and without images."""

    def __init__(self, config, model, inputs):
        self.config, self.family = config, family_for(config)
        self.model, self.inputs = model.double().eval(), inputs
        self.free = self.family.free_permutations(config)

    def logits(self, model=None):
        with torch.no_grad(), nothing_in_float32():
            found = [(model or self.model)(**_doubled(one.tensors), use_cache=False).logits for one in self.inputs]
        return torch.cat([x.flatten() for x in found])

    def permuted(self, free_permutations, permutations):
        model = copy.deepcopy(self.model)
        apply_permutations(model, permutations, free_permutations)
        return model


@contextmanager
def nothing_in_float32():
    """transformers' norms and rotary embeddings compute in float32 whatever the dtype; here they use float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def _doubled(tensors):
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}


@pytest.fixture(scope="module")
def unusual():
    torch.manual_seed(0)
    model = InternVLForConditionalGeneration(InternVLConfig(**UNUSUAL))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    ids = torch.tensor([[1, 2, 63, 63, 63, 63, 5, 9]])
    tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 56, 56)}
    return Loaded(model.config.to_dict(), model, [CalibrationInput(tensors, ids[0] == 63)])


@pytest.fixture(params=["tiny_qwen2_vl", "tiny_internvl", "unusual"])
def loaded(request, tiny_manifest):
    if request.param == "unusual":
        return request.getfixturevalue("unusual")
    folder = request.getfixturevalue(request.param)
    config = read_config(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64)
    processor = family_for(config).load_processor(folder)
    return Loaded(config, model, calibration_inputs(processor, read_manifest(tiny_manifest)[:1]))


def random_orders(free_permutations, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for free in free_permutations:
        units = [torch.randperm(free.unit, generator=generator) for _ in range(free.size // free.unit)]
        found[free.name] = torch.cat([first * free.unit + unit for first, unit in enumerate(units)])
    return found


def difference(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def test_all_orders_at_once_change_no_output(loaded):
    model = loaded.permuted(loaded.free, random_orders(loaded.free))
    found = difference(loaded.logits(model), loaded.logits())
    assert found < TOLERANCE, f"{found:.1e} of {TOLERANCE:.0e}"


def test_an_order_moves_its_readers_columns_and_no_other_layers(loaded):
    before = dict(loaded.model.named_parameters(remove_duplicate=False))
    permutations = random_orders(loaded.free)
    readers = {reader for free in loaded.free for reader in free.readers}
    for free in loaded.free:
        model = loaded.permuted(loaded.free, {free.name: permutations[free.name]})
        after = dict(model.named_parameters(remove_duplicate=False))
        rows = {place.parameter: place for place in free.places if place.axis == 0}
        for reader in readers:
            old, new = before[f"{reader}.weight"], after[f"{reader}.weight"]
            if reader in free.readers:
                expected = old[:, column_permutation(free, reader, permutations[free.name])]
                assert torch.equal(new, expected), reader
                assert not torch.equal(new, old), reader
            elif f"{reader}.weight" not in rows:
                assert torch.equal(new, old), reader


def test_every_place_is_needed(loaded):
    """With one place left behind the model computes something else, so none is there for nothing."""
    expected, permutations = loaded.logits(), random_orders(loaded.free)
    inert = []
    for free in loaded.free:
        model = loaded.permuted(loaded.free, {free.name: permutations[free.name]})
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for place in free.places:
            one = FreePermutation(free.name, free.size, free.unit, (), (place,))
            with torch.no_grad():
                moved = parameters[place.parameter].clone()
                apply_permutations(
                    Holder(place.parameter, parameters[place.parameter]), inverse(permutations, free), [one]
                )
                if difference(loaded.logits(model), expected) < NEEDED:
                    inert.append(place.parameter)
                parameters[place.parameter].copy_(moved)
    # A mask token is only read in training.
    assert [name for name in inert if not name.endswith("mask_token")] == []


class Holder(torch.nn.Module):
    """One parameter of a model under its own name."""

    def __init__(self, name, parameter):
        super().__init__()
        module = self
        *path, last = name.split(".")
        for part in path:
            module.add_module(part, torch.nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, parameter)


def inverse(permutations, free):
    return {free.name: permutations[free.name].argsort()}


def test_every_layers_columns_are_in_one_order_and_sizes_agree(loaded):
    check_coverage(loaded.family, loaded.config)


@pytest.mark.parametrize("config", [QWEN2_VL_2B, INTERNVL_1B], ids=["qwen2-vl-2b", "internvl-1b"])
def test_published_layouts_are_covered(config):
    check_coverage(family_for(config), config)


def check_coverage(family, config):
    specs, free_permutations = family.layers(config), family.free_permutations(config)
    readers = [reader for free in free_permutations for reader in free.readers]
    assert sorted(readers) == sorted(spec.name for spec in specs if spec.kind != "conv")
    columns = {spec.name: spec.columns for spec in specs}
    for free in free_permutations:
        assert free.size % free.unit == 0
        for reader in free.readers:
            assert free.size * free.reader_place(reader).repeats == columns[reader], (free.name, reader)
    assert len({free.name for free in free_permutations}) == len(free_permutations)
    places = [(place.parameter, place.axis) for free in free_permutations for place in free.places]
    assert len(set(places)) == len(places), "two permutations would permute the same axis"


@pytest.mark.parametrize("config", [QWEN2_VL_2B, INTERNVL_1B], ids=["qwen2-vl-2b", "internvl-1b"])
def test_published_models_have_every_place(config):
    """On the meta device: parameters and shapes only."""
    builder = Qwen2VLConfig if config["model_type"] == "qwen2_vl" else InternVLConfig
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(builder(**copy.deepcopy(config)))
    free_permutations = family_for(config).free_permutations(config)
    apply_permutations(model, {free.name: torch.arange(free.size) for free in free_permutations}, free_permutations)


def test_query_heads_of_a_key_head_share_its_order():
    free = next(
        f for f in family_for(QWEN2_VL_2B).free_permutations(QWEN2_VL_2B) if f.name.endswith("layers.3.self_attn")
    )
    assert (free.size, free.unit, free.reader_place(free.readers[0]).repeats) == (256, 128, 6)
    index = column_permutation(free, free.readers[0], random_orders([free])[free.name]).reshape(12, 128)
    within = index - 128 * torch.arange(12)[:, None]
    assert torch.equal(within, within[[0] * 6 + [6] * 6])
    assert not torch.equal(within[0], within[6])


def test_parameters_keep_identity_and_ties(loaded):
    model = copy.deepcopy(loaded.model)
    before = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    apply_permutations(model, random_orders(loaded.free), loaded.free)
    assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == before


def test_a_tied_head_is_moved_once(tiny_qwen2_vl):
    config = read_config(tiny_qwen2_vl)
    model = AutoModelForImageTextToText.from_pretrained(tiny_qwen2_vl, dtype=torch.float32)
    assert model.lm_head.weight is model.get_input_embeddings().weight, "the fixture's head is tied"
    before = model.lm_head.weight.detach().clone()
    free = next(f for f in family_for(config).free_permutations(config) if "lm_head" in f.readers)
    permutations = random_orders([free])
    apply_permutations(model, permutations, [free])
    assert torch.equal(model.lm_head.weight, before[:, permutations[free.name]])


def test_moments_follow_the_orders(loaded):
    layers = [spec for spec in loaded.family.layers(loaded.config) if spec.kind == "linear"]
    inputs = [CalibrationInput(_doubled(one.tensors), one.is_image) for one in loaded.inputs]
    before = collect_moments(loaded.model, inputs, layers)
    permutations = random_orders(loaded.free)
    after = collect_moments(loaded.permuted(loaded.free, permutations), inputs, layers)
    for free in loaded.free:
        for reader in set(free.readers) & set(before):
            index = column_permutation(free, reader, permutations[free.name])
            expected = before[reader].second_moment[index][:, index]
            torch.testing.assert_close(
                after[reader].second_moment, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
            )
