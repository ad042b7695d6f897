"""Nodes that compute the same thing from the same inputs become one.

The exporter writes a slice, a cast or a rotation once for each reader. Readers of one tensor can be fused
(fuse_shared_input), those of two equal ones cannot; so this runs before it.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import onnx_graphsurgeon as gs

from toolchain.graph.op import vq_op
from toolchain.graph.passes import PassResult

# Constants up to this are compared by content, larger ones by name: a rotation's block has 16 KiB in float32.
SMALL_BYTES = 16 << 10


def merge_equal_nodes(graph: gs.Graph) -> PassResult:
    """Redirect the readers of a node to an earlier equal one; `done` has the names of the nodes that went."""
    graph.toposort()
    kept: dict[Hashable, gs.Node] = {}
    outputs = {id(tensor) for tensor in graph.outputs}
    done = []
    for node in graph.nodes:
        if not _is_plain(node) or any(id(tensor) in outputs for tensor in node.outputs):
            continue
        first = kept.setdefault(_content(node), node)
        if first is node:
            continue
        for mine, theirs in zip(node.outputs, first.outputs, strict=True):
            for reader in list(mine.outputs):
                reader.inputs = [theirs if tensor is mine else tensor for tensor in reader.inputs]
        done.append(node.name)
    graph.cleanup()
    return PassResult("merge_equal_nodes", tuple(done))


def _is_plain(node: gs.Node) -> bool:
    """A standard, deterministic operator without a body of its own."""
    own_body = any(isinstance(value, gs.Graph) for value in node.attrs.values())
    return not (node.domain or own_body or vq_op.is_vq_op(node.op, node.domain) or node.op.startswith("Random"))


def _content(node: gs.Node) -> Hashable:
    attributes = tuple(sorted((name, _plain(value)) for name, value in node.attrs.items()))
    return node.op, attributes, len(node.outputs), tuple(_identity(tensor) for tensor in node.inputs)


def _plain(value: object) -> str:
    if isinstance(value, gs.Constant):
        value = value.values
    return f"{value.dtype}{value.shape}{value.tobytes()!r}" if isinstance(value, np.ndarray) else repr(value)


def _identity(tensor: gs.Tensor) -> Hashable:
    if isinstance(tensor, gs.Constant) and int(np.prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize <= SMALL_BYTES:
        return str(tensor.dtype), tuple(tensor.shape), tensor.values.tobytes()
    return tensor.name if tensor.name else id(tensor)
