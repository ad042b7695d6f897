"""Weights too large for one block of the target's memory are cut along their rows: an LM head, an embedding.

    x ── VQLinear head ── y     →    x ─┬─ VQLinear head.rows.0 ─┬─ Concat ── y
                                        └─ VQLinear head.rows.1 ─┘

    ids ── VQEmbedding table ── y    →    every part looks up ids - its first row, clipped into itself; Where picks

Cuts stand at row groups of 128, so that a part's codes are a slice of the whole's, and a tied head and embedding, cut
at the same rows, still share every part. Outputs do not change: each row is computed from the same numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from toolchain.graph.op import vq_op
from toolchain.graph.passes import PassResult, Refusal
from toolchain.values import ROW_GROUP, VQCode


def split_rows(graph: gs.Graph, block_bytes: int) -> PassResult:
    """Cut every node of the reference form whose packed codes exceed `block_bytes`; `done` has the parts' names.

    One whose single row group is larger than a block is refused.
    """
    done, refused = [], []
    for node in list(graph.nodes):
        if not vq_op.is_vq_op(node.op, node.domain):
            continue
        code, rows, columns = vq_op.code_from_attributes(node.attrs, node.name)
        if code.codes_bytes(rows, columns) <= block_bytes:
            continue
        reason = _reason_against(node, code, columns, block_bytes)
        if reason:
            refused.append(Refusal(node.name, reason))
        else:
            done += _split(graph, node, part_rows(code, rows, columns, block_bytes))
    graph.cleanup().toposort()
    return PassResult("split_rows", tuple(done), tuple(refused))


def part_rows(code: VQCode, rows: int, columns: int, block_bytes: int) -> list[tuple[int, int]]:
    """(first row, row after the last) of each part: as few parts as fit, row groups interleaved evenly among them."""
    groups = -(-rows // ROW_GROUP)
    parts = -(-groups // (block_bytes // code.codes_bytes(ROW_GROUP, columns)))
    cuts = [groups * i // parts * ROW_GROUP for i in range(parts)]
    return list(zip(cuts, [*cuts[1:], rows], strict=True))


def _reason_against(node: gs.Node, code: VQCode, columns: int, block_bytes: int) -> str | None:
    if any(not isinstance(tensor, gs.Constant) for tensor in node.inputs[1:]):
        return "a weight is computed in the graph; expected initializers"
    group = code.codes_bytes(ROW_GROUP, columns)
    if group > block_bytes:
        return f"one group of {ROW_GROUP} rows takes {group} bytes, more than a block of {block_bytes}"
    return None


def _split(graph: gs.Graph, node: gs.Node, parts: list[tuple[int, int]]) -> list[str]:
    x, output = node.inputs[0], node.outputs[0]
    embedding = vq_op.plugin_name(node.op) == vq_op.EMBEDDING
    weights = [_part_weights(node, n, first, end) for n, (first, end) in enumerate(parts)]
    attributes, op, name = dict(node.attrs), node.op, node.name
    node.inputs.clear()
    node.outputs.clear()
    places = _places(graph, name, x, parts) if embedding else [x] * len(parts)
    outputs, names = [], []
    for n, ((first, end), arrays, place) in enumerate(zip(parts, weights, places, strict=True)):
        width = attributes["columns"] if embedding else end - first
        shape = None if output.shape is None else [*output.shape[:-1], width]
        part = gs.Variable(f"{name}.rows.{n}.y", dtype=output.dtype, shape=shape)
        own = attributes | {"rows": end - first}
        graph.nodes.append(gs.Node(op, f"{name}.rows.{n}", own, [place, *arrays], [part], domain=vq_op.DOMAIN))
        outputs.append(part)
        names.append(f"{name}.rows.{n}")
    if embedding:
        _pick(graph, name, x, parts, outputs, output)
    else:
        graph.nodes.append(gs.Node("Concat", f"{name}/Concat", {"axis": -1}, outputs, [output]))
    return names


def _part_weights(node: gs.Node, number: int, first: int, end: int) -> list[gs.Tensor]:
    """Codes, table, scales and, where there is one, bias of rows first … end - 1."""
    groups = slice(first // ROW_GROUP, -(-end // ROW_GROUP))
    cut = {1: groups, 3: slice(first, end), 4: slice(first, end)}
    weights: list[gs.Tensor] = []
    for place, tensor in enumerate(node.inputs[1:], start=1):
        if place not in cut:
            weights.append(tensor)
            continue
        values = np.ascontiguousarray(tensor.values[cut[place]])
        weights.append(gs.Constant(f"{tensor.name}.rows.{number}", values))
    return weights


def _integers(name: str, values: int | list[int]) -> gs.Constant:
    return gs.Constant(name, np.array(values, dtype=np.int64))


def _add(
    graph: gs.Graph, op: str, name: str, inputs: list, dtype: type, shape: object, **attributes: Any
) -> gs.Variable:
    output = gs.Variable(f"{name}.out", dtype=dtype, shape=shape)
    graph.nodes.append(gs.Node(op, name, attributes, inputs, [output]))
    return output


def _places(graph: gs.Graph, name: str, ids: gs.Tensor, parts: list[tuple[int, int]]) -> list[gs.Variable]:
    """ids counted from each part's first row, clipped into the part: what is not its own is looked up for nothing."""
    found = []
    for n, (first, end) in enumerate(parts):
        stem = f"{name}.rows.{n}"
        moved = _add(graph, "Sub", f"{stem}/Sub", [ids, _integers(f"{stem}.first", first)], np.int64, ids.shape)
        low = _add(graph, "Max", f"{stem}/Max", [moved, _integers(f"{stem}.low", 0)], np.int64, ids.shape)
        high = _integers(f"{stem}.high", end - first - 1)
        found.append(_add(graph, "Min", f"{stem}/Min", [low, high], np.int64, ids.shape))
    return found


def _pick(
    graph: gs.Graph,
    name: str,
    ids: gs.Tensor,
    parts: list[tuple[int, int]],
    rows: list[gs.Variable],
    output: gs.Variable,
) -> None:
    """Row by row, the part that holds the id: the last part whose first row is not behind it."""
    column = None if ids.shape is None else [*ids.shape, 1]
    wide = _add(graph, "Unsqueeze", f"{name}/Unsqueeze", [ids, _integers(f"{name}.last", [-1])], np.int64, column)
    chosen = rows[0]
    for n, (first, _) in enumerate(parts[1:], start=1):
        stem = f"{name}.rows.{n}"
        before = _add(graph, "Less", f"{stem}/Less", [wide, _integers(f"{stem}.start", first)], np.bool_, column)
        last = n == len(parts) - 1
        result = output if last else gs.Variable(f"{stem}.chosen", dtype=output.dtype, shape=output.shape)
        graph.nodes.append(gs.Node("Where", f"{stem}/Where", {}, [before, chosen, rows[n]], [result]))
        chosen = result
