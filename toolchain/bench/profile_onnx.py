"""Graphs whose function calls can be told apart in a profile."""

from __future__ import annotations

from pathlib import Path

import onnx

from toolchain.device.profile.ort import NamedGraph
from toolchain.errors import InputDataError


def named_calls(path: Path) -> NamedGraph:
    """The model of a file, every call of a function in its main graph with a copy of that function to itself.

    The copy for node i is called FUNCTION_call{i}. Weights stay in their files beside `path`.

    Raises:
        InputDataError: the file is missing or no model.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own exception types differ by its version
        raise InputDataError(f"graph {path} cannot be read ({error}); export it again") from None
    functions = {(f.domain, f.name): f for f in model.functions}
    calls = {}
    for index, node in enumerate(model.graph.node):
        function = functions.get((node.domain, node.op_type))
        if function is None:
            continue
        own = model.functions.add()
        own.CopyFrom(function)
        own.name = node.op_type = f"{function.name}_call{index}"
        calls[own.name] = node.name
    return NamedGraph(model.SerializeToString(), calls)
