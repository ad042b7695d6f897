"""The rewrite: reference graphs to the device form (plugin nodes, weights outside) and to the portable form.

Folders as written here:

    device/    {name}.onnx, weights.safetensors, rewrite.json        for TensorRT with the plugin
    portable/  {name}.onnx, {name}.onnx.data                         the reference graph without taps: any runtime
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues
from safetensors.numpy import save_file

from toolchain.errors import InputDataError, MgvqError
from toolchain.graph import vq_op
from toolchain.graph.export import FORMAT_KEY, TAPS_KEY
from toolchain.graph.passes import PassResult
from toolchain.graph.passes.externalize_weights import Sidecar, externalize_weights
from toolchain.graph.passes.fuse_shared_input import fuse_shared_input
from toolchain.graph.passes.plugin_attributes import plugin_attributes
from toolchain.graph.passes.remove_bodies import remove_bodies
from toolchain.graph.passes.strip_taps import strip_taps
from toolchain.graph.plugin_op import SIDECAR
from toolchain.values import FORMAT_VERSION, write_json

REPORT = "rewrite.json"
# A protobuf ends at 2 GiB; what stays inside a device graph goes to {name}.onnx.data beyond this.
EMBED_LIMIT_BYTES = 1 << 30


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

    def to_json(self) -> dict[str, Any]:
        sidecar = {"file": SIDECAR, "bytes": self.sidecar_bytes, "tensors": self.sidecar_tensors}
        graphs = [asdict(graph) for graph in self.graphs]
        return {"format_version": FORMAT_VERSION, "sidecar": sidecar, "graphs": graphs}


def device_passes(taps: list[str], sidecar: Sidecar) -> tuple[Callable[[gs.Graph], PassResult], ...]:
    """The passes in order; the comment at each says why it stands there."""
    return (
        lambda graph: strip_taps(graph, taps),  # first: a tap between two nodes would hold back what follows
        fuse_shared_input,  # while weights are in chunk order, where rows concatenate, and bodies still run to compare
        remove_bodies,  # after fusing, which may bring a body kind that no node had before
        lambda graph: externalize_weights(graph, sidecar),  # after fusing, or the sidecar would hold unfused codes
        plugin_attributes,  # last: the nodes are the plugin's by now, and nothing after it reads attributes
    )


def device_form(reference: Path, folder: Path) -> RewriteReport:
    """Rewrite every graph of the folder `reference` into the existing folder `folder`, with one sidecar for all.

    Raises:
        InputDataError: there is no graph, or its external data is missing.
        MgvqError: after the passes a UINT8 initializer or a weight inside a node of ours is left.
    """
    sidecar, reports = Sidecar(), []
    for path in reference_paths(reference):
        graph, taps = import_graph(path)
        before = len(graph.nodes)
        results = tuple(run(graph) for run in device_passes(taps, sidecar))
        _check_device_form(graph, path.stem, results)
        _embed_constants(graph)
        vq_nodes = sum(vq_op.is_vq_op(node.op, node.domain) for node in graph.nodes)
        reports.append(RewrittenGraph(path.stem, before, len(graph.nodes), vq_nodes, results))
        save_graph(graph, folder / path.name)
    save_file(sidecar.tensors, folder / SIDECAR, metadata={"format_version": str(FORMAT_VERSION)})
    report = RewriteReport(tuple(reports), sidecar.nbytes, len(sidecar.tensors))
    write_json(folder / REPORT, report.to_json())
    return report


def portable_form(reference: Path, folder: Path) -> None:
    """Write the reference graphs without their taps into the existing folder `folder`; bodies and data stay."""
    for path in reference_paths(reference):
        graph, taps = import_graph(path)
        strip_taps(graph, taps)
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

    def load(self):
        return onnx.numpy_helper.to_array(self.tensor, base_dir=str(self._folder))


def import_graph(path: Path) -> tuple[gs.Graph, list[str]]:
    """(graph, names of its taps); external weights stay on disk until a pass reads them.

    Raises:
        InputDataError: the file is no ONNX model, or its external data is not beside it.
    """
    try:
        model = onnx.load(path, load_external_data=False)
        graph = gs.import_onnx(model)
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


def _import_domain(graph: gs.Graph) -> None:
    domains = {entry.domain for entry in graph.import_domains or []}
    if vq_op.DOMAIN not in domains:
        ours = onnx.helper.make_opsetid(vq_op.DOMAIN, vq_op.OPSET_VERSION)
        graph.import_domains = [*(graph.import_domains or []), ours]


def _check_device_form(graph: gs.Graph, name: str, results: tuple[PassResult, ...]) -> None:
    """Refuse a graph that TensorRT would, with the passes' reasons."""
    reasons = "; ".join(f"{x.where}: {x.reason}" for result in results[2:] for x in result.refused)
    left = [x.name for x in graph.tensors().values() if isinstance(x, gs.Constant) and x.dtype == "uint8"]
    if left or reasons:
        raise MgvqError(
            f"graph {name}: a device graph may hold no UINT8 initializer, found {left}; weights that did not leave the "
            f"graph: {reasons or 'none'}"
        )
