"""Both families from a quantized checkpoint through export, rewrite and validation, and into a TensorRT compiler."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from toolchain.calibration import read_manifest
from toolchain.checkpoint import load_model, load_quantized
from toolchain.device.answer import greedy
from toolchain.device.families.base import open_image
from toolchain.device.ort import ort_graphs
from toolchain.errors import EnvironmentMismatch, NumericGateError
from toolchain.graph.compare import Source, answered, compare_calls
from toolchain.graph.export import reference_graphs_from_model
from toolchain.graph.pipeline import device_form, portable_form
from toolchain.graph.plugin_op import device_graphs
from toolchain.graph.reference import load_reference, record_calls
from toolchain.graph.validate import mixed_batches, validate_line
from toolchain.models.family import family_for, read_config
from toolchain.models.runner import torch_graphs
from toolchain.modules import keep_decoded, vq_modules
from toolchain.quantize import quantize_checkpoint

GRAPHS = ("vision", "embed", "decoder")


@pytest.fixture(scope="module", params=["tiny_qwen2_vl", "tiny_internvl"])
def line(request, tiny_manifest, tmp_path_factory) -> SimpleNamespace:
    """One family's stage folders, made once. Read only."""
    model: Path = request.getfixturevalue(request.param)
    root = tmp_path_factory.mktemp(request.param)
    samples = read_manifest(tiny_manifest)
    quantize_checkpoint(model, samples[:2], root / "quantized", method="rtn")
    quantized = load_quantized(root / "quantized")
    family = family_for(read_config(model))
    for name in ("reference", "device", "portable"):
        (root / name).mkdir()
    exported = reference_graphs_from_model(quantized, family, root / "reference")
    report = device_form(root / "reference", root / "device")
    portable_form(root / "reference", root / "portable")
    host = family.load_host(read_config(model), model)
    return SimpleNamespace(
        root=root, model=model, quantized=quantized, family=family, exported=exported, report=report, host=host,
        samples=samples,
    )  # fmt: skip


def prompts_of(line, count: int):
    return [line.host.prepare(open_image(s.image), s.prompt) for s in line.samples[:count]]


def against(name: str, graphs, calls):
    return compare_calls("torch", calls, name, answered(Source(name, graphs), calls))


@pytest.fixture(scope="module")
def recorded(line):
    """Every call of the quantized torch model over prefill and three decode steps."""
    with keep_decoded(line.quantized):
        graphs = torch_graphs(line.family, line.quantized)
        return record_calls(line.host, graphs, mixed_batches(prompts_of(line, 4)), 3)


def validate(line, folder: Path, **options):
    stages = (line.model, line.root / "quantized", line.root / "reference", line.root / "device")
    return validate_line(line.family, *stages, line.samples[:2], folder, **({"steps": 2} | options))


def test_every_form_agrees_at_every_tap(line, tmp_path):
    result = validate(line, tmp_path)
    assert result.passed
    assert "2 of 2 answers equal generate" in result.text()
    data = json.loads((tmp_path / "validation.json").read_text())
    full, reference, device = data["reports"]
    assert [report["b"] for report in data["reports"]] == ["pytorch-quantized", "onnx-reference", "onnx-device"]
    assert {tap["verdict"] for tap in full["taps"]} == {"reported"}
    assert full["taps"][0]["relative"] > 1e-3
    taps = [tap["tap"] for tap in reference["taps"]]
    first = ["vision.blocks.0", "vision.blocks.1", "image_features", "inputs_embeds", "decoder.layers.0"]
    assert taps[:7] == [*first, "decoder.layers.1", "logits"]
    assert taps[7:] == [f"present.{i}.{name}" for i in (0, 1) for name in ("key", "value")]
    assert not any("layers" in tap["tap"] or "blocks" in tap["tap"] for tap in device["taps"])
    assert all(tap["share"] < 0.1 for report in (reference, device) for tap in report["taps"])


def test_stored_reference_can_be_repeated_by_the_portable_graphs(line, tmp_path):
    validate(line, tmp_path, steps=1)
    calls = load_reference(tmp_path)
    report = against("portable", ort_graphs(line.root / "portable"), calls)
    report.require()
    assert {tap.tap for tap in report.taps} >= {"image_features", "inputs_embeds", "logits", "present.1.value"}
    assert not any("layers" in name or "blocks" in name for call in calls for name in call.outputs)


def test_a_failed_gate_writes_the_report_and_raises(line, tmp_path, monkeypatch):
    def broken(folder: Path):
        graphs = device_graphs(folder)
        return graphs | {"embed": lambda feeds: {k: 1.1 * v for k, v in graphs["embed"](feeds).items()}}

    monkeypatch.setattr("toolchain.graph.validate.device_graphs", broken)
    with pytest.raises(NumericGateError, match=r"onnx-device against pytorch-quantized: .* embed/inputs_embeds"):
        validate(line, tmp_path)
    assert json.loads((tmp_path / "validation.json").read_text())["passed"] is False


def test_recorded_calls_cover_padding_and_mixed_picture_sizes(recorded):
    masks = [call.feeds["attention_mask"] for call in recorded if call.graph == "decoder"]
    assert any((mask == 0).any() for mask in masks)
    assert len({call.feeds["pixel_values"].shape[0] for call in recorded if call.graph == "vision"}) > 1
    assert {call.step for call in recorded} >= {"batch1.0.prefill", "batch2.1.decode3"}


def test_greedy_answers_of_the_graphs_equal_generate(line):
    processor = line.family.load_processor(line.model)
    graphs = ort_graphs(line.root / "portable")
    for sample, prompt in zip(line.samples[:3], prompts_of(line, 3)):
        inputs = processor.model_inputs(sample)
        with torch.no_grad(), keep_decoded(line.quantized):
            generated = line.quantized.generate(**inputs, max_new_tokens=8, do_sample=False)
        expected = generated[0, inputs["input_ids"].shape[1] :].tolist()
        assert greedy(line.host, graphs, [prompt], 8)[0] == expected


def test_a_changed_weight_is_found_at_its_tap(line, recorded, tmp_path):
    """One wrong scale in decoder layer 1 of the device form: layer 0 passes, layer 1's keys are the first to fail."""
    from safetensors.numpy import load_file, save_file

    for path in (line.root / "device").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "weights.safetensors")
    name = next(name for name in tensors if "language_model.layers.1.self_attn.k_proj" in name and "scales" in name)
    tensors[name] = tensors[name] * np.float16(1.5)
    save_file(tensors, tmp_path / "weights.safetensors")
    report = against("device", device_graphs(tmp_path), recorded[:3])
    failed = [tap.tap for tap in report.taps if tap.verdict == "fail"]
    assert "present.1.key" in failed
    assert "present.0.key" not in failed
    with pytest.raises(NumericGateError, match="device against torch: first tap beyond its budget"):
        report.require()


def test_a_provider_that_is_absent_is_an_environment_mismatch(line, tmp_path):
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(EnvironmentMismatch, match="cuda"):
        validate(line, tmp_path, provider="cuda")


def test_every_quantized_layer_is_a_node_of_some_graph(line):
    found = {node.name for graph in line.exported for node in onnx.load(graph.path).graph.node if node.domain == "mgvq"}
    assert found == set(vq_modules(line.quantized))


def test_kept_weights_are_those_of_the_checkpoint(line):
    state = line.quantized.state_dict()
    seen = 0
    for graph in line.exported:
        for tensor in onnx.load(graph.path).graph.initializer:
            if tensor.name in state and not tensor.name.endswith(("codes", "scales")):
                np.testing.assert_array_equal(numpy_helper.to_array(tensor), state[tensor.name].float().numpy())
                seen += 1
    assert seen > 10


def test_device_graphs_hold_no_uint8_and_no_bodies(line):
    for name in GRAPHS:
        model = onnx.load(line.root / "device" / f"{name}.onnx")
        assert not model.functions
        assert all(tensor.data_type != onnx.TensorProto.UINT8 for tensor in model.graph.initializer)


def test_the_float_model_exports_by_the_same_function(line, tmp_path):
    model = load_model(line.model)
    exported = reference_graphs_from_model(model, line.family, tmp_path)
    assert [graph.vq_nodes for graph in exported] == [0, 0, 0]
    calls = record_calls(line.host, torch_graphs(line.family, model), mixed_batches(prompts_of(line, 2)), 1)
    against("onnx", ort_graphs(tmp_path), calls).require()


@pytest.mark.rtx
@pytest.mark.parametrize("form", ["reference", "portable"])
def test_tensorrt_for_rtx_compiles_every_graph_without_a_gpu(line, form, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    from toolchain.device.engine import DEFAULT_SM, Builder, load_backend

    builder = Builder(load_backend("tensorrt_rtx"), "tensorrt_rtx", DEFAULT_SM, None, None)
    profiles = line.family.profiles(read_config(line.model), line.model)
    for name in GRAPHS:
        built = builder.build(name, line.root / form / f"{name}.onnx", profiles[name], tmp_path / f"{name}.engine")
        assert built.bytes > 0
