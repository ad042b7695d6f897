"""Outputs that exist for validation only go: they keep activations alive and cost an engine memory."""

from __future__ import annotations

from collections.abc import Collection

import onnx_graphsurgeon as gs

from toolchain.graph.passes import PassResult, Refusal


def strip_taps(graph: gs.Graph, taps: Collection[str]) -> PassResult:
    """Remove the outputs named in `taps` and what only they need. A name that is no output is refused."""
    outputs = {tensor.name for tensor in graph.outputs}
    found = [name for name in taps if name in outputs]
    refused = tuple(Refusal(name, "is not an output of the graph") for name in taps if name not in outputs)
    graph.outputs = [tensor for tensor in graph.outputs if tensor.name not in found]
    graph.cleanup()
    return PassResult("strip_taps", tuple(found), refused)
