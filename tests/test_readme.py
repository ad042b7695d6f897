"""The README's commands, run in order in an empty folder as a reader would, and its Python."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (?:pip install \. && )?(mgvq .*)$", README, flags=re.MULTILINE)
SAMPLES = 8  # of calibration, where a command quantizes again


def shortened(words: list[str], folder: Path) -> list[str]:
    """The same command with few calibration samples and a quick method, where it quantizes and is not the demo, which
    has gone the same way with ours. `nearest` gives layers of the same trellis codes.
    """
    if words[0] == "all":
        return [*words, "--set", f"quantize.samples={SAMPLES}", "--set", "quantize.method=rtn"]
    if words[0] == "quantize":
        given = words[words.index("--calib") + 1]
        short = folder / "short.jsonl"
        lines = [json.loads(line) for line in (folder / given).read_text(encoding="utf-8").splitlines()[:SAMPLES]]
        named = [line | {"image": str((folder / given).parent / line["image"])} for line in lines]
        short.write_text("".join(json.dumps(line) + "\n" for line in named), encoding="utf-8")
        return [*(str(short) if word == given else word for word in words), "--method", "nearest"]
    return words


def test_there_are_commands_to_run():
    assert COMMANDS[0] == "mgvq demo"
    assert len(COMMANDS) >= 9


def test_the_demo_keeps_its_promises(reader):
    """Full precision answers, 2 bits rounded to nearest hurt, ours keep most of it."""
    accuracy, bits = reader.demo["accuracy"], reader.demo["bits"]
    assert accuracy["fp"] >= 0.95
    assert accuracy["rtn"] <= accuracy["fp"] - 0.10
    assert accuracy["mgvq"] > accuracy["rtn"]
    assert 1.95 < bits["index"] <= 2.0
    assert bits["model"] < 2.5
    assert (reader.folder / reader.demo["bundle"] / "manifest.json").is_file()
    assert (reader.folder / "runs" / "demo" / "report.html").is_file()


@pytest.mark.slow(reason="two of the commands quantize the demo's model, three export it")
@pytest.mark.parametrize("command", COMMANDS[1:], ids=[shlex.split(c)[1] for c in COMMANDS[1:]])
def test_commands(reader, command):
    words = shlex.split(command)[1:]
    if "tensorrt_rtx" in words:
        pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    assert reader.run("-m", "toolchain", *shortened(words, reader.folder)).strip()


def test_python(reader):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    out = reader.run("-c", code + "\nprint(type(model).__name__, type(model.lm_head).__name__)")
    assert out.split() == ["Qwen2VLForConditionalGeneration", "VQLinear"]
