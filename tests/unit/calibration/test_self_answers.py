"""Calibration lines without an answer get the model's own: greedy, bounded, kept, used as if they had been written."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from heard_progress import Heard, Stops
from safetensors.torch import load_file, save_file

from toolchain import demo
from toolchain.calibration import self_answers as answering
from toolchain.calibration.inputs import calibration_inputs
from toolchain.calibration.manifest import read_manifest
from toolchain.calibration.self_answers import answered
from toolchain.checkpoint.loading import load_model
from toolchain.files.store import ObjectStore
from toolchain.models.configs import read_config
from toolchain.models.registry import family_for
from toolchain.models.runner import torch_graphs
from toolchain.quantize.checkpoint import quantize_checkpoint
from toolchain.quantize.driver.request import QuantizeSettings
from toolchain.values import ANSWER_TOKENS
from toolchain.vq.weights import Options

FAST = Options(rounds=1, lloyd_rounds=2, samples=1_000)
TOKENS = 5


@pytest.fixture(scope="module")
def talker(tiny_qwen2_vl, tmp_path_factory):
    """Folder of the tiny checkpoint with nothing but words to say: its likeliest token is half of a character."""
    folder = shutil.copytree(tiny_qwen2_vl, tmp_path_factory.mktemp("talker") / "model")
    host = family_for(read_config(folder)).load_processor(folder).host
    tensors = load_file(folder / "model.safetensors")
    (name,) = [name for name in tensors if name.endswith("embed_tokens.weight")]
    mute = [token for token in range(len(tensors[name])) if not host.decode([token]).isalpha()]
    tensors[name][mute] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def case(talker):
    """(family, processor, model, graphs) of that checkpoint, in float32 on the CPU."""
    family = family_for(read_config(talker))
    model = load_model(talker)
    return family, family.load_processor(talker), model, torch_graphs(family, model)


@pytest.fixture
def bare(tiny_manifest):
    """The manifest's samples; the first and the last keep their answers."""
    samples = read_manifest(tiny_manifest)
    return [samples[0], *(replace(one, answer=None) for one in samples[1:-1]), samples[-1]]


def never():
    raise AssertionError("the model was asked")


def slow_answer(processor, model, sample, most_tokens):
    """Token after token with the whole sequence given again, by transformers' own forward pass."""
    host, ids = processor.host, []
    inputs = processor.model_inputs(sample)
    for _ in range(most_tokens):
        with torch.no_grad():
            token = int(model(**inputs, use_cache=False).logits[0, -1].argmax())
        ids.append(token)
        if token in host.stop_ids:
            break
        one = torch.tensor([[token]])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], one], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if "mm_token_type_ids" in inputs:
            kinds = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(one, dtype=torch.int32)], dim=1)
            inputs["mm_token_type_ids"] = kinds
    return host.decode(ids)


def test_answers_are_the_likeliest_tokens_one_after_another():
    """The demo's model, asked eight of its questions: what the slow way gives, cut off where it is longer."""
    family = family_for(read_config(demo.MODEL))
    processor, model = family.load_processor(demo.MODEL), load_model(demo.MODEL)
    asked = [replace(one, answer=None) for one in read_manifest(demo.CALIBRATION)[:8]]
    found = answered(processor.host, lambda: torch_graphs(family, model), asked, TOKENS)
    expected = [slow_answer(processor, model, sample, TOKENS) for sample in asked]
    assert [one.answer for one in found] == expected
    assert len(set(expected)) > 3, "a model that always says the same would tell little"
    short = answered(processor.host, lambda: torch_graphs(family, model), asked, 1)
    assert all(len(processor.host.encode(one.answer)) <= 1 for one in short)
    assert [one.answer for one in short] != expected


def test_lines_with_answers_keep_them(case, bare):
    _, processor, _, graphs = case
    found = answered(processor.host, lambda: graphs, bare, TOKENS)
    assert [found[0], found[-1]] == [bare[0], bare[-1]]
    assert all(one.answer for one in found)
    assert [(one.image, one.prompt) for one in found] == [(one.image, one.prompt) for one in bare]


def test_batches_change_no_answer_and_are_told(case, bare, monkeypatch):
    _, processor, _, graphs = case
    whole = answered(processor.host, lambda: graphs, bare, TOKENS)
    monkeypatch.setattr(answering, "BATCH", 3)
    heard = Heard()
    parts = answered(processor.host, lambda: graphs, bare, TOKENS, heard)
    assert parts == whole
    assert heard.steps == [(3, 4, "answers"), (4, 4, "answers")]


def test_nothing_is_asked_where_nothing_is_missing_or_wanted(case, bare, tiny_manifest):
    host = case[1].host
    assert answered(host, never, bare, 0) == bare
    full = read_manifest(tiny_manifest)
    assert answered(host, never, full, TOKENS) == full


def test_what_was_answered_is_kept(case, bare, monkeypatch, tmp_path):
    """Stopped after the first batch: the second run asks for the second alone, the third for none."""
    _, processor, _, graphs = case
    monkeypatch.setattr(answering, "BATCH", 3)
    store = ObjectStore(tmp_path / "run", {})

    with pytest.raises(KeyboardInterrupt):
        answered(processor.host, lambda: graphs, bare, TOKENS, Stops(at=(3, "answers")), store)
    asked, greedy = [], answering.greedy
    monkeypatch.setattr(
        answering, "greedy", lambda h, g, prompts, n: asked.append(len(prompts)) or greedy(h, g, prompts, n)
    )
    found = answered(processor.host, lambda: graphs, bare, TOKENS, store=store)
    assert asked == [1]
    assert answered(processor.host, never, bare, TOKENS, store=store) == found


def test_the_line_is_quantized_as_if_its_answers_had_been_written(case, bare, talker, tmp_path):
    """Same weights from lines without answers and from those lines filled in; other ones where none are wanted."""
    _, processor, _, graphs = case
    filled = answered(processor.host, lambda: graphs, bare, TOKENS)
    assert all(one.answer_tokens > 1 for one in calibration_inputs(processor, filled))
    heard, found = {name: Heard() for name in ("bare", "filled", "none")}, {}
    for name, samples, tokens in (("bare", bare, TOKENS), ("filled", filled, TOKENS), ("none", bare, 0)):
        found[name] = quantize_checkpoint(
            talker,
            samples,
            tmp_path / name,
            QuantizeSettings(
                method="mgvq-mix-overlap-drift",
                bits=2.0,
                options=FAST,
                answer_tokens=tokens,
            ),
            heard[name],
        ).folder
    weights = {name: (folder / "model.safetensors").read_bytes() for name, folder in found.items()}
    assert weights["bare"] == weights["filled"] != weights["none"]
    assert {name for name, one in heard.items() if any(what == "answers" for _, _, what in one.steps)} == {"bare"}
    said = json.loads((found["bare"] / "config.json").read_text())["quantization_config"]["calibration"]
    assert (said["samples"], said["answered"], said["answer_tokens"]) == (6, 4, TOKENS)


def test_another_bound_is_another_run(bare, tiny_qwen2_vl, tmp_path):
    """The pieces of a run with longer answers are not gone on with."""
    stops = Stops(layers_done=1)
    for tokens in (TOKENS, TOKENS + 1):
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(
                tiny_qwen2_vl,
                bare,
                tmp_path / "q",
                QuantizeSettings(method="rtn", options=FAST, answer_tokens=tokens),
                stops,
            )
    assert len(stops.notes) == 1
    assert f"differs in answer_tokens ({TOKENS}, now {TOKENS + 1});" in stops.notes[0]


def test_the_default_is_one(tmp_path):
    assert QuantizeSettings().answer_tokens == ANSWER_TOKENS
