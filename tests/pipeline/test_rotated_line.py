"""Layers with rotated inputs go through export, rewrite and validation, and are fused like any others."""

from __future__ import annotations

import onnx
import pytest
import torch
from recorded_lines import made_line, validate
from rtx_engines import rtx_engine
from transformers import AutoModelForImageTextToText

from toolchain.calibration.manifest import read_manifest
from toolchain.files.folders import read_json
from toolchain.models.configs import read_config
from toolchain.values import BitPlan
from toolchain.vq.rotation import BLOCKS
from toolchain.vq.weights import Options

ALWAYS = Options(rounds=1, lloyd_rounds=2, samples=1_000, rotation_gain=100.0)
SQUARES = {(block, block) for block in BLOCKS}


@pytest.fixture(scope="module")
def rotated(tiny_qwen2_vl, tiny_manifest, tmp_path_factory):
    """A line in which every group of linears has its inputs rotated. Read only."""
    root = tmp_path_factory.mktemp("rotated")
    return made_line(tiny_qwen2_vl, read_manifest(tiny_manifest), root, method="mgvq-drift+rotate", options=ALWAYS)


def rotations(path) -> list[str]:
    """Names of the products with a rotation's block."""
    graph = onnx.load(path).graph
    blocks = {x.name for x in graph.initializer if tuple(x.dims) in SQUARES}
    return [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] in blocks]


def test_every_form_agrees(rotated, tmp_path):
    result = validate(rotated, tmp_path, steps=1)
    assert result.passed
    assert "2 of 2 answers equal generate" in result.text()


def test_transformers_loads_it(rotated):
    import toolchain.checkpoint.hf  # noqa: F401  (registers the format)

    loaded = AutoModelForImageTextToText.from_pretrained(rotated.root / "quantized", dtype=torch.float32).eval()
    ids = torch.arange(10, 20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, rotated.quantized(input_ids=ids).logits)


@pytest.mark.parametrize(("graph", "part"), [("decoder", "language"), ("vision", "vision")])
def test_layers_of_a_group_share_one_rotation(rotated, graph, part):
    plan = BitPlan.from_json(read_json(rotated.root / "quantized" / "bitplan.json"))
    groups = {layer.group for layer in plan.layers if layer.rotation and layer.part.startswith(part)}
    extra = {layer.group for layer in plan.layers if layer.rotation and layer.part == "projector"}
    expected = len(groups | extra) if graph == "vision" else len(groups)
    assert len(rotations(rotated.root / "device" / f"{graph}.onnx")) == expected > 1


def test_they_are_fused_like_any_others(rotated):
    """Gate and up read one rotated tensor; q, k and v of this model are too narrow to be fused."""
    device = onnx.load(rotated.root / "device" / "decoder.onnx", load_external_data=False).graph
    fused = {node.name for node in device.node if node.op_type == "VQLinear" and "+" in node.name}
    assert fused == {f"model.language_model.layers.{i}.mlp.gate_proj+up_proj" for i in (0, 1)}


@pytest.mark.rtx
def test_a_compiler_takes_rotated_inputs(rotated):
    profiles = rotated.family.profiles(read_config(rotated.model), rotated.model)
    for name in ("vision", "decoder"):
        assert rtx_engine(rotated.root / "portable" / f"{name}.onnx", [profiles[name]], "86") > 0
