"""plugin_version and plugin_namespace on every node of ours.

Parsers look a plugin up by (name, version, namespace), and what they assume when an attribute is absent has changed
between releases; so both are always written, the namespace as the empty string.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from toolchain.graph import vq_op
from toolchain.graph.passes import PassResult


def plugin_attributes(graph: gs.Graph) -> PassResult:
    """Write both attributes; they replace what a node may have had."""
    done = []
    for node in graph.nodes:
        if vq_op.is_vq_op(node.op, node.domain):
            node.attrs["plugin_version"] = vq_op.PLUGIN_VERSION
            node.attrs["plugin_namespace"] = vq_op.PLUGIN_NAMESPACE
            done.append(node.name)
    return PassResult("plugin_attributes", tuple(done))
