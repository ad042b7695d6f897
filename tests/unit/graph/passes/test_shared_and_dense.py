"""merge_equal_nodes and dense_inputs: what is the same is computed once, what is large leaves the graph."""

from __future__ import annotations

import numpy as np
from safetensors.numpy import save_file
from small_graphs import normal, relative, run_graph, small_graph, step

from toolchain.graph.op.plugin_op import SIDECAR, device_graphs
from toolchain.graph.passes.dense_inputs import dense_inputs
from toolchain.graph.passes.externalize_weights import Sidecar
from toolchain.graph.passes.merge_equal_nodes import merge_equal_nodes
from toolchain.graph.rewrite import save_graph


def test_equal_slices_become_one_tensor(tmp_path):
    """Bounds are equal by content, not by name; what hangs behind equal nodes is equal in turn."""
    nodes = [
        step("Slice", "x zero four last", "a"),
        step("Slice", "x also_zero also_four last", "b"),
        step("Slice", "x four eight last", "c"),
        step("Neg", "a", "minus_a"),
        step("Neg", "b", "minus_b"),
        step("MatMul", "minus_a w", "first"),
        step("MatMul", "minus_b v", "second"),
        step("MatMul", "c v", "third"),
    ]
    bounds = {"zero": 0, "also_zero": 0, "four": 4, "also_four": 4, "eight": 8, "last": -1}
    weights = {name: np.array([value]) for name, value in bounds.items()} | {
        "w": normal(4, 3),
        "v": normal(4, 3, seed=1),
    }
    graph = small_graph(tmp_path, nodes, {"x": ("float", "n", 8)}, ["first", "second", "third"], weights)
    x = {"x": normal(5, 8)}
    expected = run_graph(graph.copy(), tmp_path, x)
    assert merge_equal_nodes(graph).done == ("b", "minus_b")
    by_name = {node.name: node for node in graph.nodes}
    assert by_name["first"].inputs[0] is by_name["second"].inputs[0]
    assert by_name["third"].inputs[0] is not by_name["first"].inputs[0]
    for name, found in run_graph(graph, tmp_path, x).items():
        np.testing.assert_array_equal(found, expected[name])


def test_outputs_random_nodes_and_other_attributes_are_not_merged(tmp_path):
    nodes = [
        step("Neg", "x", "y"),
        step("Neg", "x", "z"),
        step("RandomNormalLike", "x", "noise"),
        step("RandomNormalLike", "x", "more_noise"),
        step("Sub", "noise more_noise", "w"),
        step("Softmax", "x", "rows", axis=-1),
        step("Softmax", "x", "columns", axis=0),
        step("Sub", "rows columns", "v"),
    ]
    graph = small_graph(tmp_path, nodes, {"x": ("float", "n", 8)}, ["y", "z", "w", "v"])
    assert merge_equal_nodes(graph).done == ()
    assert len(graph.nodes) == len(nodes)


def test_large_dense_weights_are_bound_from_the_sidecar(tmp_path):
    nodes = [step("MatMul", "x w", "inner"), step("MatMul", "inner small", "y")]
    weights = {"w": normal(64, 64), "small": normal(64, 2)}
    graph = small_graph(tmp_path, nodes, {"x": ("float", "n", 64)}, ["y"], weights)
    x = {"x": normal(3, 64)}
    expected = run_graph(graph.copy(), tmp_path, x)["y"]
    sidecar = Sidecar()
    assert dense_inputs(graph, sidecar, large_bytes=8192).done == ("w",)
    assert [tensor.name for tensor in graph.inputs] == ["x", "w"]
    np.testing.assert_array_equal(sidecar.tensors["w"], weights["w"])
    (tmp_path / "device").mkdir()
    save_graph(graph, tmp_path / "device" / "decoder.onnx")
    save_file(sidecar.tensors, tmp_path / "device" / SIDECAR)
    assert relative(device_graphs(tmp_path / "device")["decoder"](x)["y"], expected) < 1e-6


def test_a_large_weight_that_others_read_is_refused(tmp_path):
    nodes = [step("MatMul", "x w", "inner"), step("Relu", "w", "kept"), step("MatMul", "inner kept", "y")]
    graph = small_graph(tmp_path, nodes, {"x": ("float", "n", 64)}, ["y"], {"w": normal(64, 64)})
    (refusal,) = dense_inputs(graph, Sidecar(), large_bytes=8192).refused
    assert (refusal.where, refusal.reason) == ("w", "is read by Relu too, which needs it in the graph")
