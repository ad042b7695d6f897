"""Large weights in parts: outputs unchanged, no part beyond a block, tied weights still shared."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from rtx_engines import rtx_engine

from toolchain.device.generation.ort_graphs import open_session, session_graph
from toolchain.errors import BudgetError
from toolchain.graph import rewrite as pipeline
from toolchain.graph.op import vq_op
from toolchain.graph.passes.externalize_weights import Sidecar, externalize_weights
from toolchain.graph.passes.split_rows import part_rows, split_rows
from toolchain.graph.rewrite import RewriteOptions
from toolchain.values import VQCode

BLOCK = 2048 + 1024  # head and embedding take 4,096 bytes in two groups of 2,048


def imported(reference, name: str) -> gs.Graph:
    return pipeline.import_graph(reference.folder / f"{name}.onnx")[0]


def outputs(path, feeds) -> dict[str, np.ndarray]:
    return session_graph(open_session(path))(feeds)


@pytest.mark.parametrize("name", ["decoder", "embed"])
def test_outputs_do_not_change(tiny_reference, tiny_feeds, tmp_path, name):
    graph = imported(tiny_reference, name)
    result = split_rows(graph, BLOCK)
    stem = "head" if name == "decoder" else "embed"
    assert result.done[-2:] == (f"{stem}.rows.0", f"{stem}.rows.1")
    pipeline._embed_constants(graph)
    pipeline.save_graph(graph, tmp_path / "split.onnx")
    expected = outputs(tiny_reference.folder / f"{name}.onnx", tiny_feeds[name])
    for key, found in outputs(tmp_path / "split.onnx", tiny_feeds[name]).items():
        np.testing.assert_allclose(found, expected[key], rtol=1e-6, atol=1e-6)


def test_every_id_finds_its_row_in_its_part(tiny_reference, tmp_path):
    graph = imported(tiny_reference, "embed")
    split_rows(graph, BLOCK)
    pipeline._embed_constants(graph)
    pipeline.save_graph(graph, tmp_path / "split.onnx")
    ids = {"ids": np.arange(256).reshape(2, 128)}
    expected = outputs(tiny_reference.folder / "embed.onnx", ids)["inputs_embeds"]
    np.testing.assert_array_equal(outputs(tmp_path / "split.onnx", ids)["inputs_embeds"], expected)


def test_no_part_is_beyond_a_block_and_a_tied_pair_shares_every_part(tiny_reference):
    sidecar = Sidecar()
    for name in ("decoder", "embed"):
        graph = imported(tiny_reference, name)
        split_rows(graph, BLOCK)
        externalize_weights(graph, sidecar)
    parts = {name: x for name, x in sidecar.tensors.items() if name.startswith(("head.", "embed.")) and "codes" in name}
    assert {x.nbytes for x in parts.values()} == {2048}
    assert len(parts) == 2


def test_a_row_group_larger_than_a_block_is_refused(tiny_reference, tmp_path):
    reasons = {x.where: x.reason for x in split_rows(imported(tiny_reference, "decoder"), BLOCK).refused}
    assert reasons["mix"] == "one group of 128 rows takes 8192 bytes, more than a block of 3072"
    with pytest.raises(BudgetError, match=r"graph decoder: .*mix: one group of 128 rows takes 8192 bytes"):
        pipeline.device_form(tiny_reference.folder, tmp_path, RewriteOptions(block_bytes=BLOCK))


def test_the_device_form_keeps_every_tensor_within_the_block(tiny_reference, tmp_path):
    """8,192 bytes: q, k and v fused take 12,288 and are cut again, at row groups."""
    report = pipeline.device_form(tiny_reference.folder, tmp_path, RewriteOptions(block_bytes=8192))
    decoder = next(graph for graph in report.graphs if graph.name == "decoder")
    assert next(x for x in decoder.passes if x.name == "split_rows").done == ("q+k+v.rows.0", "q+k+v.rows.1")
    for name in ("vision", "embed", "decoder"):
        for entry in onnx.load(tmp_path / f"{name}.onnx").graph.input:
            if entry.name.endswith("codes") or ".codes.rows." in entry.name:
                assert entry.type.tensor_type.shape.dim[0].dim_value <= 8192


@pytest.mark.parametrize(("rows", "parts"), [(256, 2), (1000, 8), (129, 2), (128 * 7 + 1, 8), (300, 3)])
def test_parts_are_row_groups_that_fit_and_cover_all_rows(rows, parts):
    code, columns = VQCode(4, 8, 8), 64
    found = part_rows(code, rows, columns, BLOCK)
    assert len(found) == parts
    assert [first for first, _ in found] == [0, *(end for _, end in found[:-1])]
    assert found[-1][1] == rows
    assert all(first % 128 == 0 for first, _ in found)
    assert all(code.codes_bytes(end - first, columns) <= BLOCK for first, end in found)


def test_parts_are_as_few_as_fit():
    code = VQCode(2, 4, 8)
    whole = code.codes_bytes(151_936, 3584)
    assert len(part_rows(code, 151_936, 3584, 256 << 20)) == 1
    assert len(part_rows(code, 151_936, 3584, whole // 3 + (1 << 20))) == 3


@pytest.mark.rtx
def test_a_compiler_takes_the_parts(tiny_reference, tmp_path):
    """Whole-number comparison and clipping of ids, and the choice among parts, are operators that TensorRT has."""
    shapes = {
        "embed": {"ids": ([1, 1], [1, 8], [2, 64])},
        "decoder": {"x": ([1, 1, 64], [1, 8, 64], [2, 64, 64])},
    }
    for name, each in shapes.items():
        graph = imported(tiny_reference, name)
        split_rows(graph, BLOCK)
        pipeline._embed_constants(graph)
        pipeline.save_graph(graph, tmp_path / f"{name}.onnx")
        assert rtx_engine(tmp_path / f"{name}.onnx", [each], "86") > 0


def test_names_and_types_of_parts_are_those_of_the_op(tiny_reference):
    graph = imported(tiny_reference, "decoder")
    split_rows(graph, BLOCK)
    parts = [node for node in graph.nodes if node.name.startswith("head.rows.")]
    parts = [node for node in parts if vq_op.is_vq_op(node.op, node.domain)]
    assert [node.attrs["rows"] for node in parts] == [128, 128]
    assert {node.op for node in parts} == {"VQLinear"}
