"""Linears that read the same tensor become one: q, k and v; gate and up.

    x ─┬─ VQLinear q ─ y_q              x ── VQLinear q+k+v ── Split ─┬─ y_q
       ├─ VQLinear k ─ y_k      →                                     ├─ y_k
       └─ VQLinear v ─ y_v                                            └─ y_v

Pattern: VQLinear nodes of the reference form with one x, one code, one column count and one table, by content. Rows are
concatenated; that is a concatenation of row groups when each member's rows are a multiple of 128, else it is refused.
Every output row is computed from the same numbers in the same order, so outputs do not change.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable

import numpy as np
import onnx_graphsurgeon as gs

from toolchain.graph.op import vq_op
from toolchain.graph.passes import PassResult, Refusal
from toolchain.values import ROW_GROUP


def fuse_shared_input(graph: gs.Graph) -> PassResult:
    """Fuse every group of two or more; `done` has the names of the fused nodes."""
    groups: dict[Hashable, list[gs.Node]] = defaultdict(list)
    for node in graph.nodes:
        if vq_op.is_vq_op(node.op, node.domain) and vq_op.plugin_name(node.op) == vq_op.LINEAR:
            groups[_group_key(node)].append(node)
    done, refused = [], []
    for members in groups.values():
        if len(members) < 2:
            continue
        reason = _reason_against(members)
        if reason:
            refused.append(Refusal(fused_name(members), reason))
        else:
            done.append(_fuse(graph, members))
    graph.cleanup().toposort()
    return PassResult("fuse_shared_input", tuple(done), tuple(refused))


def _group_key(node: gs.Node) -> Hashable:
    table = node.inputs[2]
    content = hashlib.sha256(table.values.tobytes()).hexdigest() if isinstance(table, gs.Constant) else table.name
    return (id(node.inputs[0]), content, *(node.attrs[name] for name in ("columns", "vector", "shift", "window")))


def _reason_against(members: list[gs.Node]) -> str | None:
    ragged = [f"{node.name} has {node.attrs['rows']}" for node in members if node.attrs["rows"] % ROW_GROUP]
    if ragged:
        return f"rows must be multiples of {ROW_GROUP} to be concatenated as row groups: {', '.join(ragged)}"
    if any(not isinstance(tensor, gs.Constant) for node in members for tensor in node.inputs[1:]):
        return "a weight is computed in the graph; expected initializers"
    return None


def fused_name(members: list[gs.Node]) -> str:
    """a.b.q_proj, a.b.k_proj → a.b.q_proj+k_proj; full names joined where the parents differ."""
    names = [node.name for node in members]
    parents = {name.rpartition(".")[0] for name in names}
    if len(parents) == 1 and "" not in parents:
        return f"{parents.pop()}.{'+'.join(name.rpartition('.')[2] for name in names)}"
    return "+".join(names)


def _fuse(graph: gs.Graph, members: list[gs.Node]) -> str:
    first, name = members[0], fused_name(members)
    rows = [int(node.attrs["rows"]) for node in members]
    has_bias = any(len(node.inputs) > 4 for node in members)
    weights = [
        gs.Constant(f"{name}.codes", np.concatenate([node.inputs[1].values for node in members])),
        first.inputs[2],
        gs.Constant(f"{name}.scales", np.concatenate([node.inputs[3].values for node in members])),
    ]
    if has_bias:
        # A member without a bias adds zero, which changes no float.
        biases = [x.inputs[4].values if len(x.inputs) > 4 else np.zeros_like(x.inputs[3].values) for x in members]
        weights.append(gs.Constant(f"{name}.bias", np.concatenate(biases)))
    x, outputs = first.inputs[0], [node.outputs[0] for node in members]
    attributes = dict(first.attrs) | {"rows": sum(rows)}
    for node in members:
        node.inputs.clear()
        node.outputs.clear()
    stacked = gs.Variable(f"{name}.rows", dtype=outputs[0].dtype, shape=_stacked_shape(outputs, rows))
    code, _, _ = vq_op.code_from_attributes(attributes, name)
    op = vq_op.body_name(vq_op.LINEAR, code, has_bias=has_bias)
    graph.nodes.append(gs.Node(op, name, attributes, [x, *weights], [stacked], domain=vq_op.DOMAIN))
    sizes = gs.Constant(f"{name}.split", np.array(rows, dtype=np.int64))
    graph.nodes.append(gs.Node("Split", f"{name}/Split", {"axis": -1}, [stacked, sizes], outputs))
    return name


def _stacked_shape(outputs: list[gs.Variable], rows: list[int]) -> list | None:
    return None if outputs[0].shape is None else [*outputs[0].shape[:-1], sum(rows)]
