"""Every kind of bad input: one clear sentence (what, where, what to do), the right exit code, nothing left behind."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest

from toolchain.bundle.manifest import write_bundle
from toolchain.cli import main


@pytest.fixture
def refused(capsys, tmp_path):
    """Run a command that must fail: `refused(code, words, *arguments)`; everything under `kept` must stay as it is."""

    def run(code: int, words: str, *arguments: object) -> None:
        before = snapshot(tmp_path)
        found = main([str(a) for a in arguments])
        error = capsys.readouterr().err
        assert (found, "Traceback" in error) == (code, False), error
        assert words in error
        assert len([line for line in error.splitlines() if line.startswith("error:")]) <= 1
        assert snapshot(tmp_path) == before, "something was written"

    return run


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


def line_arguments(model, calib, output, *more) -> list:
    return ["all", "-m", model, "--calib", calib, "-o", output, *more]


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def test_missing_checkpoint(refused, tiny_manifest, tmp_path):
    refused(
        7,
        "does not exist; expected a folder with config.json",
        *line_arguments("nowhere", tiny_manifest, tmp_path / "o"),
    )


def test_truncated_checkpoint(refused, tiny_qwen2_vl, tiny_manifest, tmp_path):
    model = copied(tiny_qwen2_vl, tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    arguments = line_arguments(model, tiny_manifest, tmp_path / "o")
    refused(7, "model.safetensors: truncated, expected", *arguments)
    refused(7, "truncated", "quantize", "-m", model, "--calib", tiny_manifest, "-o", tmp_path / "q")


def test_unknown_architecture(refused, tiny_qwen2_vl, tiny_manifest, tmp_path):
    model = copied(tiny_qwen2_vl, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "moondream1"}))
    refused(3, "model_type 'moondream1' is not supported", *line_arguments(model, tiny_manifest, tmp_path / "o"))


def test_unknown_target(refused, tiny_qwen2_vl, tiny_manifest, tmp_path):
    arguments = line_arguments(tiny_qwen2_vl, tiny_manifest, tmp_path / "o", "--target", "orin-nano-8bg")
    refused(3, "did you mean orin-nano-8gb?", *arguments)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"image": "a.png", "prompt": ', "line 2: not JSON"),
        ('{"image": "a.png"}', "line 2: missing prompt"),
        ('{"image": "a.png", "prompt": "?", "weight": 1}', "line 2: unknown weight"),
        ('{"image": "gone.png", "prompt": "?"}', "gone.png does not exist"),
        ('{"image": "broken.png", "prompt": "?"}', "broken.png cannot be read"),
    ],
)
def test_wrong_manifest_line(refused, tiny_qwen2_vl, tiny_manifest, tmp_path, line, words):
    shutil.copy(tiny_manifest.parent / "0.png", tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    manifest = tmp_path / "calib.jsonl"
    manifest.write_text('{"image": "a.png", "prompt": "Read row 1."}\n' + line + "\n")
    refused(7, words, *line_arguments(tiny_qwen2_vl, manifest, tmp_path / "o"))


def test_images_that_calibrate_do_not_evaluate(refused, tiny_qwen2_vl, tiny_manifest, tmp_path):
    arguments = line_arguments(tiny_qwen2_vl, tiny_manifest, tmp_path / "o", "--data", tiny_manifest)
    refused(7, "same bytes as calibration image", *arguments)


def test_output_that_is_in_use(refused, tiny_qwen2_vl, tiny_manifest, tmp_path):
    (tmp_path / "file").write_text("mine")
    for output, words in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "under", "is a file"),
        (tmp_path, "not empty"),
    ):
        refused(2, words, *line_arguments(tiny_qwen2_vl, tiny_manifest, output))
        refused(2, words, "quantize", "-m", tiny_qwen2_vl, "--calib", tiny_manifest, "-o", output)
        refused(2, words, "export", "-m", tiny_qwen2_vl, "-o", output)


def test_model_over_budget(refused, tiny_qwen2_vl, tiny_manifest, tmp_path):
    arguments = line_arguments(tiny_qwen2_vl, tiny_manifest, tmp_path / "o", "--budget", "10KiB")
    refused(5, "more than the budget of 10,240", *arguments)
    refused(5, "more than the budget of 10,240", *arguments, "--bits", "2")
    for more in ([], ["--bits", "2"], ["--method", "rtn"]):
        command = ["quantize", "-m", tiny_qwen2_vl, "--calib", tiny_manifest, "-o", tmp_path / "q", *more]
        refused(5, "more than the budget of 10,240", *command, "--budget", "10KiB")
    refused(5, "more than the budget of 10,240", "plan", "-m", tiny_qwen2_vl, "--budget", "10KiB")


def test_bits_that_no_code_reaches(refused, tiny_qwen2_vl, tiny_manifest, tmp_path):
    command = ["quantize", "-m", tiny_qwen2_vl, "--calib", tiny_manifest, "-o", tmp_path / "q"]
    refused(2, "Invalid value for '--bits'", *command, "--bits", "1.4")
    refused(2, "bits 1.5: expected 2 to 4", *command, "--bits", "1.5", "--method", "rtn")
    refused(2, "bits 1.5: expected 2 to 4", "plan", "-m", tiny_qwen2_vl, "--bits", "1.5", "--method", "rtn")
    refused(2, "Invalid value for '--bits'", "demo", "-o", tmp_path / "d", "--bits", "1.5")
    refused(2, "method 'awq' is not known", "plan", "-m", tiny_qwen2_vl, "--method", "awq")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "quantize.bitz=2"], "'quantize.bitz'"),
        (["--set", "quantize"], "expected key=value"),
        (["--bits", "1.0"], "'quantize.bits' (from flag)"),
        (["--budget", "much"], "expected a number with a unit"),
        (["--resume", "required"], "no run to resume"),
    ],
)
def test_wrong_settings(refused, tiny_qwen2_vl, tiny_manifest, tmp_path, arguments, words):
    code = 7 if "--resume" in arguments else 2
    refused(code, words, *line_arguments(tiny_qwen2_vl, tiny_manifest, tmp_path / "o", *arguments))


def test_missing_setting_is_named(refused):
    refused(2, "setting 'model' is required", "all")


@pytest.fixture
def bundle(tiny_qwen2_vl, tmp_path) -> Path:
    pieces = {
        "processor/tokenizer.json": tiny_qwen2_vl / "tokenizer.json",
        "bitplan.json": tiny_qwen2_vl / "config.json",
    }
    return write_bundle(pieces, tmp_path / "bundle").folder


@pytest.mark.parametrize(
    "verb", [["run", "--prompt", "?"], ["inspect"], ["build", "--backend", "tensorrt_rtx", "-o", "out"]]
)
def test_bundle_with_one_flipped_byte(refused, bundle, verb):
    file = bundle / "processor" / "tokenizer.json"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    refused(7, "processor/tokenizer.json: expected hash", verb[0], bundle, *verb[1:])


def test_no_bundle(refused, tmp_path):
    refused(7, "expected a bundle folder with manifest.json", "run", tmp_path, "--prompt", "?")


def test_a_run_folder_where_its_bundle_was_meant(refused, bundle):
    assert bundle.name == "bundle"
    refused(7, f"found none; give {bundle}", "run", bundle.parent, "--prompt", "?")


def test_unknown_backend_and_flag_without_effect(refused, bundle, tmp_path):
    for verb in (["build", bundle, "-o", tmp_path / "e"], ["profile", bundle, "-o", tmp_path / "e"],
                 ["run", bundle, "--prompt", "?"]):  # fmt: skip
        refused(2, "'tensorflow' is not one of", *verb, "--backend", "tensorflow")
    refused(2, "--dense has no effect", "build", bundle, "--backend", "tensorrt", "--dense", "-o", tmp_path / "e")


@pytest.mark.parametrize("verb", [["build", "--backend", "tensorrt_rtx"], ["build"], ["profile"]])
def test_an_output_that_cannot_be_written(refused, bundle, tmp_path, verb):
    (tmp_path / "file").write_text("mine")
    for out, words in ((tmp_path / "file" / "sub", "is a file"), ("/proc/x/y", "/proc cannot be written to")):
        refused(2, words, *verb, bundle, "-o", out)
        refused(2, words, *verb, bundle, "-o", out, "--host", "nobody@127.0.0.1")


def test_a_full_disk_is_no_failure_of_ours(monkeypatch, capsys, bundle):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "/data/out")

    monkeypatch.setattr("toolchain.bundle.manifest.open_bundle", full)
    assert main(["run", str(bundle), "--prompt", "?"]) == 6
    error = capsys.readouterr().err
    assert error == "error: /data/out: No space left on device; free some, or write elsewhere\n"


def test_an_ssh_configuration_that_is_not_there(refused, bundle, tmp_path):
    command = ("build", bundle, "-o", tmp_path / "e", "--host", "board", "--ssh-config", tmp_path / "none")
    refused(7, "none does not exist; check --ssh-config", *command)


def test_nothing_to_inspect(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(7, "expected a run (run.json), a bundle", "inspect", tmp_path / "empty")
    refused(7, "does not exist or is no folder", "inspect", tmp_path / "gone")


def test_wrong_verb_and_option(refused):
    refused(2, "No such command 'quantise'", "quantise")
    refused(2, "No such option", "targets", "--colour")
