"""Matrix work in float16, the rest of the graph in float32.

    a ── MatMul ── y     →     a ── Cast half ── MatMul ── Cast float ── y

for every MatMul, Gemm and Conv of standard operators: attention scores and values, and layers that stayed dense.
Their weights are stored in float16. Residual stream, norms and softmax stay float32, and so do our own nodes' inputs
and outputs, which the plugin rounds inside. Keys and values of the cache cross the graph's border in float16: `past.*`
and `present.*`, half the bytes that a decode step reads.

Refused: a factor computed from positions or sizes alone (rotary angles: float16 has 11 bits, a position needs more),
and weights beyond float16's range.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from toolchain.graph.op import vq_op
from toolchain.graph.passes import PassResult, Refusal

MATRIX_OPS = ("MatMul", "Gemm", "Conv")
# Pure movement of data: a cast after one of these may as well stand before it, where less or nothing is to be cast.
_MOVES = ("Transpose", "Reshape", "Unsqueeze", "Squeeze", "Slice", "Identity")
_SIZES = ("Shape", "Size")
_SMALL_TABLE = 1 << 16  # elements; below this a table is not worth a cast
PAST, PRESENT = "past.", "present."


def half_matmuls(graph: gs.Graph) -> PassResult:
    """`done` has the names of the nodes that compute in float16 now, and of the inputs and outputs that are float16."""
    graph.toposort()
    inputs = _half_inputs(graph)
    depends = _from_activations(graph)
    halves = _Halves(graph)
    done, refused = [], []
    for node in list(graph.nodes):
        if node.domain or node.op not in (*MATRIX_OPS, "Gather"):
            continue
        change = _store_table if node.op == "Gather" else _compute_in_half
        reason = change(graph, node, halves, depends)
        if reason:
            refused.append(Refusal(node.name, reason))
        elif reason is None:
            done.append(node.name)
    outputs = _half_outputs(graph)
    graph.cleanup().toposort()
    return PassResult("half_matmuls", (*done, *inputs, *outputs), tuple(refused))


def _compute_in_half(graph: gs.Graph, node: gs.Node, halves: _Halves, depends: set[int]) -> str | None:
    """None where done; a reason; or "" where there is nothing to do."""
    if any(tensor.dtype == np.float16 for tensor in node.inputs[:2]):
        return ""
    for tensor in node.inputs:
        values = _weight(tensor)
        if values is None and id(tensor) not in depends:
            return f"{tensor.name} is computed from positions or sizes alone, which need float32's precision"
        if values is not None and not _fits(values):
            return f"weight {tensor.name} reaches {np.abs(values).max():g}, beyond float16"
    node.inputs = [halves.of(tensor) for tensor in node.inputs]
    output = node.outputs[0]
    narrow = gs.Variable(f"{output.name}.half", dtype=np.float16, shape=output.shape)
    node.outputs = [narrow]
    graph.nodes.append(_cast(f"{node.name}/to_float", narrow, output, onnx.TensorProto.FLOAT))
    return None


def _store_table(graph: gs.Graph, node: gs.Node, halves: _Halves, _: set[int]) -> str | None:
    """A dense embedding: its rows are gathered in float16 and cast, where float16 holds them exactly."""
    values = _weight(node.inputs[0])
    if values is None or values.ndim != 2 or values.dtype != np.float32 or values.size < _SMALL_TABLE:
        return ""
    if not np.array_equal(values.astype(np.float16).astype(np.float32), values):
        return f"table {node.inputs[0].name} does not fit float16 exactly"
    output = node.outputs[0]
    node.inputs[0] = halves.of(node.inputs[0])
    narrow = gs.Variable(f"{output.name}.half", dtype=np.float16, shape=output.shape)
    node.outputs = [narrow]
    graph.nodes.append(_cast(f"{node.name}/to_float", narrow, output, onnx.TensorProto.FLOAT))
    return None


class _Halves:
    """The float16 twin of every tensor that was asked for, made once."""

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self.made: dict[int, gs.Tensor] = {}
        self.outputs = {id(tensor) for tensor in graph.outputs}

    def of(self, tensor: gs.Tensor) -> gs.Tensor:
        if id(tensor) not in self.made:
            self.made[id(tensor)] = self._make(tensor)
        return self.made[id(tensor)]

    def _make(self, tensor: gs.Tensor) -> gs.Tensor:
        if isinstance(tensor, gs.Constant):
            return gs.Constant(f"{tensor.name}.half", tensor.values.astype(np.float16))
        producer = tensor.inputs[0] if tensor.inputs else None
        if producer is not None and producer.op == "Cast" and producer.inputs[0].dtype == np.float16:
            return producer.inputs[0]
        if producer is not None and producer.op in _MOVES and len(tensor.outputs) == 1 and not self._is_output(tensor):
            producer.inputs[0] = self.of(producer.inputs[0])
            tensor.dtype = np.float16
            return tensor
        narrow = gs.Variable(f"{tensor.name}.half", dtype=np.float16, shape=tensor.shape)
        self.graph.nodes.append(_cast(f"{tensor.name}/to_half", tensor, narrow, onnx.TensorProto.FLOAT16))
        return narrow

    def _is_output(self, tensor: gs.Tensor) -> bool:
        return id(tensor) in self.outputs


def _half_inputs(graph: gs.Graph) -> list[str]:
    """`past.*` become float16; who reads them reads a cast, which goes where only matrix work follows."""
    names = []
    for tensor in graph.inputs:
        if not tensor.name.startswith(PAST) or tensor.dtype != np.float32:
            continue
        wide = gs.Variable(f"{tensor.name}.float", dtype=np.float32, shape=tensor.shape)
        for reader in list(tensor.outputs):
            if reader.op not in _SIZES:
                reader.inputs = [wide if each is tensor else each for each in reader.inputs]
        tensor.dtype = np.float16
        graph.nodes.append(_cast(f"{tensor.name}/to_float", tensor, wide, onnx.TensorProto.FLOAT))
        names.append(tensor.name)
    return names


def _half_outputs(graph: gs.Graph) -> list[str]:
    names = []
    for place, tensor in enumerate(graph.outputs):
        if not tensor.name.startswith(PRESENT) or tensor.dtype == np.float16:
            continue
        narrow = gs.Variable(tensor.name, dtype=np.float16, shape=tensor.shape)
        tensor.name = f"{tensor.name}.float"
        graph.nodes.append(_cast(f"{narrow.name}/to_half", tensor, narrow, onnx.TensorProto.FLOAT16))
        graph.outputs[place] = narrow
        names.append(narrow.name)
    return names


def _cast(name: str, source: gs.Tensor, result: gs.Tensor, to: int) -> gs.Node:
    return gs.Node("Cast", name, {"to": to}, [source], [result])


def _from_activations(graph: gs.Graph) -> set[int]:
    """ids of the tensors that depend on the values of a float input, or on a row of an embedding."""
    found = {id(tensor) for tensor in graph.inputs if tensor.dtype in (np.float32, np.float16)}
    for node in [*_casts_of_inputs(graph), *graph.nodes]:
        reads = any(id(tensor) in found for tensor in node.inputs) or _is_lookup(node)
        if node.op not in _SIZES and reads:
            found |= {id(tensor) for tensor in node.outputs}
    return found


def _casts_of_inputs(graph: gs.Graph) -> list[gs.Node]:
    """The casts that `_half_inputs` has put at the end of the list; they come first in order."""
    return [node for node in graph.nodes if node.op == "Cast" and node.name.startswith(PAST)]


def _is_lookup(node: gs.Node) -> bool:
    embedding = vq_op.is_vq_op(node.op, node.domain) and vq_op.plugin_name(node.op) == vq_op.EMBEDDING
    table = _weight(node.inputs[0]) if node.op == "Gather" and not node.domain else None
    return embedding or (table is not None and table.dtype in (np.float32, np.float16))


def _weight(tensor: gs.Tensor) -> NDArray | None:
    return tensor.values if isinstance(tensor, gs.Constant) else None


def _fits(values: NDArray) -> bool:
    return bool(np.isfinite(values).all() and np.abs(values).max(initial=0) <= np.finfo(np.float16).max)
