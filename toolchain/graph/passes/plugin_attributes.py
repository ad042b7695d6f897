"""plugin_version and plugin_namespace on every node of ours, and allow_int8 where it was asked for.

Parsers look a plugin up by (name, version, namespace), and what they assume when an attribute is absent has changed
between releases; so both are always written, the namespace as the empty string.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from toolchain.graph import vq_op
from toolchain.graph.passes import PassResult

INT8_VECTOR = 4  # codes of this vector length have int8 tables, and so kernels that multiply in int8


def plugin_attributes(graph: gs.Graph, int8_activations: bool = False) -> PassResult:
    """Write the attributes; they replace what a node may have had.

    With `int8_activations` linears whose code has int8 kernels (vector = 4) may be computed with x rounded to int8.
    """
    done = []
    for node in graph.nodes:
        if vq_op.is_vq_op(node.op, node.domain):
            node.attrs["plugin_version"] = vq_op.PLUGIN_VERSION
            node.attrs["plugin_namespace"] = vq_op.PLUGIN_NAMESPACE
            node.attrs.pop(vq_op.ALLOW_INT8.name, None)
            if int8_activations and node.op == vq_op.LINEAR and node.attrs["vector"] == INT8_VECTOR:
                node.attrs[vq_op.ALLOW_INT8.name] = 1
            done.append(node.name)
    return PassResult("plugin_attributes", tuple(done))
