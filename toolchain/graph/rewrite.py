"""The rewrite: reference graphs to the device form (plugin nodes, weights outside) and to the portable form.

Folders as written here:

    device/    {name}.onnx, weights.safetensors, rewrite.json        for TensorRT with the plugin
    portable/  {name}.onnx, {name}.onnx.data                         the reference graph without taps: any runtime

The device form computes matrices in float16 (half_matmuls); the portable form is float32 throughout.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues
from safetensors.numpy import save_file

from toolchain.errors import BudgetError, InputDataError, MgvqError, UsageError
from toolchain.files.folders import write_json
from toolchain.graph.export import FORMAT_KEY, TAPS_KEY
from toolchain.graph.op import vq_op
from toolchain.graph.op.plugin_op import SIDECAR
from toolchain.graph.passes import PassResult
from toolchain.graph.passes.dense_inputs import dense_inputs
from toolchain.graph.passes.externalize_weights import Sidecar, externalize_weights
from toolchain.graph.passes.fuse_shared_input import fuse_shared_input
from toolchain.graph.passes.half_matmuls import half_matmuls
from toolchain.graph.passes.merge_equal_nodes import merge_equal_nodes
from toolchain.graph.passes.plugin_attributes import plugin_attributes
from toolchain.graph.passes.remove_bodies import remove_bodies
from toolchain.graph.passes.split_rows import split_rows
from toolchain.graph.passes.strip_taps import strip_taps
from toolchain.graph.passes.tile_queries import tile_queries
from toolchain.plan.memory import SCORES_BYTES
from toolchain.values import FORMAT_VERSION

REPORT = "rewrite.json"
# A protobuf ends at 2 GiB; what stays inside a device graph goes to {name}.onnx.data beyond this.
EMBED_LIMIT_BYTES = 1 << 30
PRECISIONS = ("mixed", "float32")


@dataclass(frozen=True)
class RewriteOptions:
    """What the rewrite is for.

    Args:
        precision: of the device form's matrix work; "mixed" is float16 inside float32, "float32" leaves it as it is.
        block_bytes: the target's largest contiguous block; weights beyond it are cut along their rows. None: no limit.
        largest: graph → input → largest shape. Where it is given, attention is tiled to keep within `scores_bytes`.
        scores_bytes: the most a score tensor of an attention without a mask may take at those shapes.
        int8_activations: let engines round the inputs of linears to int8 where kernels have it. Validation computes
            with float16 inputs: what this does to the answers shows only in what the engines answer.
    """

    precision: str = "mixed"
    block_bytes: int | None = None
    largest: Mapping[str, Mapping[str, Sequence[int]]] = field(default_factory=dict)
    scores_bytes: int = SCORES_BYTES
    int8_activations: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision {self.precision!r}: expected one of {', '.join(PRECISIONS)}")

    @classmethod
    def for_profiles(
        cls, profiles: Mapping[str, Mapping[str, Sequence[Sequence[int]]]], **others: Any
    ) -> RewriteOptions:
        """Options whose largest shapes are the last of each [smallest, usual, largest]."""
        largest = {graph: {name: shapes[-1] for name, shapes in each.items()} for graph, each in profiles.items()}
        return cls(largest=largest, **others)


@dataclass(frozen=True)
class RewrittenGraph:
    """One graph's part of rewrite.json."""

    name: str
    nodes_before: int
    nodes_after: int
    vq_nodes: int
    passes: tuple[PassResult, ...]


@dataclass(frozen=True)
class RewriteReport:
    graphs: tuple[RewrittenGraph, ...]
    sidecar_bytes: int
    sidecar_tensors: int
    int8_activations: bool = False

    def to_json(self) -> dict[str, Any]:
        sidecar = {"file": SIDECAR, "bytes": self.sidecar_bytes, "tensors": self.sidecar_tensors}
        graphs = [asdict(graph) for graph in self.graphs]
        shared = {"format_version": FORMAT_VERSION, "int8_activations": self.int8_activations}
        return shared | {"sidecar": sidecar, "graphs": graphs}


Pass = Callable[[gs.Graph], PassResult]


def compute_passes(taps: list[str], name: str, options: RewriteOptions) -> list[Pass]:
    """The passes that keep our nodes in the reference form, so that bodies still run and outputs can be compared.

    The comment at each says why it stands there.
    """
    limit = options.block_bytes
    return [
        lambda graph: strip_taps(graph, taps),  # first: a tap between two nodes would hold back what follows
        merge_equal_nodes,  # before fusing: equal slices of one tensor are different tensors until here
        fuse_shared_input,  # while weights are in chunk order, where rows concatenate
        *([] if limit is None else [lambda graph: split_rows(graph, limit)]),  # after fusing: it makes weights larger
        *_tiling(name, options),  # before casts stand inside the chain that it looks for
        *([half_matmuls] if options.precision == "mixed" else []),
    ]


def device_passes(taps: list[str], name: str, sidecar: Sidecar, options: RewriteOptions) -> list[Pass]:
    """All passes of the device form in order."""
    return [
        *compute_passes(taps, name, options),
        remove_bodies,  # after fusing, which may bring a body kind that no node had before
        lambda graph: externalize_weights(graph, sidecar),  # after fusing, or the sidecar would hold unfused codes
        lambda graph: dense_inputs(graph, sidecar),  # after precision, which stores them in the dtype they end with
        # Last: the nodes are the plugin's by now, and nothing after it reads attributes.
        lambda graph: plugin_attributes(graph, options.int8_activations),
    ]


def _tiling(name: str, options: RewriteOptions) -> list[Pass]:
    largest = options.largest.get(name)
    return [] if largest is None else [lambda graph: tile_queries(graph, largest, options.scores_bytes)]


def device_form(reference: Path, folder: Path, options: RewriteOptions | None = None) -> RewriteReport:
    """Rewrite every graph of the folder `reference` into the existing folder `folder`, with one sidecar for all.

    Raises:
        BudgetError: a weight cannot be cut into parts that fit a block.
        InputDataError: there is no graph, or its external data is missing.
        MgvqError: after the passes a UINT8 initializer or a weight inside a node of ours is left.
    """
    options = options or RewriteOptions()
    sidecar, reports = Sidecar(), []
    for path in reference_paths(reference):
        graph, taps = import_graph(path)
        before = len(graph.nodes)
        results = tuple(run(graph) for run in device_passes(taps, path.stem, sidecar, options))
        _check_device_form(graph, path.stem, results)
        _embed_constants(graph)
        vq_nodes = sum(vq_op.is_vq_op(node.op, node.domain) for node in graph.nodes)
        reports.append(RewrittenGraph(path.stem, before, len(graph.nodes), vq_nodes, results))
        save_graph(graph, folder / path.name)
    save_file(sidecar.tensors, folder / SIDECAR, metadata={"format_version": str(FORMAT_VERSION)})
    report = RewriteReport(tuple(reports), sidecar.nbytes, len(sidecar.tensors), options.int8_activations)
    write_json(folder / REPORT, report.to_json())
    return report


def portable_form(reference: Path, folder: Path, options: RewriteOptions | None = None) -> None:
    """Write the reference graphs without their taps into the existing folder `folder`; bodies and data stay.

    Of the options, `largest` and `scores_bytes` have an effect: attention is tiled as in the device form.
    """
    for path in reference_paths(reference):
        graph, taps = import_graph(path)
        strip_taps(graph, taps)
        for run in _tiling(path.stem, options or RewriteOptions()):
            run(graph)
        data = path.with_name(f"{path.name}.data")
        if data.is_file():
            shutil.copyfile(data, folder / data.name)
        save_graph(graph, folder / path.name)


def reference_paths(folder: Path) -> list[Path]:
    """The graphs of a folder, by name.

    Raises:
        InputDataError: there is none.
    """
    paths = sorted(folder.glob("*.onnx"))
    if not paths:
        raise InputDataError(f"{folder}: expected reference graphs (*.onnx), found none; run `mgvq export` first")
    return paths


class _OnDisk(LazyValues):
    """Values in the data file beside the graph, read when asked for."""

    def __init__(self, tensor: onnx.TensorProto, folder: Path) -> None:
        super().__init__(tensor)
        self._folder = folder

    def load(self) -> np.ndarray:
        return onnx.numpy_helper.to_array(self.tensor, base_dir=str(self._folder))


def import_graph(path: Path, *, infer_shapes: bool = False) -> tuple[gs.Graph, list[str]]:
    """(graph, names of its taps); external weights stay on disk until a pass reads them.

    `infer_shapes` fills in shapes and types that a file from elsewhere may lack.

    Raises:
        InputDataError: the file is no ONNX model, or its external data is not beside it.
    """
    try:
        model = onnx.load(path, load_external_data=False)
        graph = gs.import_onnx(onnx.shape_inference.infer_shapes(model) if infer_shapes else model)
    except Exception as error:
        raise InputDataError(f"{path}: expected an ONNX graph ({error}); run `mgvq export` again") from error
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant) and isinstance(tensor._values, LazyValues):
            _require_data(tensor._values.tensor, path)
            tensor._values = _OnDisk(tensor._values.tensor, path.parent)
    taps = next((entry.value for entry in model.metadata_props if entry.key == TAPS_KEY), "[]")
    return graph, json.loads(taps)


def _require_data(tensor: onnx.TensorProto, path: Path) -> None:
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), None)
    if location and not (path.parent / location).is_file():
        raise InputDataError(f"{path}: external data {location} is not beside it; copy both files or export again")


def _embed_constants(graph: gs.Graph) -> None:
    """Read what still stands in the reference graph's data file into the graph."""
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant):
            tensor.values = tensor.values
            tensor.data_location = None


def save_graph(graph: gs.Graph, path: Path, embed_limit_bytes: int = EMBED_LIMIT_BYTES) -> None:
    """Write the graph; initializers that are in memory go to {name}.onnx.data when they exceed the limit together."""
    if graph.functions or any(vq_op.is_vq_op(node.op, node.domain) for node in graph.nodes):
        _import_domain(graph)
    vq_op.register_schemas()
    order_by_need(graph)
    model = gs.export_onnx(graph)
    entry = model.metadata_props.add()
    entry.key, entry.value = FORMAT_KEY, str(FORMAT_VERSION)
    data = f"{path.name}.data"
    if model.ByteSize() > embed_limit_bytes:
        (path.parent / data).unlink(missing_ok=True)
        onnx.save(model, path, save_as_external_data=True, location=data, size_threshold=1024)
    else:
        onnx.save(model, path)
    onnx.checker.check_model(str(path))


def order_by_need(graph: gs.Graph) -> None:
    """Nodes in the order in which outputs need them, depth first: tiles of an attention one after the other.

    Sorted by levels, as passes leave them, a runtime that keeps the file's order would hold all tiles' scores at once.
    """
    graph.toposort()
    level = {id(tensor): place for place, node in enumerate(graph.nodes) for tensor in node.outputs}
    ordered: dict[int, gs.Node] = {}
    for output in sorted(graph.outputs, key=lambda tensor: level.get(id(tensor), 0)):
        waiting = [(node, False) for node in output.inputs]
        while waiting:
            node, ready = waiting.pop()
            if id(node) in ordered:
                continue
            if ready:
                ordered[id(node)] = node
                continue
            waiting.append((node, True))
            # The first input's producers come out first: the stack is read from its end.
            waiting += [(each, False) for tensor in reversed(_read_by(node)) for each in tensor.inputs]
    left = [node for node in graph.nodes if id(node) not in ordered]
    graph.nodes = [*ordered.values(), *left]


def _read_by(node: gs.Node) -> list[gs.Tensor]:
    """A node's inputs, and what its bodies read from outside."""
    inner = [value for value in node.attrs.values() if isinstance(value, gs.Graph)]
    return [*node.inputs, *(tensor for graph in inner for each in graph.nodes for tensor in _read_by(each))]


def _import_domain(graph: gs.Graph) -> None:
    domains = {entry.domain for entry in graph.import_domains or []}
    if vq_op.DOMAIN not in domains:
        ours = onnx.helper.make_opsetid(vq_op.DOMAIN, vq_op.OPSET_VERSION)
        graph.import_domains = [*(graph.import_domains or []), ours]


def _check_device_form(graph: gs.Graph, name: str, results: tuple[PassResult, ...]) -> None:
    """Refuse a graph that TensorRT would, or that the target's memory cannot hold, with the passes' reasons."""
    refused = {result.name: result.refused for result in results}
    if refused.get("split_rows"):
        parts = "; ".join(f"{x.where}: {x.reason}" for x in refused["split_rows"])
        raise BudgetError(f"graph {name}: {parts}; choose fewer bits for it or a target with larger blocks")
    reasons = "; ".join(f"{x.where}: {x.reason}" for x in refused.get("externalize_weights", ()))
    left = [x.name for x in graph.tensors().values() if isinstance(x, gs.Constant) and x.dtype == "uint8"]
    if left or reasons:
        raise MgvqError(
            f"graph {name}: a device graph may hold no UINT8 initializer, found {left}; weights that did not leave the "
            f"graph: {reasons or 'none'}"
        )
