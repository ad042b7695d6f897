"""The plugin op on the CPU: NumPy implementations of the device form for onnx's ReferenceEvaluator.

    ReferenceEvaluator(model, new_ops=PLUGIN_OPS)

The weight is decoded by the format's definition (vq.format.decode), so an agreement of a device graph with its
reference graph says that codes, tables and scales arrived in the right order. Slow: for validation at small sizes.

Two arithmetics. "device": as the graph is written, with float16 casts, and x rounded to float16 inside VQLinear as the
plugin does. "float32": the same graph with every such rounding left out, so that an error of the rewrite cannot hide
behind float16's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from safetensors.numpy import load_file

from toolchain.device.families.base import Feeds
from toolchain.device.generation.answer import Graph, Graphs
from toolchain.errors import InputDataError, ShapeError, UsageError
from toolchain.graph.op import vq_op
from toolchain.vq import format as vq_format

SIDECAR = "weights.safetensors"


def decode_device(codes: NDArray, table: NDArray, scales: NDArray, attributes: dict[str, int], where: str) -> NDArray:
    """Weight float32[rows, columns] of a device node: codes int8[bytes] in device order, table and scales as stored.

    Raises:
        ShapeError: an input has another dtype or shape than the attributes demand.
    """
    code, rows, columns = vq_op.code_from_attributes(attributes, where)
    expected = code.codes_bytes(rows, columns)
    if codes.dtype != np.int8 or codes.shape != (expected,):
        raise ShapeError(
            f"node {where}: expected codes int8[{expected}] in device order, found {codes.dtype}{list(codes.shape)}"
        )
    if scales.dtype != np.float16:
        raise ShapeError(f"node {where}: expected float16 scales, found {scales.dtype}")
    checkpoint = vq_format.checkpoint_from_device(codes.view(np.uint8), code, rows, columns)
    return vq_format.decode(checkpoint, table, scales, code, rows, columns)


class _PluginOp(OpRun):
    """Decodes a node's weight when its codes are first seen; runs that pass the same array again reuse it."""

    op_domain = vq_op.DOMAIN
    _weight: tuple[NDArray, NDArray] | None = None

    def weight(self, codes: NDArray, table: NDArray, scales: NDArray, attributes: dict[str, int]) -> NDArray:
        if self._weight is None or self._weight[0] is not codes:
            self._weight = codes, decode_device(codes, table, scales, attributes, self.onnx_node.name)
        return self._weight[1]


class VQLinear(_PluginOp):
    rounded: np.dtype = np.dtype(np.float16)  # what the kernel multiplies with; sums are float32

    def _run(
        self,
        x: NDArray,
        codes: NDArray,
        table: NDArray,
        scales: NDArray,
        bias: NDArray | None = None,
        **attributes: int,
    ) -> tuple[NDArray, ...]:
        weight = self.weight(codes, table, scales, attributes)
        y = x.astype(self.rounded).astype(np.float32) @ weight.T
        return ((y if bias is None else y + bias).astype(x.dtype),)


class VQEmbedding(_PluginOp):
    def _run(
        self, ids: NDArray, codes: NDArray, table: NDArray, scales: NDArray, **attributes: int
    ) -> tuple[NDArray, ...]:
        return (self.weight(codes, table, scales, attributes)[ids],)


PLUGIN_OPS: list[type[OpRun]] = [VQLinear, VQEmbedding]
# The evaluator finds an op by its class's name.
EXACT_OPS: list[type[OpRun]] = [type("VQLinear", (VQLinear,), {"rounded": np.dtype(np.float32)}), VQEmbedding]
ARITHMETICS = ("device", "float32")


def device_graphs(folder: Path, arithmetic: str = "device") -> Graphs:
    """The device graphs of a folder on the CPU, with the sidecar's weights bound as inputs.

    Inputs are cast to the graph's types: a float32 cache can be fed to float16 `past.*`. `arithmetic` "float32" leaves
    the graph's roundings to float16 out; weights that are stored in float16 stay as stored.

    Raises:
        UsageError: no such arithmetic.
        InputDataError: there is no graph, or the sidecar is missing or lacks a tensor that a graph asks for.
    """
    paths, sidecar = sorted(folder.glob("*.onnx")), folder / SIDECAR
    if not paths or not sidecar.is_file():
        raise InputDataError(f"{folder}: expected device graphs and {SIDECAR}; run `mgvq rewrite` again")
    if arithmetic not in ARITHMETICS:
        raise UsageError(f"arithmetic {arithmetic!r}: expected one of {', '.join(ARITHMETICS)}")
    weights = load_file(sidecar)
    return {path.stem: _device_graph(path, weights, arithmetic) for path in paths}


def _device_graph(path: Path, weights: dict[str, NDArray], arithmetic: str) -> Graph:
    model = onnx.load(path)
    if arithmetic == "float32":
        _without_rounding(model)
    evaluator = ReferenceEvaluator(model, new_ops=PLUGIN_OPS if arithmetic == "device" else EXACT_OPS)
    ours = [node for node in model.graph.node if node.domain == vq_op.DOMAIN]
    types = {x.name: onnx.helper.tensor_dtype_to_np_dtype(x.type.tensor_type.elem_type) for x in model.graph.input}
    bound = set(types) & ({name for node in ours for name in node.input[1:4]} | set(weights))
    missing = sorted(bound - set(weights))
    if missing:
        raise InputDataError(f"{path}: {SIDECAR} lacks {missing[:3]} ({len(missing)} in all); run `mgvq rewrite` again")
    given = {name: weights[name].astype(types[name]) for name in bound}

    def run(feeds: Feeds) -> Feeds:
        cast = {name: np.asarray(array).astype(types.get(name, array.dtype)) for name, array in feeds.items()}
        return dict(zip(evaluator.output_names, evaluator.run(None, cast | given)))

    return run


def _without_rounding(model: onnx.ModelProto) -> None:
    """Float16 becomes float32: the target of casts, inputs, outputs, weights; the weights of our own nodes excepted."""
    half, full = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    ours = {name for node in model.graph.node if node.domain == vq_op.DOMAIN for name in node.input[1:4]}
    for tensor in model.graph.initializer:
        if tensor.data_type == half and tensor.name not in ours:
            array = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == half:
                attribute.i = full
    for entry in (*model.graph.input, *model.graph.output):
        if entry.name not in ours and entry.type.tensor_type.elem_type == half:
            entry.type.tensor_type.elem_type = full
