"""A board's environment: requirements-board.txt and our wheel, nothing of torch, transformers, onnx or TensorRT.

Every verb ends there in words and an exit code. The modules that a board lacks are made impossible to import in one
process, which runs the verbs one after the other.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from toolchain.bundle.manifest import write_bundle
from toolchain.bundle.requirements import absent_package, distribution_of, requirements
from toolchain.files.folders import write_json
from toolchain.models.configs import read_config
from toolchain.models.registry import family_for

ABSENT = (
    "torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnx_graphsurgeon", "onnxruntime", "tensorrt",
    "tensorrt_rtx", "cuda", "tomli",
)  # fmt: skip
BLOCKED = """
import contextlib, io, json, sys
from importlib import metadata
for name in {absent}:
    sys.modules[name] = None
version = metadata.version
def version_there(name):
    if name.replace("-", "_") in {absent}:
        raise metadata.PackageNotFoundError(name)
    return version(name)
metadata.version = version_there
from toolchain.cli import main
found = []
for words in json.loads(sys.stdin.read()):
    out, err = io.StringIO(), io.StringIO()
    sys.stdin = io.StringIO("what is it?\\n")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    found.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""
# Verb and flags → exit code, and words of stdout and stderr. B is a bundle, O a folder that is not there, M a model.
VERBS = {
    "--help": (0, "build"),
    "--version": (0, "mgvq "),
    "doctor": (0, "not needed on a board"),
    "targets": (0, "orin-nano-8gb"),
    "models": (0, "qwen2_vl"),
    "build B -o O": (6, "needs the Python module tensorrt, found none; run this on the board"),
    "build B -o O --backend tensorrt_rtx": (6, "needs the Python module tensorrt_rtx, found none; pip install"),
    "build B -o O --backend tensorrt_rtx --no-dense": (6, "needs the Python module tensorrt_rtx"),
    "build B -o O --backend tensorrt_rtx --dense": (6, "--dense needs the Python module onnx, found none"),
    "build B -o O --no-dense": (2, "--no-dense has no effect with --backend tensorrt"),
    "build B -o O --sm 87": (2, "an SM can be chosen with backend tensorrt_rtx only"),
    "build nowhere -o O": (7, "expected a bundle folder"),
    "run B --prompt ?": (6, "onnxruntime, found none; pip install onnxruntime, or use engines"),
    "run B --prompt ? --backend tensorrt": (2, "needs --engines"),
    "run B --prompt ? --backend tensorrt --engines O": (6, "needs the Python module tensorrt, found none"),
    "run B --prompt ? --backend tensorrt_rtx --engines O": (6, "needs the Python module tensorrt_rtx, found none"),
    "chat B": (6, "onnxruntime, found none"),
    "chat B --backend tensorrt --engines O": (6, "needs the Python module tensorrt, found none"),
    "chat B --format json --no-stream": (2, "--no-stream has no effect with --format json"),
    "profile B -o O": (6, "onnx, found none"),
    "profile B -o O --backend torch": (6, "torch, found none"),
    "profile B -o O --backend tensorrt --engines O": (6, "needs the Python module tensorrt, found none"),
    "inspect B": (6, "needs the Python module torch, found none; run it on the workstation, or pip install 'torch"),
    "plan -m M": (6, "needs the Python module torch, found none"),
    "quantize -m M --calib M/x.jsonl -o O": (6, "needs the Python module torch, found none"),
    "rewrite M -o O": (6, "needs the Python module onnx, found none; run it on the workstation"),
    "bench kernels": (6, "needs the Python module torch, found none"),
    "kernels --help": (0, "build"),
}


@pytest.fixture(scope="module")
def answers(tiny_qwen2_vl, tmp_path_factory) -> dict[str, tuple[int, str]]:
    """Verb → (exit code, everything it printed), of all verbs."""
    folder = tmp_path_factory.mktemp("board")
    config = read_config(tiny_qwen2_vl)
    write_json(folder / "host.json", family_for(config).host_settings(config, tiny_qwen2_vl))
    (folder / "graph.onnx").write_bytes(b"a graph")
    pieces = {f"processor/{name}": tiny_qwen2_vl / name for name in ("tokenizer.json", "chat_template.jinja")}
    pieces |= {f"{form}/{name}.onnx": folder / "graph.onnx" for form in ("portable", "device") for name in ("decoder",)}
    write_bundle(pieces | {"processor/host.json": folder / "host.json"}, folder / "bundle")
    stand_for = {"B": str(folder / "bundle"), "O": str(folder / "out"), "M": str(tiny_qwen2_vl)}
    commands = [[stand_for.get(word, word) for word in verb.split()] for verb in VERBS]
    code = BLOCKED.format(absent=ABSENT)
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(commands), capture_output=True, text=True, cwd=root, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert not (folder / "out").exists(), "a refused verb leaves nothing"
    found = json.loads(done.stdout.splitlines()[-1])
    return {verb: (code, out + err) for verb, (code, out, err) in zip(VERBS, found, strict=True)}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_ends_in_words_and_an_exit_code(answers, verb):
    code, text = answers[verb]
    expected, words = VERBS[verb]
    assert "Traceback" not in text
    assert (code, words in " ".join(text.split())) == (expected, True), text
    assert len([line for line in text.splitlines() if line.startswith("error:")]) <= 1


def test_twins_that_cannot_be_made_are_said_not_failed(answers):
    assert "no dense twins to compare sizes with" in answers["build B -o O --backend tensorrt_rtx"][1]
    assert "dense twins" not in answers["build B -o O --backend tensorrt_rtx --no-dense"][1]


def test_only_what_we_depend_on_is_absent_everything_else_is_our_fault():
    def message(name: str) -> str | None:
        return absent_package(ModuleNotFoundError(f"No module named {name!r}", name=name))

    assert "pip install 'onnx-graphsurgeon>=" in message("onnx_graphsurgeon.ir")
    assert "pip install 'pillow>=" in message("PIL.Image")
    assert message("toolchain.renamed") is None
    assert message("left_pad") is None
    assert absent_package(ModuleNotFoundError("no name")) is None


def test_requirements_are_without_extras_and_markers():
    names = [distribution_of(line) for line in requirements()]
    assert {"torch", "onnx-graphsurgeon", "numpy"} <= set(names)
    assert "pytest" not in names
    assert not [line for line in requirements() if ";" in line]
