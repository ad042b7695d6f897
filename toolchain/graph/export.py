"""Reference graphs from a loaded model: one ONNX file per GraphSpec, `mgvq` nodes with function bodies, named taps.

Vector-quantized modules are swapped for twins that call the torch custom ops, so a layer is one node whatever the
exporter does around it, and its weight reaches the file as the symbols, table and scales of the checkpoint, unchanged.
A model without such modules exports the same way and gives the dense graphs.

Nodes are named after the module they come from: `model.language_model.layers.0.self_attn.q_proj` for a layer of ours,
`model.language_model.layers.0.self_attn/MatMul_0` for the rest. Names are all that survives the rewrite.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import logging
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
import torch
from torch import nn

from toolchain.errors import MgvqError
from toolchain.graph.export_modules import Twin, export_twins
from toolchain.graph.op import torch_op, vq_op
from toolchain.graph.op.bodies import function_bodies
from toolchain.values import FORMAT_VERSION, VQCode

if TYPE_CHECKING:
    from toolchain.models.family import Family, GraphSpec

TAPS_KEY = "mgvq.taps"
FORMAT_KEY = "mgvq.format_version"
_SCOPES_KEY = "pkg.torch.onnx.name_scopes"
_NO_SCOPE = "_empty_nn_module_stack"  # what the tracer writes for sizes it reads before any module runs


@dataclass(frozen=True)
class ExportedGraph:
    """What was written: `vq_nodes` of `nodes` are ours; `weight_bytes` is the size of the external data."""

    name: str
    path: Path
    nodes: int
    vq_nodes: int
    weight_bytes: int
    seconds: float


def reference_graphs_from_model(model: nn.Module, family: Family, folder: Path) -> list[ExportedGraph]:
    """Write {name}.onnx and {name}.onnx.data into `folder` for every graph of the family; the model is left as it was.

    Args:
        model: on the CPU in float32, in evaluation mode, with or without vector-quantized modules.
        folder: must exist.

    Raises:
        MgvqError: the exporter dropped a layer's codes or named them in a way we do not know.
    """
    with export_twins(model):
        names = {module: name for name, module in model.named_modules()}
        return [export_graph(spec, names, folder) for spec in family.graphs(model)]


def export_graph(spec: GraphSpec, names: dict[nn.Module, str], folder: Path) -> ExportedGraph:
    """Trace one graph, name its nodes, append the bodies, save with external data, check.

    `names` are the module paths that node names carry; modules that are not there keep their path inside the spec.
    """
    started = time.perf_counter()
    model = _traced(spec)
    paths = {path: names.get(module, path) for path, module in spec.module.named_modules(remove_duplicate=False)}
    twins = {f"{path}.symbols": module for path, module in spec.module.named_modules(remove_duplicate=False)}
    vq_nodes = [node for node in model.graph if vq_op.is_vq_op(node.op_type, node.domain)]
    _name_nodes(model.graph, spec.name, paths)
    for node in vq_nodes:
        _attach_weights(model.graph, node, *_twin_of_node(node, twins, names, spec.name))
    _append_bodies(model, vq_nodes)
    _rename_parameters(model.graph, paths)
    _name_dimensions(model.graph)
    model.graph.name = spec.name
    model.metadata_props.clear()
    model.metadata_props.update({TAPS_KEY: json.dumps(list(spec.taps)), FORMAT_KEY: str(FORMAT_VERSION)})
    path = folder / f"{spec.name}.onnx"
    data = folder / f"{spec.name}.onnx.data"
    data.unlink(missing_ok=True)
    ir.save(model, path, external_data=data.name)
    onnx.checker.check_model(str(path))
    weight_bytes = data.stat().st_size if data.exists() else 0
    seconds = round(time.perf_counter() - started, 2)
    return ExportedGraph(spec.name, path, len(model.graph), len(vq_nodes), weight_bytes, seconds)


def _traced(spec: GraphSpec) -> ir.Model:
    """The exporter's result, optimized, with its progress lines dropped."""
    with torch.no_grad(), _quiet_exporter():
        program = torch.onnx.export(
            spec.module,
            spec.args,
            dynamo=True,
            opset_version=vq_op.ONNX_OPSET,
            input_names=list(spec.input_names),
            output_names=list(spec.output_names),
            dynamic_shapes=spec.dynamic_shapes,
            custom_translation_table=torch_op.translation_table(),
            verbose=False,
        )
    if program is None:
        raise MgvqError(f"graph {spec.name}: torch.onnx.export returned nothing; expected an ONNXProgram")
    return program.model


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Hide what the exporter says on every run of any model: absent torchvision ops, internal deprecations, axis names
    that it merged because we asked for equal axes."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*axis name.*will not be used.*", category=UserWarning)
            yield
    finally:
        logger.setLevel(level)


def _name_nodes(graph: ir.Graph, graph_name: str, paths: dict[str, str]) -> None:
    """Name every node `module path/op_index` and drop the exporter's metadata, which holds paths of this machine."""
    counts: Counter[str] = Counter()
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES_KEY, "[]"))
        scope = scopes[-2] if len(scopes) > 1 and not scopes[-2].startswith(_NO_SCOPE) else ""
        stem = f"{paths.get(scope, scope) or graph_name}/{node.op_type}"
        node.name = f"{stem}_{counts[stem]}"
        counts[stem] += 1
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


def _twin_of_node(node: ir.Node, twins: dict, names: dict, graph_name: str) -> tuple[Twin, str]:
    """(twin, layer name) of a node, found by the name of its codes."""
    found = node.inputs[1].name if node.inputs[1] is not None else None
    twin = twins.get(found)
    if twin is None:
        raise MgvqError(
            f"graph {graph_name}, node {node.name}: expected codes named after a module's symbols, found {found!r}; "
            "use a torch version within pyproject.toml's range"
        )
    return twin, names[twin]


def _attach_weights(graph: ir.Graph, node: ir.Node, twin: Twin, layer: str) -> None:
    """Name the node and its weights after the layer; tables after their id, one initializer however many share it."""
    taken = {other.name for other in graph}
    node.outputs[0].dtype = ir.DataType.FLOAT
    node.name = next(name for name in (layer, *(f"{layer}.{n}" for n in range(1, len(taken) + 2))) if name not in taken)
    weights = [
        (f"{layer}.codes", twin.symbols),
        (f"mgvq_tables.{twin.codebook_id}", twin.table),
        (f"{layer}.scales", twin.scales),
    ]
    if twin.bias is not None:
        weights.append((f"{layer}.bias", twin.bias.detach()))
    for place, (name, tensor) in enumerate(weights, start=1):
        node.replace_input_with(place, _initializer(graph, name, tensor))


def _initializer(graph: ir.Graph, name: str, tensor: torch.Tensor) -> ir.Value:
    if name in graph.initializers:
        return graph.initializers[name]
    array = ir.tensor(tensor.contiguous().numpy(), name=name)
    value = ir.Value(name=name, const_value=array, shape=ir.Shape(tensor.shape), type=ir.TensorType(array.dtype))
    graph.register_initializer(value)
    return value


def _rename_parameters(graph: ir.Graph, paths: dict[str, str]) -> None:
    """Parameters take the names they have in the model: decoder.norm.weight → model.language_model.norm.weight."""
    for name, value in list(graph.initializers.items()):
        module, _, leaf = name.rpartition(".")
        renamed = f"{paths.get(module, '')}.{leaf}"
        if module and paths.get(module) and renamed not in graph.initializers:
            del graph.initializers[name]
            value.name = renamed
            graph.register_initializer(value)


def _name_dimensions(graph: ir.Graph) -> None:
    """Free sizes that the tracer numbered (s53) are named after the input that brings them: attention_mask.1."""
    names: dict[str, str] = {}
    for value in graph.inputs:
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, ir.SymbolicDim) and size.value and re.fullmatch(r"s\d+", size.value):
                names.setdefault(size.value, f"{value.name}.{axis}")
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    for value in values:
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, ir.SymbolicDim) and size.value in names:
                value.shape[axis] = names[size.value]  # type: ignore[index]


def _append_bodies(model: ir.Model, vq_nodes: list[ir.Node]) -> None:
    """Give each of our nodes the op_type of its body, add the bodies, drop initializers that nothing reads any more."""
    kinds = set()
    for node in vq_nodes:
        code = VQCode(*(node.attributes[name].as_int() for name in ("vector", "shift", "window")))
        has_bias = node.op_type == vq_op.LINEAR and len(node.inputs) > 4
        kinds.add((node.op_type, code, has_bias))
        node.op_type = vq_op.body_name(node.op_type, code, has_bias=has_bias)
    for body in function_bodies(kinds):
        function = ir.serde.deserialize_function(body)
        model.functions[function.identifier()] = function
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
    if vq_nodes:
        model.opset_imports[vq_op.DOMAIN] = vq_op.OPSET_VERSION
