"""Rewriting changes no output; each pass says what it refused and why."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from safetensors.numpy import load_file

from toolchain.device.generation.ort_graphs import open_session, session_graph
from toolchain.errors import InputDataError, MgvqError, UsageError
from toolchain.graph import rewrite as pipeline
from toolchain.graph.op import vq_op
from toolchain.graph.op.plugin_op import SIDECAR, device_graphs
from toolchain.graph.passes.externalize_weights import Sidecar, externalize_weights
from toolchain.graph.passes.fuse_shared_input import fuse_shared_input
from toolchain.graph.passes.plugin_attributes import plugin_attributes
from toolchain.graph.passes.remove_bodies import remove_bodies
from toolchain.graph.passes.strip_taps import strip_taps

GRAPHS = ("vision", "embed", "decoder")


def imported(reference, name: str = "decoder") -> gs.Graph:
    return pipeline.import_graph(reference.folder / f"{name}.onnx")[0]


def run_saved(graph: gs.Graph, folder: Path, feeds) -> dict[str, np.ndarray]:
    """Outputs of a graph that still has its bodies, in onnxruntime."""
    pipeline._embed_constants(graph)
    pipeline.save_graph(graph, folder / "rewritten.onnx")
    return session_graph(open_session(folder / "rewritten.onnx"))(feeds)


def run_reference(reference, name: str, feeds) -> dict[str, np.ndarray]:
    return session_graph(open_session(reference.folder / f"{name}.onnx"))(feeds)


def assert_close(found, expected):
    # The same sums; matrix products of other widths may be blocked differently.
    for name in found:
        assert np.linalg.norm(found[name] - expected[name]) <= 2e-6 * np.linalg.norm(expected[name]), name


@pytest.fixture(scope="module")
def device(tiny_reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("device")
    return folder, pipeline.device_form(tiny_reference.folder, folder)


def test_strip_taps_keeps_the_other_outputs_bit_for_bit(tiny_reference, tiny_feeds, tmp_path):
    graph = imported(tiny_reference)
    result = strip_taps(graph, ["decoder.layers.0", "decoder.layers.9"])
    assert result.done == ("decoder.layers.0",)
    assert [(r.where, r.reason) for r in result.refused] == [("decoder.layers.9", "is not an output of the graph")]
    found = run_saved(graph, tmp_path, tiny_feeds["decoder"])
    assert list(found) == ["logits"]
    expected = run_reference(tiny_reference, "decoder", tiny_feeds["decoder"])
    np.testing.assert_array_equal(found["logits"], expected["logits"])


def test_fusing_changes_no_output(tiny_reference, tiny_feeds, tmp_path):
    graph = imported(tiny_reference)
    result = fuse_shared_input(graph)
    assert result.done == ("q+k+v",)
    node = next(node for node in graph.nodes if node.name == "q+k+v")
    assert node.op == "VQLinearBias"
    assert node.attrs["rows"] == 512
    found = run_saved(graph, tmp_path, tiny_feeds["decoder"])
    assert_close(found, run_reference(tiny_reference, "decoder", tiny_feeds["decoder"]))


def test_ragged_rows_are_refused_with_the_reason(tiny_reference):
    (refusal,) = fuse_shared_input(imported(tiny_reference)).refused
    assert refusal.where == "gate+up"
    assert refusal.reason.startswith("rows must be multiples of 128")
    assert "gate has 192, up has 192" in refusal.reason


def test_layers_with_different_tables_are_not_fused(tiny_reference):
    graph = imported(tiny_reference)
    node = next(node for node in graph.nodes if node.name == "v")
    node.inputs[2] = gs.Constant("other", node.inputs[2].values + 1)
    assert fuse_shared_input(graph).done == ("q+k",)


def test_fused_name_joins_full_names_of_different_parents(tiny_reference):
    graph = imported(tiny_reference)
    for node in graph.nodes:
        if node.name in ("q", "k", "v"):
            node.name = {"q": "a.q", "k": "a.k", "v": "b.v"}[node.name]
    assert fuse_shared_input(graph).done == ("a.q+a.k+b.v",)


def test_bodies_go_and_nodes_take_the_plugins_name(tiny_reference):
    graph = imported(tiny_reference)
    assert remove_bodies(graph).done == ("VQLinear", "VQLinearBias", "VQLinearBiasSpan2", "VQLinearSpan2")
    assert not graph.functions
    assert {node.op for node in graph.nodes if node.domain == vq_op.DOMAIN} == {"VQLinear"}


def test_externalized_weights_are_refused_when_they_would_change(tiny_reference):
    graph = imported(tiny_reference)
    node = next(node for node in graph.nodes if node.name == "gate")
    node.inputs[2] = gs.Constant("other", node.inputs[2].values + 0.5)
    node = next(node for node in graph.nodes if node.name == "down")
    node.inputs[3] = gs.Constant("finer", node.inputs[3].values * np.float32(1.0001))
    reasons = {r.where: r.reason for r in externalize_weights(graph, Sidecar()).refused}
    assert "does not fit int8 exactly" in reasons["gate"]
    assert "do not fit float16 exactly" in reasons["down"]


def test_a_refused_weight_stops_the_device_form(tiny_reference, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "externalize_weights", lambda graph, sidecar: strip_taps(graph, ["no weight"]))
    with pytest.raises(MgvqError, match=r"no UINT8 initializer, found \['.*codes'"):
        pipeline.device_form(tiny_reference.folder, tmp_path)


def test_plugin_attributes_are_on_every_node(device):
    for name in GRAPHS:
        for node in onnx.load(device[0] / f"{name}.onnx").graph.node:
            if node.domain == vq_op.DOMAIN:
                found = {a.name: a.s for a in node.attribute if a.name.startswith("plugin_")}
                assert found == {"plugin_version": b"1", "plugin_namespace": b""}


def test_int8_is_allowed_where_it_was_asked_for_and_has_kernels():
    def node(op, vector, **attributes):
        given = {"vector": vector, **attributes}
        return gs.Node(op, f"{op}{vector}", given, [gs.Variable("x")], [gs.Variable(f"{op}{vector}.y")], domain="mgvq")

    def allowed(asked):
        nodes = [node("VQLinear", 4), node("VQLinear", 2, allow_int8=1), node("VQEmbedding", 4)]
        plugin_attributes(gs.Graph(nodes), *asked)
        return {each.name: each.attrs["allow_int8"] for each in nodes if "allow_int8" in each.attrs}

    # Written where it is 0 too: for a field that a node lacks, TensorRT's parser warns that the build may fail.
    assert allowed(()) == {"VQLinear4": 0, "VQLinear2": 0}
    assert allowed((True,)) == {"VQLinear4": 1, "VQLinear2": 0}


def test_a_device_node_has_every_field_that_its_plugins_creator_lists(device):
    for name in GRAPHS:
        for node in onnx.load(device[0] / f"{name}.onnx").graph.node:
            if node.domain == vq_op.DOMAIN:
                asked = {x.name for x in vq_op.ATTRIBUTES} | ({"allow_int8"} if node.op_type == "VQLinear" else set())
                assert {x.name for x in node.attribute} == asked | {"plugin_version", "plugin_namespace"}


def test_a_device_form_allows_int8_only_where_its_options_do(tiny_reference, device, tmp_path):
    def found(folder):
        nodes = [node for name in GRAPHS for node in onnx.load(folder / f"{name}.onnx").graph.node]
        ours = [({x.name: x.i for x in node.attribute}, node.op_type) for node in nodes if node.domain == vq_op.DOMAIN]
        return [(kind, values["vector"], values.get("allow_int8", 0)) for values, kind in ours]

    def said(folder):
        return json.loads((folder / pipeline.REPORT).read_text())["int8_activations"]

    assert {allowed for _, _, allowed in found(device[0])} == {0}
    assert said(device[0]) is False
    pipeline.device_form(tiny_reference.folder, tmp_path, pipeline.RewriteOptions(int8_activations=True))
    for kind, vector, allowed in found(tmp_path):
        assert allowed == int(kind == "VQLinear" and vector == 4)
    assert any(allowed for _, _, allowed in found(tmp_path))
    assert said(tmp_path) is True


def test_plugin_attributes_replace_what_is_there(tiny_reference):
    graph = imported(tiny_reference, "embed")
    node = next(node for node in graph.nodes if node.domain == vq_op.DOMAIN)
    node.attrs["plugin_version"] = "7"
    assert plugin_attributes(graph).done == ("embed",)
    assert node.attrs["plugin_version"] == "1"


def test_device_graphs_compute_what_the_reference_graphs_do(device, tiny_reference, tiny_feeds):
    graphs = device_graphs(device[0], "float32")
    for name in GRAPHS:
        found = graphs[name](tiny_feeds[name])
        assert "decoder.layers.0" not in found
        assert_close(found, run_reference(tiny_reference, name, tiny_feeds[name]))


def test_the_devices_arithmetic_rounds_what_the_plugin_multiplies_with(device, tiny_reference, tiny_feeds):
    """x in float16 has an error of 2^-12 on average; an embedding multiplies with nothing."""
    graphs = device_graphs(device[0])
    for name, low, high in (("vision", 1e-5, 1e-3), ("decoder", 1e-5, 2e-3), ("embed", 0, 2e-6)):
        expected = run_reference(tiny_reference, name, tiny_feeds[name])
        for output, found in graphs[name](tiny_feeds[name]).items():
            error = np.linalg.norm(found - expected[output]) / np.linalg.norm(expected[output])
            assert low <= error <= high, (name, output)


def test_an_unknown_arithmetic_or_precision_is_refused(device):
    with pytest.raises(UsageError, match="arithmetic 'bf16': expected one of device, float32"):
        device_graphs(device[0], "bf16")
    with pytest.raises(UsageError, match="precision 'half': expected one of mixed, float32"):
        pipeline.RewriteOptions(precision="half")


def test_device_graphs_hold_no_bodies_and_no_uint8(device):
    for name in GRAPHS:
        model = onnx.load(device[0] / f"{name}.onnx")
        assert not model.functions
        assert all(tensor.data_type != onnx.TensorProto.UINT8 for tensor in model.graph.initializer)


def test_every_weight_input_stands_in_the_sidecar_with_its_type(device):
    stored = load_file(device[0] / SIDECAR)
    bound = set()
    for name in GRAPHS:
        graph = onnx.load(device[0] / f"{name}.onnx").graph
        for entry in list(graph.input)[1:]:
            array, shape = stored[entry.name], [dim.dim_value for dim in entry.type.tensor_type.shape.dim]
            assert (list(array.shape), array.dtype) == (
                shape,
                onnx.helper.tensor_dtype_to_np_dtype(entry.type.tensor_type.elem_type),
            )
            bound.add(entry.name)
    assert bound == set(stored)


def test_a_tied_head_is_stored_once(device, tiny_model):
    stored = load_file(device[0] / SIDECAR)
    codes = [name for name, array in stored.items() if array.nbytes == tiny_model.embed.codes.numel()]
    of_the_vocabulary = [name for name in codes if "embed" in name or "head" in name]
    assert len(of_the_vocabulary) == 1
    assert len({array.tobytes() for array in stored.values()}) == len(stored)


def test_sidecar_refuses_one_name_for_two_contents():
    sidecar = Sidecar()
    assert sidecar.add("a", np.zeros(4, np.int8)) == "a"
    assert sidecar.add("b", np.zeros(4, np.int8)) == "a"
    assert sidecar.add("c", np.zeros(4, np.float16)) == "c"
    with pytest.raises(MgvqError, match="two graphs give it different contents"):
        sidecar.add("a", np.ones(4, np.int8))


def test_report_says_what_was_done(device):
    folder, report = device
    data = json.loads((folder / pipeline.REPORT).read_text())
    assert data == json.loads(json.dumps(report.to_json()))
    decoder = next(graph for graph in data["graphs"] if graph["name"] == "decoder")
    assert [entry["name"] for entry in decoder["passes"]] == [
        "strip_taps",
        "merge_equal_nodes",
        "fuse_shared_input",
        "half_matmuls",
        "remove_bodies",
        "externalize_weights",
        "dense_inputs",
        "plugin_attributes",
    ]
    assert decoder["passes"][2]["done"] == ["q+k+v"]
    assert data["sidecar"]["bytes"] == sum(a.nbytes for a in load_file(folder / SIDECAR).values())


def test_portable_form_is_the_reference_without_taps(tiny_reference, tiny_feeds, tmp_path):
    pipeline.portable_form(tiny_reference.folder, tmp_path)
    for name in GRAPHS:
        found = session_graph(open_session(tmp_path / f"{name}.onnx"))(tiny_feeds[name])
        expected = run_reference(tiny_reference, name, tiny_feeds[name])
        assert set(expected) - set(found) == ({"decoder.layers.0"} if name == "decoder" else set())
        for output in found:
            np.testing.assert_array_equal(found[output], expected[output])


def test_what_is_too_large_for_one_file_goes_beside_it(tiny_reference, tiny_feeds, tmp_path):
    graph = imported(tiny_reference)
    pipeline._embed_constants(graph)
    pipeline.save_graph(graph, tmp_path / "decoder.onnx", embed_limit_bytes=1000)
    assert (tmp_path / "decoder.onnx.data").stat().st_size > 1000
    found = session_graph(open_session(tmp_path / "decoder.onnx"))(tiny_feeds["decoder"])
    np.testing.assert_array_equal(
        found["logits"], run_reference(tiny_reference, "decoder", tiny_feeds["decoder"])["logits"]
    )


def test_missing_data_and_empty_folders_are_refused(tiny_reference, tmp_path):
    with pytest.raises(InputDataError, match="expected reference graphs"):
        pipeline.device_form(tmp_path, tmp_path)
    (tmp_path / "decoder.onnx").write_bytes((tiny_reference.folder / "decoder.onnx").read_bytes())
    with pytest.raises(InputDataError, match=r"decoder\.onnx\.data is not beside it"):
        pipeline.device_form(tmp_path, tmp_path)
    (tmp_path / "decoder.onnx").write_bytes(b"not a graph")
    with pytest.raises(InputDataError, match="expected an ONNX graph"):
        pipeline.import_graph(tmp_path / "decoder.onnx")


def test_device_graphs_without_their_sidecar_are_refused(device, tmp_path):
    (tmp_path / "embed.onnx").write_bytes((device[0] / "embed.onnx").read_bytes())
    with pytest.raises(InputDataError, match=r"expected device graphs and weights\.safetensors"):
        device_graphs(tmp_path)
