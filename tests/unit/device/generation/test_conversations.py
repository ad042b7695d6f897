"""Conversations: text as it streams, prefix reuse, limits, and hosts that equal transformers over several turns."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

from toolchain.bundle.manifest import write_bundle
from toolchain.device.families import Turn
from toolchain.device.generation.chat import Conversation
from toolchain.device.generation.generate import GraphRunner, TextStream
from toolchain.device.generation.limits import Limits, limits_from_bundle
from toolchain.errors import BudgetError, InputDataError
from toolchain.models.configs import read_config
from toolchain.models.registry import family_for
from toolchain.models.runner import torch_graphs

ROOMY = Limits(512, None, "a test")
FAMILIES = ["tiny_qwen2_vl", "tiny_internvl"]


def image(seed: int, size: tuple[int, int] = (90, 60)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def host_of(folder):
    config = read_config(folder)
    return family_for(config).load_host(config, folder)


TURNS = [
    Turn("user", "What is in row 1, column 2?", (image(1), image(2, (60, 120)))),
    Turn("assistant", "red 3"),
    Turn("user", "Read row 1.", (image(3, (150, 80)),)),
    Turn("assistant", "blue 1"),
    Turn("user", "How many?"),
]


def messages(turns):
    return [
        {"role": t.role, "content": [{"type": "image"}] * len(t.images) + [{"type": "text", "text": t.text}]}
        for t in turns
    ]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("count", [1, 3, 5])
def test_ids_of_several_turns_equal_tokenizer_and_template(request, name, count):
    folder = request.getfixturevalue(name)
    host, tokenizer = host_of(folder), AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(messages(TURNS[:count]), tokenize=False, add_generation_prompt=True)
    prepared = host.prepare_turns(TURNS[:count])
    for feeds in prepared.vision_feeds:
        text = text.replace(host.image_token, host.image_text(host.image_tokens(feeds)).replace("<", "\0"), 1)
    expected = tokenizer(text.replace("\0", "<"))["input_ids"]
    assert prepared.input_ids.tolist() == expected
    of_images = [i for start, end in prepared.image_places for i in range(start, end)]
    assert of_images == np.flatnonzero(prepared.input_ids == host.image_token_id).tolist()


@pytest.mark.parametrize("count", [1, 3, 5])
def test_qwen2_vl_positions_of_several_images_equal_the_model(tiny_qwen2_vl, count):
    model = Qwen2VLForConditionalGeneration.from_pretrained(tiny_qwen2_vl)
    prepared = host_of(tiny_qwen2_vl).prepare_turns(TURNS[:count])
    ids = torch.from_numpy(prepared.input_ids)[None]
    grids = [[1, *(f["position_ids"].max(axis=0) + 1).tolist()] for f in prepared.vision_feeds]
    is_image = (ids == model.config.image_token_id).int()
    expected, delta = model.model.get_rope_index(ids, mm_token_type_ids=is_image, image_grid_thw=torch.tensor(grids))
    np.testing.assert_array_equal(prepared.positions, expected[:, 0].numpy())
    assert prepared.next_position == ids.shape[1] + int(delta)


def test_a_template_that_refuses_is_a_refusal(tiny_qwen2_vl):
    host = host_of(tiny_qwen2_vl)
    strict = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('a system turn comes first') }}{% endif %}"
    refusing = type(host)(host.settings, (tiny_qwen2_vl / "tokenizer.json").read_bytes(), strict)
    with pytest.raises(InputDataError, match=r"refuses this conversation .a system turn comes first"):
        refusing.prepare(None, "?")


def test_a_prompt_that_contains_the_placeholder_is_refused(tiny_qwen2_vl):
    host = host_of(tiny_qwen2_vl)
    with pytest.raises(InputDataError, match=r"wrote 1 times '<.image_pad.>' for 0 images"):
        host.prepare(None, f"What is {host.image_token}?")


@pytest.mark.parametrize("seed", range(8))
def test_pieces_join_to_the_whole_text(tiny_qwen2_vl, seed):
    """For any tokens, partial characters and white space included."""
    host, rng = host_of(tiny_qwen2_vl), np.random.default_rng(seed)
    ids = rng.integers(0, host.tokenizer.get_vocab_size(), 40).tolist()
    ids += host.encode(" naïve 日本語 🙂  ").tolist()
    rng.shuffle(ids[:30])
    stream = TextStream(host)
    assert "".join([*(stream.push(i) for i in ids), stream.end()]) == host.decode(ids)


def test_a_character_of_several_tokens_appears_whole(tiny_qwen2_vl):
    host = host_of(tiny_qwen2_vl)
    ids = host.encode("a🙂").tolist()
    assert len(ids) > 2
    stream = TextStream(host)
    pieces = [stream.push(i) for i in ids]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert "".join([*pieces, stream.end()]) == "a🙂"


class CountingRunner(GraphRunner):
    """Counts the tokens that are computed, and the images."""

    fed = 0
    seen = 0

    def extend(self, ids, features, positions):
        self.fed += len(ids)
        return super().extend(ids, features, positions)

    def image_features(self, feeds):
        self.seen += 1
        return super().image_features(feeds)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    """Host and the torch graphs of a tiny checkpoint: a runner's three functions without any export."""
    from transformers import AutoModelForImageTextToText

    folder = request.getfixturevalue(request.param)
    config = read_config(folder)
    loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return SimpleNamespace(host=host_of(folder), graphs=torch_graphs(family_for(config), loaded))


def conversation(model, limits=ROOMY):
    runner = CountingRunner(model.graphs, model.host.settings["decoder"], model.host.axes, limits.context_tokens)
    return Conversation(model.host, runner, limits), runner


def test_a_second_question_computes_only_what_is_new_and_answers_the_same(model):
    about = [("p", image(1))]
    talk, runner = conversation(model)
    first = talk.ask("Read row 1.", about, max_new_tokens=5)
    fed = runner.fed
    second = talk.ask("Read row 2.", max_new_tokens=5)
    assert runner.seen == 1
    assert second.reused_tokens >= first.prompt_tokens - 1
    assert runner.fed - fed <= second.prompt_tokens - second.reused_tokens + len(second.ids) - 1
    fresh, _ = conversation(model)
    fresh.turns, fresh._feeds = talk.turns[:2], talk._feeds
    again = fresh.ask("Read row 2.", max_new_tokens=5)
    assert again.reused_tokens == 0
    assert (again.ids, again.text) == (second.ids, second.text)


def test_another_image_of_the_same_size_is_not_taken_for_the_first(model):
    talk, runner = conversation(model)
    talk.ask("Read row 1.", [("p", image(1))], max_new_tokens=3)
    talk.reset()
    other = talk.ask("Read row 1.", [("q", image(2))], max_new_tokens=3)
    assert runner.seen == 2
    fresh, _ = conversation(model)
    expected = fresh.ask("Read row 1.", [("q", image(2))], max_new_tokens=3)
    assert other.ids == expected.ids
    talk.reset()
    same = talk.ask("Read row 1.", [("q", image(2))], max_new_tokens=3)
    assert (runner.seen, same.ids) == (2, expected.ids), "the same image again is held"
    assert same.reused_tokens == same.prompt_tokens - 1


def test_several_images_in_one_turn_are_fed_one_after_the_other(model):
    """As engines need it; the answer is that of all at once."""
    images = [("p", image(1)), ("q", image(2)), ("r", image(3))]
    talk, runner = conversation(model)
    found = talk.ask("Read row 1.", images, max_new_tokens=4)
    assert runner.seen == 3
    prepared = model.host.prepare_turns([Turn("user", "Read row 1.", tuple(p for _, p in images))])
    whole = GraphRunner(model.graphs, model.host.settings["decoder"], model.host.axes, 512)
    features = np.concatenate([whole.image_features(feeds) for feeds in prepared.vision_feeds])
    logits = whole.extend(prepared.input_ids, features, prepared.positions)
    assert found.ids[0] == int(logits.argmax())


def test_streamed_text_is_the_answer(model):
    pieces: list[str] = []
    reply = conversation(model)[0].ask("Read row 1.", [("p", image(1))], max_new_tokens=8, on_text=pieces.append)
    assert "".join(pieces) == reply.text


def test_a_context_that_does_not_fit_is_refused_with_the_numbers_and_changes_nothing(model):
    talk, _ = conversation(model, Limits(80, None, "orin-nano-8gb"))
    first = talk.ask("Read row 1.", max_new_tokens=4)
    before = list(talk.turns)
    pattern = r"prompt of \d+ tokens \(0 of images\) and up to 400 new ones exceed the context of 80 planned for orin"
    with pytest.raises(BudgetError, match=pattern) as caught:
        talk.ask("And row 2?", max_new_tokens=400)
    assert caught.value.exit_code == 5
    assert talk.turns == before
    assert first.ids


def test_a_image_larger_than_planned_is_refused_with_a_size_that_would_do(model):
    talk, runner = conversation(model, Limits(512, 1, "orin-nano-8gb"))
    with pytest.raises(InputDataError, match=r"pic.png of 90x60 pixels takes \d+ tokens; .* planned for 1 a") as caught:
        talk.ask("?", [("image pic.png", image(1))])
    assert caught.value.exit_code == 7
    assert (runner.fed, talk.turns) == (0, [])


@pytest.fixture
def planned_bundle(tmp_path):
    """`planned_bundle(image, tokens, max_pixels, context)`: a bundle with that memory plan."""

    def make(image, tokens, max_pixels=10_000, context=64):
        workload = {"context_tokens": context, "image": image, "max_pixels": max_pixels}
        plan = {"target": "orin", "workload": workload, "image": {"tokens": tokens}}
        (tmp_path / "memory.json").write_text(json.dumps(plan))
        return write_bundle({"memory.json": tmp_path / "memory.json"}, tmp_path / "bundle")

    return make


def host_settings(max_pixels: int, features: int) -> dict:
    profiles = {"graphs": {"embed": {"image_features": [[0, 8], [1, 8], [features, 8]]}}}
    return {"decoder": {"max_context": 100}, "image": {"max_pixels": max_pixels}, "profiles": profiles}


def test_limits_are_the_tightest_of_checkpoint_engines_and_plan(planned_bundle):
    assert limits_from_bundle(planned_bundle([30, 30], 9), host_settings(10_000, 20)) == Limits(64, 9, "orin")
    assert limits_from_bundle(planned_bundle([30, 30], 9, context=900), host_settings(10_000, 7)) == Limits(
        100, 7, "orin"
    )


def test_the_largest_square_stands_for_all_images_under_the_pixel_limit(planned_bundle):
    """A wide image may take a few tokens more than the square that the plan counted."""
    assert limits_from_bundle(planned_bundle([100, 100], 9), host_settings(10_000, 12)).image_tokens == 12


def test_without_a_plan_the_checkpoints_limits_hold(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    bundle = write_bundle({"x.json": tmp_path / "x.json"}, tmp_path / "bundle")
    found = limits_from_bundle(bundle, host_settings(10_000, 12))
    assert (found.context_tokens, found.image_tokens) == (100, 12)
    assert "no memory plan" in found.planned_for
