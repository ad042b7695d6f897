"""The same graph with ordinary weights: every VQ node becomes a MatMul or a Gather, to compare sizes and outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from toolchain.errors import InputDataError
from toolchain.graph.op import vq_op
from toolchain.vq.format import matrix_from_chunks, windows_from_symbols

_TYPES = {"float16": (np.float16, TensorProto.FLOAT16), "float32": (np.float32, TensorProto.FLOAT)}


def dense_graph(source: Path, out: Path, dtype: str = "float16") -> Path:
    """`out`, where `source`, a reference or portable graph, was written with dense weights.

    With float16 (what a checkpoint ships) the product is taken in float16 between two casts; with float32 it is the
    quantized graph's own arithmetic. Weights go to `out`.data. All of the graph's weights are in memory at once.

    Raises:
        InputDataError: a VQ node's codes, table or scales are not initializers.
    """
    model = onnx.load(source)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[NodeProto] = []
    replaced = [node for node in model.graph.node if vq_op.is_vq_op(node.op_type, node.domain)]
    dense: dict[str, TensorProto] = {}
    for node in model.graph.node:
        if vq_op.is_vq_op(node.op_type, node.domain):
            nodes += _dense_nodes(node, weights, dense, dtype)
        else:
            nodes.append(node)
    gone = {name for node in replaced for name in node.input[1:4]}
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in gone]
    for field, values in ((model.graph.node, nodes), (model.graph.initializer, [*kept, *dense.values()])):
        del field[:]
        field.extend(values)
    del model.functions[:]
    imports = [x for x in model.opset_import if x.domain != vq_op.DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(imports)
    data = out.with_name(out.name + ".data")
    data.unlink(missing_ok=True)
    onnx.save(model, out, save_as_external_data=True, location=data.name, size_threshold=1024)
    return out


def decoded_weight(node: NodeProto, weights: dict[str, TensorProto]) -> NDArray[np.float32]:
    """Ŵ float32[rows, columns] of a reference node, from its symbols, table and scales."""
    missing = [name for name in node.input[1:4] if name not in weights]
    if missing:
        raise InputDataError(f"node {node.name}: expected initializers {missing}; give a reference or portable graph")
    symbols, table, scales = (numpy_helper.to_array(weights[name]) for name in node.input[1:4])
    if symbols.ndim != 4:
        raise InputDataError(
            f"node {node.name}: expected codes [R, 8, C, 16], found {list(symbols.shape)}; give a portable graph"
        )
    attributes = {a.name: a.i for a in node.attribute if a.type == onnx.AttributeProto.INT}
    code, rows, columns = vq_op.code_from_attributes(attributes, node.name)
    windows = matrix_from_chunks(windows_from_symbols(symbols, code))
    unit = table.astype(np.float32)[windows].reshape(windows.shape[0], -1)[:rows, :columns]
    return unit * scales.astype(np.float32)[:, None]


def _dense_nodes(
    node: NodeProto, weights: dict[str, TensorProto], dense: dict[str, TensorProto], dtype: str
) -> list[NodeProto]:
    """The standard nodes that stand in for one VQ node; its weight is added to `dense`."""
    as_numpy, as_onnx = _TYPES[dtype]
    embedding = vq_op.plugin_name(node.op_type) == vq_op.EMBEDDING
    base, y = node.name or node.output[0], node.output[0]
    name = f"{base}.dense"
    if name not in dense:
        weight = decoded_weight(node, weights).astype(as_numpy)
        dense[name] = numpy_helper.from_array(np.ascontiguousarray(weight if embedding else weight.T), name)
    if embedding:
        gathered = helper.make_node("Gather", [name, node.input[0]], [f"{y}.rows"], name=f"{base}.gather", axis=0)
        return [gathered, helper.make_node("Cast", [f"{y}.rows"], [y], name=f"{base}.cast", to=TensorProto.FLOAT)]
    bias = node.input[4] if len(node.input) > 4 and node.input[4] else None
    product = f"{y}.product" if bias else y
    nodes = [
        helper.make_node("Cast", [node.input[0]], [f"{y}.x"], name=f"{base}.cast_in", to=as_onnx),
        helper.make_node("MatMul", [f"{y}.x", name], [f"{y}.narrow"], name=f"{base}.matmul"),
        helper.make_node("Cast", [f"{y}.narrow"], [product], name=f"{base}.cast_out", to=TensorProto.FLOAT),
    ]
    if bias:
        nodes.append(helper.make_node("Add", [product, bias], [y], name=f"{base}.bias"))
    return nodes
