"""Tiles of queries: the same numbers, no whole score tensor, and a reason where a chain is left."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from small_graphs import normal, run_graph, small_graph, step

from toolchain.graph.passes.tile_queries import tile_queries

CHAIN = [
    step("Transpose", "k", "k_t", perm=[0, 2, 1]),
    step("MatMul", "q k_t", "scores"),
    step("Softmax", "scores", "shares", axis=-1),
    step("MatMul", "shares v", "y"),
]


def attention(folder, rows="n", softmax_axis=-1):
    nodes = [*CHAIN[:2], step("Softmax", "scores", "shares", axis=softmax_axis), CHAIN[3]]
    inputs = dict.fromkeys("qkv", ("float", 2, rows, 4))
    return small_graph(folder, nodes, inputs, ["y"])


def feeds(rows: int) -> dict[str, np.ndarray]:
    return {name: normal(2, rows, 4, seed=seed) for seed, name in enumerate("qkv")}


def largest(rows: int) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys("qkv", (2, rows, 4))


@pytest.mark.parametrize("rows", [4, 5, 7, 31, 40])
def test_tiles_change_no_output_at_any_length(tmp_path, rows):
    """Four tiles for 40 rows; fewer rows than that, and rows that do not divide, are tiled too."""
    graph = attention(tmp_path)
    expected = run_graph(graph.copy(), tmp_path, feeds(rows))["y"]
    result = tile_queries(graph, largest(40), scores_bytes=2 * 40 * 40 * 4 // 4)
    assert result.done == ("scores",)
    assert sum(node.op == "Softmax" for node in graph.nodes) == 4
    found = run_graph(graph, tmp_path, feeds(rows))["y"]
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)


def test_no_score_tensor_exceeds_the_limit_and_tiles_run_one_after_the_other(tmp_path):
    limit = 3000
    graph = attention(tmp_path)
    tile_queries(graph, largest(40), scores_bytes=limit)
    run_graph(graph, tmp_path, feeds(40))
    model = onnx.load(tmp_path / "run.onnx")
    sizes = {
        name: np.asarray(x).nbytes
        for name, x in ReferenceEvaluator(model).run(None, feeds(40), intermediate=True).items()
    }
    scores = [size for name, size in sizes.items() if "MatMul_0" in name or "Softmax" in name]
    assert max(scores) <= limit * 1.25  # rows are interleaved whole: a tile may have one more than its share
    assert sum(scores) >= 2 * 2 * 40 * 40 * 4
    order = [node.name.split("/")[0] for node in model.graph.node if ".tile." in node.name]
    assert order == sorted(order, key=lambda name: int(name.rpartition(".")[2]))


def test_fixed_rows_take_constant_bounds(tmp_path):
    graph = attention(tmp_path, rows=10)
    expected = run_graph(graph.copy(), tmp_path, feeds(10))["y"]
    tile_queries(graph, {}, scores_bytes=300)
    assert not any(node.op == "Shape" for node in graph.nodes)
    np.testing.assert_allclose(run_graph(graph, tmp_path, feeds(10))["y"], expected, rtol=2e-6, atol=1e-6)


def test_small_scores_are_left_as_they_are(tmp_path):
    graph = attention(tmp_path)
    before = [node.name for node in graph.nodes]
    assert tile_queries(graph, largest(40)).done == ()
    assert [node.name for node in graph.nodes] == before


def test_more_tiles_than_serve_are_said(tmp_path):
    """128 rows in tiles of one row each: 64 tiles of two are made, and what they hold is reported."""
    graph = attention(tmp_path)
    result = tile_queries(graph, largest(128), scores_bytes=1024)
    assert sum(node.op == "Softmax" for node in graph.nodes) == 64
    assert result.refused[0].reason.startswith(
        "131,072 bytes of scores take 128 tiles, more than 64: a tile holds 2,048"
    )


def test_chains_that_are_left_say_why(tmp_path):
    (unknown,) = tile_queries(attention(tmp_path), {}, scores_bytes=1).refused
    assert "has sizes that the largest inputs do not give" in unknown.reason
    (turned,) = tile_queries(attention(tmp_path, softmax_axis=1), largest(40), scores_bytes=1).refused
    assert turned.reason == "softmax runs along axis 1, expected the last, the keys"
