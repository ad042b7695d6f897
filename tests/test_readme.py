"""The README's commands, run in order in an empty folder as a reader would, and its Python."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (?:pip install \. && )?(mgvq .*)$", README, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An empty folder from which `toolchain/` can be named, as in a checkout."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "toolchain").symlink_to(ROOT / "toolchain")
    return folder


def run(folder: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=900, env=environment
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_there_are_commands_to_run():
    assert COMMANDS[0] == "mgvq demo"
    assert len(COMMANDS) >= 9


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=[shlex.split(c)[1] for c in COMMANDS])
def test_commands(folder, command):
    words = shlex.split(command)[1:]
    if "tensorrt_rtx" in words:
        pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    if words == ["demo"]:
        check_demo(json.loads(run(folder, "-m", "toolchain", "demo", "--format", "json")), folder)
    else:
        assert run(folder, "-m", "toolchain", *words).strip()


def check_demo(found: dict, folder: Path) -> None:
    """The promises of the demo: full precision answers, 2 bits rounded to nearest hurt, ours keep most of it."""
    accuracy = found["accuracy"]
    assert accuracy["fp"] >= 0.95
    assert accuracy["rtn"] <= accuracy["fp"] - 0.10
    assert accuracy["mgvq"] > accuracy["rtn"]
    assert 1.95 < found["bits"]["index"] <= 2.0
    assert found["bits"]["model"] < 2.5
    assert (folder / found["bundle"] / "manifest.json").is_file()
    assert (folder / "runs" / "demo" / "report.html").is_file()


@pytest.mark.slow
def test_python(folder):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    out = run(folder, "-c", code + "\nprint(type(model).__name__, type(model.lm_head).__name__)")
    assert out.split() == ["Qwen2VLForConditionalGeneration", "VQLinear"]
