"""The second route: any ONNX file becomes a reference graph of ours, quantized in place; then the same passes.

    FILE.onnx → find layers → second moments of their inputs → codes → reference graph → device and portable form

Without inputs to measure on, every column counts alike (H = I). Files of opsets below 18 are converted; a later opset
stays. Layers that read the same tensor share a table, so that they fuse.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import torch
from numpy.typing import NDArray

from toolchain.errors import InputDataError, UnsupportedError
from toolchain.graph.export import FORMAT_KEY
from toolchain.graph.op import vq_op
from toolchain.graph.op.bodies import function_bodies
from toolchain.graph.passes import Refusal
from toolchain.graph.passes.vq_from_dense import DenseLinear, StoredWeight, find_linears, replace_linears
from toolchain.graph.rewrite import EMBED_LIMIT_BYTES, import_graph
from toolchain.values import FORMAT_VERSION, VQCode
from toolchain.vq import format as vq_format
from toolchain.vq.solve import quantize_group
from toolchain.vq.weights import Options, VQWeights

Feeds = dict[str, NDArray]
DEFAULT_CODE = "2,4,8"
PROTOBUF_LIMIT_BYTES = (1 << 31) - 1


@dataclass(frozen=True)
class ThirdPartyLayer:
    """One quantized layer. `relative_error` is √(tr(E H Eᵀ) / tr(W H Wᵀ)): of outputs, or of weights where H = I."""

    name: str
    rows: int
    columns: int
    code: str
    bytes_before: int
    bytes_after: int
    relative_error: float


@dataclass(frozen=True)
class ThirdPartyReport:
    """What became of one file. `output_errors` is relative, by output, on the last inputs given; empty without any."""

    layers: tuple[ThirdPartyLayer, ...]
    refused: tuple[Refusal, ...]
    samples: int
    output_errors: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION} | dataclasses.asdict(self)


def quantize_third_party(
    source: Path,
    out: Path,
    inputs: Sequence[Path] = (),
    codes: Sequence[tuple[str, str]] = (),
    seed: int = 0,
    options: Options | None = None,
) -> ThirdPartyReport:
    """Write `source`, quantized, to `out` (and `out`.data beside it when large) as a reference graph.

    Args:
        inputs: .npz files, one run of the graph each, arrays named after its inputs; second moments are taken over all.
        codes: (pattern, code) of layers by name, the last match wins; 2,4,8 where none does.
        seed: of the tables' training; nothing else is random.

    Raises:
        InputDataError: a file cannot be read, or an .npz does not fit the graph's inputs.
        UnsupportedError: the opset cannot be brought to 18, or no layer can be quantized; the message has the reasons.
    """
    graph = _imported(source)
    layers, refused = find_linears(graph)
    chosen = {layer.name: _code_for(layer.name, codes) for layer in layers}
    small = [layer for layer in layers if layer.stored_bytes(chosen[layer.name]) >= 2 * layer.weight.size]
    refused += [Refusal(x.name, _too_small(x, chosen[x.name])) for x in small]
    layers = [layer for layer in layers if layer not in small]
    if not layers:
        reasons = "; ".join(f"{x.where}: {x.reason}" for x in refused) or "it has no MatMul and no Gemm"
        raise UnsupportedError(f"{source}: no layer can be quantized: {reasons}")
    runs = [_feeds(path) for path in inputs]
    moments = second_moments(source, sorted({layer.x.name for layer in layers}), runs) if runs else {}
    stored, report = _quantize(layers, chosen, moments, seed, options or Options())
    replace_linears(graph, stored, layers)
    _save(graph, out)
    errors = output_errors(source, out, runs[-1]) if runs else {}
    return ThirdPartyReport(tuple(report), tuple(refused), len(runs), errors)


def second_moments(source: Path, names: Sequence[str], runs: Sequence[Feeds]) -> dict[str, NDArray[np.float64]]:
    """E[x xᵀ] float64[n, n] of every tensor named, over all vectors along its last axis in all runs, in onnxruntime.

    Raises:
        InputDataError: a run does not fit the graph's inputs.
        UnsupportedError: with its weights the model is larger than a protobuf can be.
    """
    model = onnx.load(source)
    if model.ByteSize() > PROTOBUF_LIMIT_BYTES:
        raise UnsupportedError(
            f"{source}: its {model.ByteSize():,} bytes are more than inputs can be run through "
            f"({PROTOBUF_LIMIT_BYTES:,}); quantize it without inputs"
        )
    inside = [name for name in names if name not in {entry.name for entry in model.graph.input}]
    present = {entry.name for entry in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inside if name not in present)
    session = _session(model.SerializeToString(), source)
    sums: dict[str, NDArray[np.float64]] = {}
    counts: dict[str, int] = {}
    for feeds in runs:
        found = _run(session, inside, feeds, source) | feeds
        for name in names:
            vectors = found[name].reshape(-1, found[name].shape[-1]).astype(np.float64)
            sums[name] = sums.get(name, 0.0) + vectors.T @ vectors
            counts[name] = counts.get(name, 0) + len(vectors)
    return {name: sums[name] / max(1, counts[name]) for name in names}


def output_errors(source: Path, rewritten: Path, feeds: Feeds) -> dict[str, float]:
    """Output → ‖a − b‖ / ‖a‖ of the quantized graph against the original, both in onnxruntime."""
    a, b = (_run(_session(str(path), path), None, feeds, path) for path in (source, rewritten))
    norms = {name: float(np.linalg.norm(x.astype(np.float64))) for name, x in a.items() if x.dtype.kind == "f"}
    return {
        name: float(np.linalg.norm(a[name].astype(np.float64) - b[name])) / (norm or 1.0)
        for name, norm in norms.items()
    }


def _imported(source: Path) -> gs.Graph:
    graph, _ = import_graph(source, infer_shapes=True)
    if graph.opset < vq_op.ONNX_OPSET:
        try:
            converted = onnx.version_converter.convert_version(onnx.load(source), vq_op.ONNX_OPSET)
            graph = gs.import_onnx(onnx.shape_inference.infer_shapes(converted))
        except Exception as error:  # the converter's own exception types are not exported
            raise UnsupportedError(
                f"{source}: opset {graph.opset} cannot be converted to {vq_op.ONNX_OPSET} ({error}); export it anew"
            ) from error
    return graph


def _code_for(name: str, codes: Sequence[tuple[str, str]]) -> VQCode:
    matching = [code for pattern, code in codes if fnmatch.fnmatchcase(name, pattern)]
    return VQCode.parse(matching[-1] if matching else DEFAULT_CODE)


def _too_small(layer: DenseLinear, code: VQCode) -> str:
    return (
        f"too small: codes, table and scales take {layer.stored_bytes(code)} bytes in code {code}, "
        f"{2 * layer.weight.size} in float16"
    )


def _quantize(
    layers: list[DenseLinear],
    codes: dict[str, VQCode],
    moments: dict[str, NDArray[np.float64]],
    seed: int,
    options: Options,
) -> tuple[dict[str, StoredWeight], list[ThirdPartyLayer]]:
    """Weights by layer name. A weight that several layers read is coded once, for the input of the first."""
    stored: dict[str, StoredWeight] = {}
    report: list[ThirdPartyLayer] = []
    firsts: dict[tuple[str, VQCode], str] = {}
    groups: dict[tuple[int, int, VQCode], list[DenseLinear]] = {}
    for layer in layers:
        if firsts.setdefault((layer.source, codes[layer.name]), layer.name) == layer.name:
            groups.setdefault((id(layer.x), layer.columns, codes[layer.name]), []).append(layer)
    for number, ((_, columns, code), members) in enumerate(groups.items()):
        moment = torch.from_numpy(moments.get(members[0].x.name, np.eye(columns))).float()
        generator = torch.Generator().manual_seed(seed)
        group = quantize_group([torch.tensor(x.weight) for x in members], moment, code, options, generator)
        for layer, weights, error, whole in zip(members, group.layers, group.errors, group.references, strict=True):
            stored[layer.name] = _stored(layer.name, f"mgvq_tables.t{number}", weights)
            relative = (error / whole) ** 0.5 if whole else 0.0
            after = layer.stored_bytes(code)
            before = layer.weight.size * layer.dtype.itemsize
            report.append(ThirdPartyLayer(layer.name, layer.rows, columns, str(code), before, after, relative))
    for layer in layers:
        stored[layer.name] = stored[firsts[layer.source, codes[layer.name]]]
    return stored, report


def _stored(name: str, table_name: str, weights: VQWeights) -> StoredWeight:
    symbols = vq_format.unpack(weights.codes.numpy(), weights.code, weights.rows, weights.columns)
    return StoredWeight(
        name, table_name, weights.code, symbols, weights.codebook.float().numpy(), weights.scales.float().numpy()
    )


def _save(graph: gs.Graph, out: Path) -> None:
    """Write the graph with our bodies, in the graph's own opset, and check it."""
    ours = [node for node in graph.nodes if vq_op.is_vq_op(node.op, node.domain)]
    kinds = {(vq_op.LINEAR, vq_op.code_from_attributes(x.attrs, x.name)[0], len(x.inputs) > 4) for x in ours}
    domains = [each for each in graph.import_domains or [] if each.domain != vq_op.DOMAIN]
    graph.import_domains = [*domains, onnx.helper.make_opsetid(vq_op.DOMAIN, vq_op.OPSET_VERSION)]
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant):
            tensor.values = tensor.values
            tensor.data_location = None
    model = gs.export_onnx(graph)
    for body in function_bodies(kinds):
        body.opset_import[0].version = graph.opset
        model.functions.append(body)
    entry = model.metadata_props.add()
    entry.key, entry.value = FORMAT_KEY, str(FORMAT_VERSION)
    data = out.with_name(f"{out.name}.data")
    data.unlink(missing_ok=True)
    outside = model.ByteSize() > EMBED_LIMIT_BYTES
    onnx.save(model, out, save_as_external_data=outside, location=data.name if outside else None, size_threshold=1024)
    onnx.checker.check_model(str(out))


def _feeds(path: Path) -> Feeds:
    try:
        with np.load(path, allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    except (OSError, ValueError) as error:
        raise InputDataError(
            f"inputs {path}: expected an .npz of arrays ({error}); write it with numpy.savez"
        ) from None


def _session(model: str | bytes, source: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exception types are not exported
        raise InputDataError(f"{source} does not load in onnxruntime: {error}") from error


def _run(
    session: onnxruntime.InferenceSession, names: list[str] | None, feeds: Feeds, source: Path
) -> dict[str, NDArray]:
    expected, found = sorted(entry.name for entry in session.get_inputs()), sorted(feeds)
    if expected != found:
        raise InputDataError(f"inputs of {source}: expected arrays {expected}, found {found}")
    outputs = names if names is not None else [entry.name for entry in session.get_outputs()]
    if not outputs:
        return {}
    try:
        return dict(zip(outputs, session.run(outputs, feeds)))
    except Exception as error:  # onnxruntime's own exception types are not exported
        raise InputDataError(f"inputs of {source} do not run: {error}") from error
