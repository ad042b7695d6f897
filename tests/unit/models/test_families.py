"""What a family says of a model is what the model is; the three graphs answer as `generate` does."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText

from toolchain.calibration.manifest import read_manifest
from toolchain.device.families.base import open_image
from toolchain.device.generation.answer import greedy
from toolchain.errors import UnsupportedError, UsageError
from toolchain.models.configs import read_config
from toolchain.models.inventory import kept_elements
from toolchain.models.registry import family_for
from toolchain.models.runner import torch_graphs

WEIGHTED = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv2d, torch.nn.Conv3d)


@pytest.fixture(params=["tiny_qwen2_vl", "tiny_internvl"])
def loaded(request):
    folder = request.getfixturevalue(request.param)
    config = read_config(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return folder, config, family_for(config), model


def test_layers_are_the_models_own(loaded):
    _, config, family, model = loaded
    modules = dict(model.named_modules())
    specs = family.layers(config)
    for spec in specs:
        weight = modules[spec.name].weight
        assert (weight.shape[0], weight[0].numel()) == (spec.rows, spec.columns), spec
        assert (getattr(modules[spec.name], "bias", None) is not None) == spec.has_bias, spec
    uncovered = [n for n, m in modules.items() if isinstance(m, WEIGHTED) and n not in {s.name for s in specs}]
    assert uncovered == []
    assert [s.order for s in specs] == sorted(s.order for s in specs)


def test_layers_and_kept_are_every_parameter_once(loaded):
    folder, config, family, model = loaded
    specs = family.layers(config)
    stored = sum(s.rows * s.columns for s in specs if not s.tied_to)
    assert stored + sum(kept_elements(folder, specs).values()) == sum(p.numel() for p in model.parameters())


def test_groups_share_their_input_width(loaded):
    _, config, family, _ = loaded
    groups: dict[str, set[int]] = {}
    for spec in family.layers(config):
        groups.setdefault(spec.group, set()).add(spec.columns)
    assert all(len(widths) == 1 for widths in groups.values())


def test_graphs_answer_as_generate_does(loaded, tiny_manifest):
    folder, _, family, model = loaded
    processor = family.load_processor(folder)
    samples = read_manifest(tiny_manifest)[:3]
    expected = []
    for sample in samples:
        inputs = processor.model_inputs(sample)
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        expected.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
    host, graphs = processor.host, torch_graphs(family, model)
    prompts = [host.prepare(open_image(s.image), s.prompt) for s in samples]
    assert [greedy(host, graphs, [p], 8)[0] for p in prompts] == expected
    assert greedy(host, graphs, prompts, 8) == expected, "batched, padded on the left"


def test_context_is_a_limit(loaded, tiny_manifest):
    folder, _, family, model = loaded
    host = family.load_processor(folder).host
    prompt = host.prepare(None, "Read row 1.")
    with pytest.raises(UsageError, match="exceed the context of"):
        greedy(host, torch_graphs(family, model), [prompt], 100_000)


def test_unknown_architecture_names_the_known_ones():
    with pytest.raises(
        UnsupportedError, match=r"model_type 'moondream1' is not supported; mgvq knows \['internvl', 'qwen2_vl'\]"
    ):
        family_for({"model_type": "moondream1"})


def test_unknown_decoder_inside_internvl_is_refused(tiny_internvl):
    config = read_config(tiny_internvl)
    config["text_config"]["model_type"] = "internlm2"
    with pytest.raises(UnsupportedError, match="'internlm2' is not supported inside InternVL"):
        family_for(config).layers(config)
