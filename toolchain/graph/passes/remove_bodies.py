"""Nodes take the plugin's op_type and the function bodies go.

TensorRT's parser up to 10.6 and from 10.15 on prefers a body to a plugin of the same name, so a device graph has none.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from toolchain.graph.op import vq_op
from toolchain.graph.passes import PassResult


def remove_bodies(graph: gs.Graph) -> PassResult:
    """Rename every node of ours to its plugin (VQLinearBias → VQLinear, …) and delete our functions."""
    for node in graph.nodes:
        if vq_op.is_vq_op(node.op, node.domain):
            node.op = vq_op.plugin_name(node.op)
    removed = tuple(function.name for function in graph.functions if function.domain == vq_op.DOMAIN)
    graph.functions = [function for function in graph.functions if function.domain != vq_op.DOMAIN]
    return PassResult("remove_bodies", removed)
