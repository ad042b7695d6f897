"""A checkpoint folder whose tokenizer, ids, template and pixel limits are its own, and that has no processor_config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_architecture import tiny_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from toolchain.calibration.manifest import read_manifest
from toolchain.cli import main
from toolchain.demo import architecture
from toolchain.evaluate.answers import answer_log_probabilities
from toolchain.models.configs import read_config
from toolchain.models.registry import family_for

MIN_PIXELS, MAX_PIXELS = 28 * 56, 84 * 84
# The placeholder is the family's; everything around it, and every id, is this folder's own.
TEMPLATE = (
    "{% for message in messages %}<turn>{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<see><|image_pad|>{% else %} {{ part['text'] }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<reply>{% endif %}"
)
SPECIAL = ("<stop>", "<reply>", "<unk>", "<see>", "<|image_pad|>", "<film>", "<nothing>", "<turn>")


def words_of(manifest: Path) -> list[str]:
    """Every word and mark of the manifest's questions and answers."""
    split = pre_tokenizers.Whitespace()
    samples = read_manifest(manifest)
    texts = [text for sample in samples for text in (sample.prompt, sample.answer)]
    return sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})


def word_tokenizer(words: list[str]) -> Tokenizer:
    """One token a word; special tokens stand last, in another order than the built-in model's."""
    names = [*words, *SPECIAL]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def unigram_tokenizer(words: list[str]) -> Tokenizer:
    """Pieces with ▁ for spaces; special tokens stand first and last."""
    letters = sorted({letter for word in words for letter in word} | {"▁"})
    pieces = [*SPECIAL[:3], *(f"▁{word}" for word in words), *letters, *SPECIAL[3:]]
    scores = [(piece, -0.1 * len(pieces) if len(piece) == 1 else -1.0) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=pieces.index("<unk>"), byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


@pytest.fixture(scope="module", params=[word_tokenizer, unigram_tokenizer])
def foreign(request, tiny_manifest, tmp_path_factory) -> tuple[Path, Tokenizer]:
    """(folder, its tokenizer): a tiny Qwen2-VL, random weights, with preprocessor_config.json alone."""
    from transformers import Qwen2VLForConditionalGeneration

    tokenizer = request.param(words_of(tiny_manifest))
    tokenizer.add_special_tokens(list(SPECIAL))
    ids = {name: tokenizer.token_to_id(name) for name in SPECIAL}
    config = tiny_config(architecture.train_tokenizer(sentences=200))
    config.image_token_id, config.video_token_id = ids["<|image_pad|>"], ids["<film>"]
    config.vision_start_token_id, config.vision_end_token_id = ids["<see>"], ids["<nothing>"]
    config.text_config.vocab_size = tokenizer.get_vocab_size()
    for name, token in (("bos", "<nothing>"), ("eos", "<stop>"), ("pad", "<nothing>")):
        setattr(config.text_config, f"{name}_token_id", ids[token])
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config)
    folder = tmp_path_factory.mktemp("foreign") / "model"
    model.to(torch.float16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS, "patch_size": 14, "merge_size": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}), encoding="utf-8")
    return folder, tokenizer


@pytest.fixture(scope="module")
def manifests(tiny_manifest, tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("split")
    lines = [json.loads(line) for line in tiny_manifest.read_text(encoding="utf-8").splitlines()]
    for name, part in (("calib", lines[:3]), ("data", lines[3:5])):
        named = [line | {"image": str(tiny_manifest.parent / line["image"])} for line in part]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in named), encoding="utf-8")
    return str(folder / "calib.jsonl"), str(folder / "data.jsonl")


def test_everything_comes_from_the_folder(foreign, tiny_manifest):
    folder, tokenizer = foreign
    assert not (folder / "processor_config.json").exists()
    processor = family_for(read_config(folder)).load_processor(folder)
    sample = read_manifest(tiny_manifest)[0]
    inputs = processor.model_inputs(sample, with_answer=True)
    ids = inputs["input_ids"][0].tolist()
    image, stop, see, turn, reply = (
        tokenizer.token_to_id(name) for name in ("<|image_pad|>", "<stop>", "<see>", "<turn>", "<reply>")
    )
    assert processor.host.stop_ids == (stop,)
    assert processor.host.pad_id == tokenizer.token_to_id("<nothing>")
    assert ids[:2] == [turn, see]
    assert ids[-1] == stop
    images = ids.count(image)
    assert images == int(processor.is_image(inputs["input_ids"]).sum())
    assert MIN_PIXELS <= images * 28 * 28 <= MAX_PIXELS
    answer = tokenizer.encode(sample.answer, add_special_tokens=False).ids
    assert ids[ids.index(reply) + 1 : -1] == answer
    assert tokenizer.token_to_id("<unk>") not in ids


def test_answers_are_asked_at_their_own_tokens(foreign, tiny_manifest):
    from toolchain.checkpoint.loading import load_model

    folder, tokenizer = foreign
    processor = family_for(read_config(folder)).load_processor(folder)
    sample = read_manifest(tiny_manifest)[0]
    found = answer_log_probabilities(load_model(folder), processor, sample)
    assert found.shape == (len(tokenizer.encode(sample.answer).ids) + 1, tokenizer.get_vocab_size())


def test_it_is_compared(foreign, manifests, capsys):
    calib, data = manifests
    arguments = ["compare", "-m", str(foreign[0]), "--calib", calib, "--data", data, "--methods", "rtn,vptq"]
    assert main([*arguments, "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["method"] for row in rows] == ["fp", "rtn", "vptq"]
    assert all(row["kl"] > 0 for row in rows[1:])


def test_it_is_quantized_and_evaluated(foreign, manifests, capsys, tmp_path):
    calib, data = manifests
    out = str(tmp_path / "out")
    assert main(["quantize", "-m", str(foreign[0]), "--calib", calib, "-o", out, "--method", "rtn"]) == 0
    capsys.readouterr()
    arguments = ["eval", "-m", out, "--data", data, "--calib", calib, "--reference", str(foreign[0]), "--layers"]
    assert main([*arguments, "--max-new-tokens", "3", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kl"] > 0
    assert found["questions"] == 2
    assert found["layers"]
