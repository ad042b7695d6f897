"""Both families from a quantized checkpoint through export, rewrite and validation: every form agrees at every tap."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from recorded_lines import GRAPHS, against, prompts_of, validate

from toolchain.checkpoint.loading import load_model
from toolchain.checkpoint.modules import keep_decoded, vq_modules
from toolchain.device.engines.recorded_calls import load_reference, record_calls
from toolchain.device.generation.answer import greedy
from toolchain.device.generation.ort_graphs import ort_graphs
from toolchain.errors import EnvironmentMismatch, NumericGateError
from toolchain.graph.export import reference_graphs_from_model
from toolchain.graph.op.plugin_op import device_graphs
from toolchain.graph.validate import mixed_batches
from toolchain.models.runner import torch_graphs


def test_every_form_agrees_at_every_tap(line, tmp_path):
    result = validate(line, tmp_path)
    assert result.passed
    assert "2 of 2 answers equal generate" in result.text()
    data = json.loads((tmp_path / "validation.json").read_text())
    full, reference, exact, device = data["reports"]
    assert [report["b"] for report in data["reports"][1:]] == ["onnx-reference", "onnx-device-float32", "onnx-device"]
    assert {tap["verdict"] for tap in full["taps"]} == {"reported"}
    assert full["taps"][0]["relative"] > 1e-3
    taps = [tap["tap"] for tap in reference["taps"]]
    first = ["vision.blocks.0", "vision.blocks.1", "image_features", "inputs_embeds", "decoder.layers.0"]
    assert taps[:7] == [*first, "decoder.layers.1", "logits"]
    assert taps[7:] == [f"present.{i}.{name}" for i in (0, 1) for name in ("key", "value")]
    assert not any("layers" in tap["tap"] or "blocks" in tap["tap"] for tap in device["taps"])
    assert all(tap["share"] < 0.1 for report in (reference, exact) for tap in report["taps"])
    # Float16 work is budgeted by what the full-precision model loses in it, and is not free.
    logits = next(tap for tap in device["taps"] if tap["tap"] == "logits")
    assert 1e-5 < logits["relative"] < logits["budget"] < 0.05


def test_stored_reference_can_be_repeated_by_the_portable_graphs(line, tmp_path):
    validate(line, tmp_path, steps=1)
    calls = load_reference(tmp_path)
    report = against("portable", ort_graphs(line.root / "portable"), calls)
    report.require()
    assert {tap.tap for tap in report.taps} >= {"image_features", "inputs_embeds", "logits", "present.1.value"}
    assert not any("layers" in name or "blocks" in name for call in calls for name in call.outputs)


def test_a_failed_gate_writes_the_report_and_raises(line, tmp_path, monkeypatch):
    def broken(folder: Path, arithmetic: str = "device"):
        graphs = device_graphs(folder, arithmetic)
        return graphs | {"embed": lambda feeds: {k: 1.1 * v for k, v in graphs["embed"](feeds).items()}}

    monkeypatch.setattr("toolchain.graph.validate.device_graphs", broken)
    with pytest.raises(
        NumericGateError, match=r"onnx-device-float32 against pytorch-quantized: .* embed/inputs_embeds"
    ):
        validate(line, tmp_path)
    assert json.loads((tmp_path / "validation.json").read_text())["passed"] is False


def test_recorded_calls_cover_padding_and_mixed_image_sizes(recorded):
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
    report = against("device", device_graphs(tmp_path, "float32"), recorded[:3])
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
