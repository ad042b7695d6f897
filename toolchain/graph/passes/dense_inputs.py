"""Large weights that stayed dense leave the graph too: they become inputs, bound from the sidecar like codes.

The factor of a MatMul or Gemm, or the table of a Gather; a convolution's kernel stays, which TensorRT wants constant.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from toolchain.graph.passes import PassResult, Refusal
from toolchain.graph.passes.externalize_weights import Sidecar

LARGE_BYTES = 1 << 20
_PLACES = {"MatMul": (0, 1), "Gemm": (0, 1), "Gather": (0,)}


def dense_inputs(graph: gs.Graph, sidecar: Sidecar, large_bytes: int = LARGE_BYTES) -> PassResult:
    """Turn every such weight of at least `large_bytes` into a graph input; other readers of it are a refusal."""
    inputs: dict[str, gs.Variable] = {}
    done, refused = [], []
    for tensor in [t for t in graph.tensors().values() if isinstance(t, gs.Constant)]:
        if int(np.prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize < large_bytes or not tensor.outputs:
            continue
        others = sorted({node.op for node in tensor.outputs if not _is_factor(node, tensor)})
        if others:
            refused.append(Refusal(tensor.name, f"is read by {', '.join(others)} too, which needs it in the graph"))
            continue
        values = np.ascontiguousarray(tensor.values)
        name = sidecar.add(tensor.name, values)
        made = inputs.setdefault(name, gs.Variable(name, dtype=values.dtype, shape=list(values.shape)))
        for node in list(tensor.outputs):
            node.inputs = [made if each is tensor else each for each in node.inputs]
        done.append(tensor.name)
    graph.inputs += list(inputs.values())
    graph.cleanup()
    return PassResult("dense_inputs", tuple(done), tuple(refused))


def _is_factor(node: gs.Node, tensor: gs.Tensor) -> bool:
    places = [place for place, each in enumerate(node.inputs) if each is tensor]
    return not node.domain and set(places) <= set(_PLACES.get(node.op, ()))
