"""A tiny Qwen2-VL with random weights, saved the way a published checkpoint is, and a manifest of drawn pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_architecture import TINY_TEXT, tiny_config

from toolchain.demo import architecture, task


@pytest.fixture(scope="session")
def tiny_qwen2_vl(tmp_path_factory) -> Path:
    """Folder of a float16 checkpoint with random weights, tokenizer, processor and generation config. Read only."""
    from transformers import Qwen2VLForConditionalGeneration

    folder = tmp_path_factory.mktemp("tiny") / "qwen2-vl"
    tokenizer = architecture.train_tokenizer(sentences=500)
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(tiny_config(tokenizer))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(torch.float16).save_pretrained(folder)
    architecture.save_processor_files(tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_with_loud_columns(tiny_qwen2_vl, tmp_path_factory) -> Path:
    """The same checkpoint with the first 64 hidden columns of every MLP 16 times as loud: cutting there pays. Read
    only.
    """
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("loud") / "qwen2-vl"
    shutil.copytree(tiny_qwen2_vl, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("mlp.up_proj.weight"):
            tensor[:64] *= 16
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def tiny_manifest(tmp_path_factory) -> Path:
    """calib.jsonl with 6 drawn pictures of several sizes beside it, each line with an answer. Read only."""
    folder = tmp_path_factory.mktemp("manifest")
    rng = np.random.default_rng(0)
    lines = []
    for index in range(6):
        scene = task.random_scene(rng)
        task.draw(scene, rng).save(folder / f"{index}.png")
        _, question, answer = task.ask(scene, rng)
        lines.append(json.dumps({"image": f"{index}.png", "prompt": question, "answer": answer}))
    path = folder / "calib.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_internvl(tmp_path_factory) -> Path:
    """Folder of a float16 two-layer InternVL over a Qwen2 decoder, random weights, with tokenizer and processor."""
    from transformers import (
        GenerationConfig,
        GotOcr2ImageProcessorPil,
        InternVLConfig,
        InternVLForConditionalGeneration,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("tiny") / "internvl"
    tokenizer = architecture.train_tokenizer(sentences=500)
    tokenizer.add_special_tokens(["<img>", "</img>", "<IMG_CONTEXT>"])
    text = {k: v for k, v in TINY_TEXT.items() if k != "rope_parameters"}
    text |= {"model_type": "qwen2", "vocab_size": 640, "max_position_embeddings": 1024, "tie_word_embeddings": False}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = InternVLConfig(
        text_config=text | {"eos_token_id": tokenizer.token_to_id("<|im_end|>"), "pad_token_id": 0, "bos_token_id": 0},
        vision_config=vision | {"image_size": [56, 56], "patch_size": [14, 14]},
        image_token_id=tokenizer.token_to_id("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = InternVLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Layer scales start at 0.1 and class tokens at zero: too quiet for errors to show.
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.to(torch.float16).save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = architecture.CHAT_TEMPLATE.replace(
        "<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\n"
    )
    fast.save_pretrained(folder)
    size = {"height": 56, "width": 56}
    GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, min_patches=1, max_patches=6).save_pretrained(folder)
    GenerationConfig(eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id).save_pretrained(folder)
    return folder
