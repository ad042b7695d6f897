"""plugin_version and plugin_namespace on every node of ours, and allow_int8 on every linear.

Parsers look a plugin up by (name, version, namespace), and what they assume when an attribute is absent has changed
between releases; so both are always written, the namespace as the empty string. For a field of the creator that a node
lacks they warn that the engine may fail to build; so allow_int8 is written where it is 0 too.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from toolchain.graph.op import vq_op
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
            if node.op == vq_op.LINEAR:
                allowed = int8_activations and node.attrs["vector"] == INT8_VECTOR
                node.attrs[vq_op.ALLOW_INT8.name] = int(allowed)
            done.append(node.name)
    return PassResult("plugin_attributes", tuple(done))
