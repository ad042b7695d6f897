"""Exported reference graphs: names, weights, bodies, and the model left as it was."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from vq_samples import TinyModel, tiny_graphs

from toolchain.checkpoint.modules import vq_modules
from toolchain.device.generation.ort_graphs import open_session, session_graph
from toolchain.graph.export import TAPS_KEY, export_graph
from toolchain.graph.export_modules import export_twins
from toolchain.graph.op import vq_op
from toolchain.models.family import GraphSpec
from toolchain.vq import format as vq_format


def initializers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def ours(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if vq_op.is_vq_op(node.op_type, node.domain)]


def test_every_layer_is_one_node_named_after_its_module(tiny_model, tiny_reference):
    found = {}
    for graph in tiny_reference.exported:
        found |= {node.name: node.op_type for node in ours(onnx.load(graph.path))}
    assert set(found) == set(vq_modules(tiny_model))
    assert found["q"] == "VQLinearBias"
    assert found["k"] == "VQLinear"
    assert found["mix"] == "VQLinearBiasSpan2"
    assert found["embed"] == "VQEmbedding"


def test_weights_in_the_graph_are_those_of_the_module_bit_for_bit(tiny_model, tiny_reference):
    modules = vq_modules(tiny_model)
    for graph in tiny_reference.exported:
        model = onnx.load(graph.path)
        arrays = initializers(model)
        for node in ours(model):
            module = modules[node.name]
            symbols = vq_format.unpack(module.codes.numpy(), module.code, module.rows, module.columns)
            np.testing.assert_array_equal(arrays[f"{node.name}.codes"], symbols)
            np.testing.assert_array_equal(arrays[f"mgvq_tables.{module.codebook_id}"], module.codebook.float().numpy())
            np.testing.assert_array_equal(arrays[f"{node.name}.scales"], module.scales.float().numpy())


def test_layers_that_share_a_table_share_an_initializer(tiny_reference):
    node_of = {node.name: node for node in ours(onnx.load(tiny_reference.folder / "decoder.onnx"))}
    assert node_of["q"].input[2] == node_of["k"].input[2] == node_of["v"].input[2]


def test_graphs_compute_what_the_model_does(tiny_model, tiny_reference, tiny_feeds):
    for spec in tiny_graphs(tiny_model):
        run = session_graph(open_session(tiny_reference.folder / f"{spec.name}.onnx"))
        (feed,) = tiny_feeds[spec.name].values()
        with torch.no_grad():
            expected = spec.module(torch.from_numpy(feed))
        expected = expected if isinstance(expected, tuple) else (expected,)
        for name, tensor in zip(spec.output_names, expected):
            found = run(tiny_feeds[spec.name])[name]
            assert np.linalg.norm(found - tensor.numpy()) <= 1e-5 * np.linalg.norm(tensor.numpy())


def test_taps_are_written_into_the_graph_and_machine_paths_are_not(tiny_reference):
    path = tiny_reference.folder / "decoder.onnx"
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(metadata[TAPS_KEY]) == ["decoder.layers.0"]
    assert b".py" not in path.read_bytes()


def test_inputs_have_named_dimensions(tiny_reference):
    shape = onnx.load(tiny_reference.folder / "decoder.onnx").graph.input[0].type.tensor_type.shape
    assert [dim.dim_param or dim.dim_value for dim in shape.dim] == ["batch", "sequence", 64]


def test_the_model_is_left_as_it_was(tiny_model, tiny_reference):
    before = vq_modules(tiny_model)
    with export_twins(tiny_model):
        assert not vq_modules(tiny_model)
    after = vq_modules(tiny_model)
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)


def test_twins_are_swapped_back_after_a_failure():
    model = TinyModel()
    before = vq_modules(model)
    with pytest.raises(RuntimeError), export_twins(model):
        raise RuntimeError
    assert all(before[name] is module for name, module in vq_modules(model).items())


def test_exporting_twice_writes_the_same_bytes(tiny_model, tiny_reference, tmp_path):
    with export_twins(tiny_model):
        names = {module: name for name, module in tiny_model.named_modules()}
        export_graph(tiny_graphs(tiny_model)[1], names, tmp_path)
    for name in ("embed.onnx", "embed.onnx.data"):
        assert (tmp_path / name).read_bytes() == (tiny_reference.folder / name).read_bytes()


def test_a_float_model_exports_without_our_domain(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.GELU()).eval()
    spec = GraphSpec("dense", module, (torch.ones(2, 8),), ("x",), ("y",), ({0: torch.export.Dim("batch")},))
    exported = export_graph(spec, dict.fromkeys(module.modules(), "m"), tmp_path)
    model = onnx.load(exported.path)
    assert exported.vq_nodes == 0
    assert not model.functions
    assert [entry.domain for entry in model.opset_import] == [""]
