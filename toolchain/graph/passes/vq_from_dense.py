"""Dense layers of any graph: where they are, which cannot be quantized and why, and our nodes in their place.

    x ── MatMul(W) ── Add(b) ── y       or       x ── Gemm(W, b) ── y       →       x ── VQLinear ── y

W is an initializer or a Constant node, as it is or behind Transpose and Identity. What reads x or y otherwise stays.
Between float16 x and y two casts are added, since our node takes float32 in the reference form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from toolchain.graph.op import vq_op
from toolchain.graph.passes import PassResult, Refusal
from toolchain.values import VQCode

_VIEWS = ("Transpose", "Identity")
_LAYERS = ("MatMul", "Gemm")


@dataclass(frozen=True)
class DenseLinear:
    """One layer that can be quantized: y = x Wᵀ + bias.

    `name` is its own; `source` names the weight that it, and maybe others, read. `weight` float32[rows, columns],
    `bias` float32[rows] or None. `nodes` are what it is made of: MatMul, MatMul and Add, or Gemm.
    """

    name: str
    source: str
    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    x: gs.Tensor
    y: gs.Tensor
    nodes: tuple[gs.Node, ...]
    dtype: np.dtype

    @property
    def rows(self) -> int:
        return self.weight.shape[0]

    @property
    def columns(self) -> int:
        return self.weight.shape[1]

    def stored_bytes(self, code: VQCode) -> int:
        """Codes, table and scales in a code."""
        return code.codes_bytes(self.rows, self.columns) + code.codebook_bytes + 2 * self.rows


@dataclass(frozen=True)
class StoredWeight:
    """A layer's weight in the reference form: symbols uint8[R, 8, C, 16], table float32, scales float32[rows].

    `name` and `table_name` are what the initializers are called; layers that share a weight or a table share its name.
    """

    name: str
    table_name: str
    code: VQCode
    symbols: NDArray[np.uint8]
    table: NDArray[np.float32]
    scales: NDArray[np.float32]


def find_linears(graph: gs.Graph) -> tuple[list[DenseLinear], list[Refusal]]:
    """Every MatMul and Gemm of the graph, as a layer or as a refusal; those in branches and loop bodies are refused."""
    found, refused = [], []
    names: set[str] = set()
    for node in graph.nodes:
        for inner in (value for value in node.attrs.values() if isinstance(value, gs.Graph)):
            refused += [
                Refusal(each.name or each.op, f"stands in a body of {node.name or node.op}")
                for each in inner.nodes
                if each.op in _LAYERS
            ]
        if node.domain not in (None, "", "ai.onnx") or node.op not in _LAYERS:
            continue
        name = _own_name(node, names)
        reason = _reason_against(node)
        if reason:
            refused.append(Refusal(name, reason))
        else:
            found.append(_linear(node, name))
    return found, refused


def replace_linears(graph: gs.Graph, stored: Mapping[str, StoredWeight], layers: list[DenseLinear]) -> PassResult:
    """Put our nodes in place of `layers`, whose weights are `stored` by layer name. Bodies are the caller's to add."""
    constants: dict[str, gs.Constant] = {}

    def constant(name: str, values: NDArray) -> gs.Constant:
        return constants.setdefault(name, gs.Constant(name, np.ascontiguousarray(values)))

    for layer in layers:
        weight = stored[layer.name]
        weights = [
            constant(f"{weight.name}.codes", weight.symbols),
            constant(weight.table_name, weight.table),
            constant(f"{weight.name}.scales", weight.scales),
            *([] if layer.bias is None else [constant(f"{layer.name}.bias", layer.bias)]),
        ]
        for node in layer.nodes:
            node.inputs.clear()
            node.outputs.clear()
        x, y = layer.x, layer.y
        if layer.dtype == np.float16:
            x, y = _cast_in(graph, layer), gs.Variable(f"{layer.name}.y", dtype=np.float32, shape=layer.y.shape)
            graph.nodes.append(
                gs.Node("Cast", f"{layer.name}/to_half", {"to": int(onnx.TensorProto.FLOAT16)}, [y], [layer.y])
            )
        op = vq_op.body_name(vq_op.LINEAR, weight.code, has_bias=layer.bias is not None)
        attributes = vq_op.code_attributes(weight.code, layer.rows, layer.columns)
        graph.nodes.append(gs.Node(op, layer.name, dict(attributes), [x, *weights], [y], domain=vq_op.DOMAIN))
    graph.cleanup().toposort()
    return PassResult("vq_from_dense", tuple(layer.name for layer in layers))


def _cast_in(graph: gs.Graph, layer: DenseLinear) -> gs.Variable:
    wide = gs.Variable(f"{layer.name}.x", dtype=np.float32, shape=layer.x.shape)
    to = {"to": int(onnx.TensorProto.FLOAT)}
    graph.nodes.append(gs.Node("Cast", f"{layer.name}/to_float", to, [layer.x], [wide]))
    return wide


def _own_name(node: gs.Node, taken: set[str]) -> str:
    """The node's name, its weight's, or a number; never one twice."""
    found = _origin(node.inputs[1])
    stem = node.name or (found.name if found is not None else "") or node.op
    name = next(each for each in (stem, *(f"{stem}.{n}" for n in range(1, len(taken) + 2))) if each not in taken)
    taken.add(name)
    return name


def _origin(tensor: gs.Tensor) -> gs.Tensor | None:
    """The constant behind a tensor, through views; None where it is computed."""
    while isinstance(tensor, gs.Variable):
        if not tensor.inputs:
            return None
        producer = tensor.inputs[0]
        if producer.op == "Constant":
            return tensor
        if producer.op not in _VIEWS:
            return None
        tensor = producer.inputs[0]
    return tensor


def _values(tensor: gs.Tensor) -> NDArray:
    """The array of a tensor that `_origin` found a constant for, views applied."""
    if isinstance(tensor, gs.Constant):
        return tensor.values
    producer = tensor.inputs[0]
    if producer.op == "Constant":
        value = next(iter(producer.attrs.values()))  # value, value_float, value_floats, …: there is one
        return value.values if isinstance(value, gs.Constant) else np.asarray(value)
    inner = _values(producer.inputs[0])
    return inner.transpose(producer.attrs.get("perm")) if producer.op == "Transpose" else inner


def _readers(tensor: gs.Tensor) -> list[tuple[gs.Node, int]]:
    """(node, input) that read a constant in the end, views passed through."""
    found = []
    for node in tensor.outputs:
        for place, each in enumerate(node.inputs):
            if each is tensor:
                found += _readers(node.outputs[0]) if node.op in _VIEWS else [(node, place)]
    return found


def _reason_against(node: gs.Node) -> str | None:
    left, right = _origin(node.inputs[0]), _origin(node.inputs[1])
    if right is None:
        if left is not None:
            return "the weight is the left factor; write x Wᵀ with the weight on the right"
        producer = node.inputs[1].inputs[0].op if node.inputs[1].inputs else "an input of the graph"
        return f"both factors are computed: the right one comes from {producer}"
    if left is not None:
        return "both factors are constant; fold it before"
    values = _values(node.inputs[1])
    if values.ndim != 2:
        return f"the weight is batched, {list(values.shape)}; expected [inputs, outputs]"
    if values.dtype not in (np.float32, np.float16):
        return f"the weight is {values.dtype}; expected float32 or float16"
    if not np.isfinite(values).all():
        return "the weight holds infinities or NaN"
    others = sorted({f"{n.op} {n.name}".strip() for n, place in _readers(right) if n.op not in _LAYERS or place != 1})
    if others:
        return f"weight {right.name} is read by {', '.join(others)} too, which needs it dense"
    return _reason_against_gemm(node, values) if node.op == "Gemm" else None


def _reason_against_gemm(node: gs.Node, values: NDArray) -> str | None:
    wrong = {name: node.attrs.get(name, good) for name, good in (("transA", 0), ("alpha", 1.0), ("beta", 1.0))}
    if wrong != {"transA": 0, "alpha": 1.0, "beta": 1.0}:
        return f"expected transA 0, alpha 1 and beta 1, found {wrong}"
    rows = values.shape[0 if node.attrs.get("transB", 0) else 1]
    if len(node.inputs) > 2 and _bias(node.inputs[2], rows) is None:
        return f"C is no constant of {rows} values"
    return None


def _bias(tensor: gs.Tensor, rows: int) -> NDArray[np.float32] | None:
    """float32[rows] of a constant that adds one value to each output; None of any other tensor."""
    if _origin(tensor) is None:
        return None
    values = _values(tensor)
    if values.dtype not in (np.float32, np.float16) or values.shape[-1:] != (rows,) or values.size != rows:
        return None
    return np.ascontiguousarray(values.reshape(rows), dtype=np.float32)


def _linear(node: gs.Node, name: str) -> DenseLinear:
    values, origin = _values(node.inputs[1]), _origin(node.inputs[1])
    by_rows = bool(node.attrs.get("transB", 0)) if node.op == "Gemm" else False
    weight = np.ascontiguousarray(values if by_rows else values.T, dtype=np.float32)
    bias = _bias(node.inputs[2], len(weight)) if node.op == "Gemm" and len(node.inputs) > 2 else None
    nodes: tuple[gs.Node, ...] = (node,)
    y = node.outputs[0]
    added = None if bias is not None else _added_bias(node, len(weight))
    if added is not None:
        nodes, y, bias = (node, added[0]), added[0].outputs[0], added[1]
    source = f"{origin.name if origin is not None else name}{'' if by_rows else '.T'}"
    return DenseLinear(name, source, weight, bias, node.inputs[0], y, nodes, values.dtype)


def _added_bias(node: gs.Node, rows: int) -> tuple[gs.Node, NDArray[np.float32]] | None:
    """The Add behind a product and its constant, where nothing else reads the product."""
    readers = node.outputs[0].outputs
    if len(readers) != 1 or readers[0].op != "Add" or not node.outputs[0].outputs:
        return None
    add = readers[0]
    other = add.inputs[1] if add.inputs[0] is node.outputs[0] else add.inputs[0]
    bias = None if other is node.outputs[0] else _bias(other, rows)
    return None if bias is None else (add, bias)
