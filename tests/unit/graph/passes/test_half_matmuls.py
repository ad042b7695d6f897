"""Float16 is where matrices meet and at the cache's border, and nowhere else."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from small_graphs import normal, relative, run_graph, small_graph, step

from toolchain.graph.op.plugin_op import _without_rounding
from toolchain.graph.passes.half_matmuls import half_matmuls


@pytest.fixture
def attention(tmp_path):
    """q, past.0.key [past, heads, size] and a new key → present.0.key and an answer, softmax between."""
    nodes = [
        step("Transpose", "past.0.key", "old_t", perm=[1, 2, 0]),
        step("MatMul", "q old_t", "old_scores"),
        step("MatMul", "x w", "new"),
        step("Transpose", "new", "new_t", perm=[0, 2, 1]),
        step("MatMul", "q new_t", "new_scores"),
        step("Concat", "old_scores new_scores", "scores", axis=-1),
        step("Softmax", "scores", "shares", axis=-1),
        step("MatMul", "shares values", "y"),
        step("Transpose", "new", "present.0.key", perm=[1, 0, 2]),
        step("Shape", "past.0.key", "size_of_past"),
        step("Cast", "size_of_past", "counted", to=int(TensorProto.FLOAT)),
    ]
    inputs = {
        "q": ("float", 2, "n", 8),
        "x": ("float", 2, "n", 4),
        "past.0.key": ("float", "p", 2, 8),
        "values": ("float", 2, "t", 3),
    }
    return small_graph(tmp_path, nodes, inputs, ["y", "present.0.key", "counted"], {"w": normal(4, 8)})


def feeds(dtype=np.float32) -> dict[str, np.ndarray]:
    return {
        "q": normal(2, 5, 8, seed=1),
        "x": normal(2, 5, 4, seed=2),
        "past.0.key": normal(7, 2, 8, seed=3).astype(np.float16).astype(dtype),
        "values": normal(2, 12, 3, seed=4),
    }


def test_matrices_are_half_and_softmax_is_float(attention, tmp_path):
    expected = run_graph(attention.copy(), tmp_path, feeds())
    result = half_matmuls(attention)
    assert set(result.done) == {
        *("old_scores", "new", "new_scores", "y"),
        *("past.0.key", "present.0.key"),
    }
    by_name = {node.name: node for node in attention.nodes}
    for name in ("old_scores", "new", "new_scores", "y"):
        assert all(tensor.dtype == np.float16 for tensor in by_name[name].inputs)
    assert by_name["shares"].inputs[0].dtype == np.float32
    found = run_graph(attention, tmp_path, feeds(np.float16))
    assert found["present.0.key"].dtype == np.float16
    assert found["y"].dtype == np.float32
    assert 1e-6 < relative(found["y"], expected["y"]) < 2e-3
    np.testing.assert_array_equal(found["counted"], [7, 2, 8])


def test_the_past_is_read_without_a_cast(attention):
    half_matmuls(attention)
    (past,) = (tensor for tensor in attention.inputs if tensor.name == "past.0.key")
    assert past.dtype == np.float16
    assert sorted(node.op for node in past.outputs) == ["Shape", "Transpose"]


def test_without_the_roundings_the_pass_changed_nothing(attention, tmp_path):
    """In float32 arithmetic only the weight's own rounding is left, and that is part of what is stored."""
    expected = run_graph(attention.copy(), tmp_path, feeds())
    half_matmuls(attention)
    run_graph(attention, tmp_path, feeds(np.float16))
    model = onnx.load(tmp_path / "run.onnx")
    _without_rounding(model)
    evaluator = ReferenceEvaluator(model)
    found = dict(zip(evaluator.output_names, evaluator.run(None, feeds())))
    assert found["present.0.key"].dtype == np.float32
    weight = normal(4, 8)
    rounded = relative(weight.astype(np.float16), weight)
    assert 0 < relative(found["present.0.key"], expected["present.0.key"]) < 2 * rounded


def test_angles_of_positions_stay_float(tmp_path):
    """2,049 and 2,048 are one float16 number: a rotary angle computed in it would be a whole position off."""
    nodes = [
        step("Cast", "positions", "float_positions", to=int(TensorProto.FLOAT)),
        step("MatMul", "float_positions frequencies", "angles"),
        step("Mul", "angles x", "y"),
    ]
    inputs = {"positions": ("int64", "n", 1), "x": ("float", "n", 4)}
    graph = small_graph(tmp_path, nodes, inputs, ["y"], {"frequencies": normal(1, 4)})
    result = half_matmuls(graph)
    assert not result.done
    assert [(x.where, "positions or sizes alone" in x.reason) for x in result.refused] == [("angles", True)]


def test_a_weight_beyond_float16_is_refused(tmp_path):
    nodes = [step("MatMul", "x w", "y")]
    graph = small_graph(tmp_path, nodes, {"x": ("float", "n", 4)}, ["y"], {"w": 1e5 * np.eye(4, dtype=np.float32)})
    (refusal,) = half_matmuls(graph).refused
    assert refusal.reason == "weight w reaches 100000, beyond float16"


def test_gemm_and_convolution_take_their_bias_along(tmp_path):
    nodes = [
        step("Conv", "image kernel offset", "maps", strides=[2, 2]),
        step("ReduceMean", "maps axes", "pooled", keepdims=0),
        step("Gemm", "pooled w c", "y"),
    ]
    weights = {
        "kernel": normal(6, 3, 2, 2),
        "offset": normal(6),
        "axes": np.array([2, 3]),
        "w": normal(6, 5),
        "c": normal(5),
    }
    graph = small_graph(tmp_path, nodes, {"image": ("float", "n", 3, 8, 8)}, ["y"], weights)
    image = {"image": normal(2, 3, 8, 8, seed=1)}
    expected = run_graph(graph.copy(), tmp_path, image)["y"]
    assert half_matmuls(graph).done == ("maps", "y")
    found = run_graph(graph, tmp_path, image)["y"]
    assert relative(found, expected) < 2e-3
    assert all(
        tensor.dtype == np.float16 for node in graph.nodes if node.op in ("Conv", "Gemm") for tensor in node.inputs
    )


def test_a_dense_embedding_is_stored_in_half_where_that_is_exact(tmp_path):
    table = normal(512, 128).astype(np.float16).astype(np.float32)
    graph = small_graph(tmp_path, [step("Gather", "table ids", "y")], {"ids": ("int64", "n")}, ["y"], {"table": table})
    assert half_matmuls(graph).done == ("y",)
    found = run_graph(graph, tmp_path, {"ids": np.array([3, 511])})["y"]
    np.testing.assert_array_equal(found, table[[3, 511]])
    inexact = small_graph(
        tmp_path, [step("Gather", "table ids", "y")], {"ids": ("int64", "n")}, ["y"], {"table": normal(512, 128)}
    )
    assert half_matmuls(inexact).refused[0].reason == "table table does not fit float16 exactly"
