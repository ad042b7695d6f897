"""The command line from a checkpoint to a bundle that answers, on a tiny model: results, resume, failed gates."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from toolchain.cli import main
from toolchain.demo.data import write_manifest


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory) -> Path:
    return write_manifest(tmp_path_factory.mktemp("data"), "eval", pictures=2, questions=2, seed=7)


@pytest.fixture(scope="module")
def finished(tiny_qwen2_vl, tiny_manifest, evaluation, tmp_path_factory) -> Path:
    """A finished run folder. Read only."""
    out = tmp_path_factory.mktemp("run") / "run"
    settings = tmp_path_factory.mktemp("settings") / "settings.toml"
    settings.write_text('target = "orin-nx-16gb"\n[quantize]\nseed = 3\nmethod = "rtn"\n')
    arguments = ["all", "-m", tiny_qwen2_vl, "--calib", tiny_manifest, "--data", evaluation, "-o", out]
    assert main([str(a) for a in [*arguments, "--config", settings, "--set", "quantize.seed=4"]]) == 0
    return out


def call(capsys, *arguments) -> tuple[int, dict]:
    capsys.readouterr()
    code = main([str(a) for a in [*arguments, "--format", "json"]])
    out = capsys.readouterr().out
    return code, json.loads(out) if out else {}


def test_run_json_says_what_happened(finished):
    record = json.loads((finished / "run.json").read_text())
    assert (record["status"], record["exit_code"]) == ("done", 0)
    names = [stage["name"] for stage in record["stages"]]
    assert names == ["10-plan", "20-quantize", "25-evaluate", "30-export", "40-rewrite", "50-validate"]
    assert set(record["result"]["accuracy"]) == {"fp", "rtn"}
    assert record["versions"]["torch"]


def test_settings_say_where_they_came_from(finished):
    resolved = json.loads((finished / "config.resolved.json").read_text())
    assert resolved["settings"]["quantize"]["seed"] == 4
    origin = resolved["origin"]
    assert (origin["quantize.seed"], origin["target"], origin["model"]) == ("set", "file", "flag")
    assert origin["quantize.bits"] == "default"


def test_every_part_is_in_the_bit_plan(finished):
    plan = json.loads((finished / "bundle" / "bitplan.json").read_text())
    assert {layer["part"] for layer in plan["layers"]} == {"language", "vision", "projector", "embedding", "head"}


def test_report_is_one_file_without_network(finished):
    text = (finished / "report.html").read_text()
    assert "data:image/png" in text
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text


def test_the_same_command_reuses_every_stage(finished, tiny_qwen2_vl, tiny_manifest, evaluation, tmp_path, capsys):
    again = Path(shutil.copytree(finished, tmp_path / "run"))
    arguments = ["all", "-m", tiny_qwen2_vl, "--calib", tiny_manifest, "--data", evaluation, "-o", again]
    arguments += ["--target", "orin-nx-16gb", "--set", "quantize.seed=4", "--set", "quantize.method=rtn"]
    manifest = (again / "bundle" / "manifest.json").read_bytes()
    damaged = again / "stages" / "30-export" / "embed.onnx"
    damaged.write_bytes(damaged.read_bytes() + b"x")
    code, _ = call(capsys, *arguments, "--resume", "required")
    stages = json.loads((again / "run.json").read_text())["stages"]
    assert code == 0
    assert [stage["name"] for stage in stages if not stage["reused"]] == ["30-export"], (
        "only the damaged stage is made again"
    )
    assert (again / "bundle" / "manifest.json").read_bytes() == manifest, "same inputs, same bytes"
    code, _ = call(capsys, *arguments, "--resume", "never")
    assert code == 2


def test_stopped_runs_keep_finished_stages(tiny_qwen2_vl, tiny_manifest, tmp_path, capsys, monkeypatch):
    from toolchain.graph import export

    def stop(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "reference_graphs_from_model", stop)
    arguments = [
        "all",
        "-m",
        tiny_qwen2_vl,
        "--calib",
        tiny_manifest,
        "-o",
        tmp_path / "run",
        "--set",
        "quantize.method=rtn",
    ]
    assert main([str(a) for a in arguments]) == 75
    assert "the same command goes on from there" in capsys.readouterr().err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["status"], record["exit_code"]) == ("stopped", 75)
    assert [stage["name"] for stage in record["stages"]] == ["10-plan", "20-quantize"]
    assert not list((tmp_path / "run" / "stages").glob("*.partial"))


def test_the_bundle_answers(finished, tiny_manifest, capsys, tmp_path):
    image = tiny_manifest.parent / "0.png"
    code, found = call(
        capsys, "run", finished / "bundle", "--image", image, "--prompt", "Read row 1.", "--max-new-tokens", 5
    )
    assert (code, found["tokens"] <= 5, found["provider"]) == (0, True, "cpu")
    broken = tmp_path / "broken.png"
    broken.write_bytes(image.read_bytes()[:80])
    for path, words in ((broken, "broken.png cannot be read"), (tmp_path / "gone.png", "gone.png does not exist")):
        assert main(["run", str(finished / "bundle"), "--image", str(path), "--prompt", "?"]) == 7
        assert words in capsys.readouterr().err


def test_a_provider_that_is_absent_is_refused(finished, capsys):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the CUDA provider")
    assert main(["run", str(finished / "bundle"), "--prompt", "?", "--provider", "cuda"]) == 6
    assert "onnxruntime-gpu" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--tokens", "5000"], ["--prompt", "word " * 5000]])
def test_a_profile_beyond_the_planned_context_is_refused_before_anything_runs(finished, tmp_path, capsys, flags):
    assert main(["profile", str(finished / "bundle"), "-o", str(tmp_path / "p"), *flags]) == 5
    error = capsys.readouterr().err
    assert "exceed the context of" in error
    assert "planned for orin-nx-16gb" in error
    assert not (tmp_path / "p").exists()


def test_bundle_and_report_are_made_again(finished, tmp_path, capsys):
    code, found = call(capsys, "bundle", finished, "-o", tmp_path / "copy")
    assert code == 0
    assert (tmp_path / "copy" / "manifest.json").read_bytes() == (finished / "bundle" / "manifest.json").read_bytes()
    code, found = call(capsys, "inspect", tmp_path / "copy")
    assert (code, found["kind"]) == (0, "bundle")
    code, found = call(capsys, "report", finished)
    assert (code, Path(found["report"]).is_file()) == (0, True)


def test_a_wrong_table_fails_the_gate_and_is_named(finished, tiny_qwen2_vl, tiny_manifest, tmp_path, capsys):
    stages = finished / "stages"
    device = Path(shutil.copytree(stages / "40-rewrite" / "device", tmp_path / "device"))
    tensors = load_file(device / "weights.safetensors")
    name = next(n for n in tensors if n.endswith("scales") and "layers.1" in n)
    save_file(tensors | {name: np.asarray(tensors[name] * 1.01, dtype=np.float16)}, device / "weights.safetensors")
    arguments = [
        "validate",
        "-m",
        tiny_qwen2_vl,
        "--quantized",
        stages / "20-quantize",
        "--graphs",
        stages / "30-export",
    ]
    arguments += ["--device", device, "--calib", tiny_manifest, "-o", tmp_path / "validated"]
    assert main([str(a) for a in arguments]) == 4
    error = capsys.readouterr().err
    assert "first tap beyond its budget is decoder/" in error
    assert not (tmp_path / "validated").exists()


def test_streamed_answers_and_equal_seeds(finished, tiny_manifest, capsys):
    command = [
        "run",
        str(finished / "bundle"),
        "--image",
        str(tiny_manifest.parent / "0.png"),
        "--prompt",
        "Read row 1.",
    ]
    command += ["--max-new-tokens", "8"]
    assert main(command) == 0
    plain = capsys.readouterr().out
    assert main([*command, "--stream"]) == 0
    assert capsys.readouterr().out == plain
    drawn = []
    for seed in (1, 1, 2, 3):
        assert main([*command, "--temperature", "3", "--seed", str(seed)]) == 0
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1


def test_a_chat_keeps_the_conversation_and_what_is_computed(finished, tiny_manifest, capsys, monkeypatch):
    lines = (
        f"/image '{tiny_manifest.parent / '0.png'}'\nRead row 1.\nRead row 2.\n/reset\nRead row 1.\n/exit\nno more\n"
    )
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main(["chat", str(finished / "bundle"), "--max-new-tokens", "4", "--format", "json"]) == 0
    decoder, replies = json.JSONDecoder(), []
    text = capsys.readouterr().out.strip()
    while text:
        reply, end = decoder.raw_decode(text)
        replies.append(reply)
        text = text[end:].strip()
    first, second, third = replies
    assert first["image_tokens"] > 0
    assert first["reused_tokens"] == 0
    assert second["reused_tokens"] >= first["prompt_tokens"]
    assert second["image_tokens"] == first["image_tokens"]
    assert third["image_tokens"] == 0
    assert third["prompt_tokens"] < first["prompt_tokens"]


def test_a_chat_that_is_piped_ends_with_the_refusals_code(finished, capsys, monkeypatch):
    for lines, code, words in (
        ("/image gone.png\n", 7, "gone.png does not exist"),
        ("/picture x.png\n", 2, "/picture is no command here"),
        ("word " * 2000 + "\n", 5, "exceed the context of 1024 planned for orin-nx-16gb"),
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        assert main(["chat", str(finished / "bundle")]) == code
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--seed", "3"], 2, "no effect at temperature 0"),
        (["--engines", "e"], 2, "--engines has no effect with --backend ort"),
        (["--backend", "tensorrt"], 2, "needs --engines"),
        (["--backend", "tensorrt", "--engines", "e", "--provider", "cuda"], 2, "--provider has no effect"),
        (["--stream", "--format", "json"], 2, "--stream has no effect with --format json"),
        (["--max-new-tokens", "9999"], 5, "up to 9999 new ones exceed the context of 1024 planned for orin-nx-16gb"),
    ],
)
def test_questions_that_cannot_be_answered_are_refused(finished, capsys, flags, code, words):
    assert main(["run", str(finished / "bundle"), "--prompt", "?", *flags]) == code
    assert words in capsys.readouterr().err


def test_the_bundle_says_what_a_person_at_the_board_types(finished):
    bundle = finished / "bundle"
    text = (bundle / "README.md").read_text()
    assert "NVIDIA Jetson Orin NX 16GB" in text
    wheel = next((bundle / "wheel").iterdir()).name
    assert f"pip install --no-deps wheel/{wheel}" in text
    profiles = json.loads((bundle / "processor" / "host.json").read_text())["profiles"]["graphs"]
    context = json.loads((bundle / "memory.json").read_text())["workload"]["context_tokens"]
    assert profiles["embed"]["input_ids"][-1] == [1, min(context, 1024)], "the plan's context, or the checkpoint's"


@pytest.mark.rtx
def test_the_bundle_builds_with_tensorrt_for_rtx(finished, tmp_path, capsys):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    code, found = call(capsys, "build", finished / "bundle", "--backend", "tensorrt_rtx", "-o", tmp_path / "engines")
    assert (code, found["sm"]) == (0, "86")
    for engine in found["engines"]:
        assert (tmp_path / "engines" / engine["file"]).stat().st_size == engine["bytes"]
        assert engine["dense_bytes"] > 0
    assert {e["graph"]: e["profiles"] for e in found["engines"]} == {"vision": 1, "embed": 1, "decoder": 2}
    record = json.loads((tmp_path / "engines" / "build.json").read_text())
    assert record["bundle"] == json.loads((finished / "bundle" / "manifest.json").read_text())["manifest_sha256"]


@pytest.mark.rtx
def test_engines_without_a_device_are_refused(finished, tmp_path, capsys):
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    digest = json.loads((finished / "bundle" / "manifest.json").read_text())["manifest_sha256"]
    record = {"backend": "tensorrt_rtx", "builder_version": trt.__version__, "bundle": digest, "engines": []}
    (tmp_path / "build.json").write_text(json.dumps(record))
    command = ["run", finished / "bundle", "--prompt", "?", "--backend", "tensorrt_rtx", "--engines", tmp_path]
    assert main([str(word) for word in command]) == 6
    error = capsys.readouterr().err
    assert "CUDA" in error
    assert "Traceback" not in error
