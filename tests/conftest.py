"""Checkpoints and runs that many tests read, made once a process, and which tests share a process for them.

Tests run on two processes of one thread each (pyproject.toml). A file's tests go to one process, and the files that
need the same dear fixture go to the same one; those that take longest are begun first.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# Before torch is imported, here and in what tests start: with two threads beside another process the search for trellis
# paths took 13 to 80 times as long as with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", os.environ["OMP_NUM_THREADS"])

import numpy as np
import pytest
import torch
from tiny_architecture import TINY_TEXT, tiny_config

from toolchain.demo import architecture, task

ROOT = Path(__file__).parents[1]
# Files that need the same dear fixture, from where they lie under tests/, the dearest first: each row is run by one
# process, and rows before other files.
TOGETHER = (
    ("test_readme.py", "pipeline/test_demo_engines.py", "pipeline/test_remote_line.py"),  # `mgvq demo`: `reader`
    ("unit/quantize/test_line.py",),
    ("pipeline/",),
    ("unit/quantize/test_resume.py",),
    ("unit/quantize/test_codebook_choices.py",),
    ("unit/quantize/refine/test_rounds.py",),
    ("unit/native/",),  # the kernels compiled for the emulator: `emulated_kernels`
)
LONG_SECONDS = 20


def _row(nodeid: str) -> int:
    """Number of the first row of `TOGETHER` that names the test's file, or the number of rows."""
    path = nodeid.split("::")[0].removeprefix("tests/")
    return next((number for number, row in enumerate(TOGETHER) if path.startswith(row)), len(TOGETHER))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """A scheduler that gives a row of `TOGETHER`, or else a file, to one process."""
    from xdist.scheduler import LoadScopeScheduling

    class FilesTogether(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            row = _row(nodeid)
            return " ".join(TOGETHER[row]) if row < len(TOGETHER) else nodeid.split("::")[0]

    return FilesTogether(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The rows of `TOGETHER` first."""
    items.sort(key=lambda item: _row(item.nodeid))


def pytest_terminal_summary(terminalreporter) -> None:
    """Name the tests that take long and do not say why (`@pytest.mark.slow(reason=…)`)."""
    passed = terminalreporter.stats.get("passed", [])
    long = [one for one in passed if one.when == "call" and one.duration > LONG_SECONDS and "slow" not in one.keywords]
    for one in long:
        terminalreporter.line(f"{one.nodeid} took {one.duration:.0f} s and has no mark that says why")


@dataclass(frozen=True)
class Reader:
    """A folder from which `toolchain/` can be named, as in a checkout, and what `mgvq demo` said there."""

    folder: Path
    demo: dict

    def run(self, *arguments: str) -> str:
        """stdout of a Python that was started there."""
        return _run_python(self.folder, *arguments)


def _run_python(folder: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=900, env=environment
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def reader(tmp_path_factory) -> Reader:
    """A reader's folder in which the README's first command has run. What is there is read only."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "toolchain").symlink_to(ROOT / "toolchain")
    return Reader(folder, json.loads(_run_python(folder, "-m", "toolchain", "demo", "--format", "json")))


@pytest.fixture(scope="session")
def demo_bundle(reader) -> Path:
    """The demo model's bundle for an 8 GB Orin Nano. Read only."""
    return reader.folder / reader.demo["bundle"]


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
    """The same checkpoint with the first 64 hidden columns of every MLP with 16 times the amplitude: cutting there
    pays. Read only.
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
    """calib.jsonl with 6 drawn images of several sizes beside it, each line with an answer. Read only."""
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
