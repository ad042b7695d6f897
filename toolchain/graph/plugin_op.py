"""The plugin op on the CPU: NumPy implementations of the device form for onnx's ReferenceEvaluator.

    ReferenceEvaluator(model, new_ops=PLUGIN_OPS)

The weight is decoded by the format's definition (vq.format.decode), so an agreement of a device graph with its
reference graph says that codes, tables and scales arrived in the right order. Slow: for validation at small sizes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from safetensors.numpy import load_file

from toolchain.device.answer import Graph, Graphs
from toolchain.device.families.base import Feeds
from toolchain.errors import InputDataError, ShapeError
from toolchain.graph import vq_op
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
    def _run(self, x, codes, table, scales, bias=None, **attributes):
        weight = self.weight(codes, table, scales, attributes)
        y = x.astype(np.float32) @ weight.T
        return ((y if bias is None else y + bias).astype(x.dtype),)


class VQEmbedding(_PluginOp):
    def _run(self, ids, codes, table, scales, **attributes):
        return (self.weight(codes, table, scales, attributes)[ids],)


PLUGIN_OPS: list[type[OpRun]] = [VQLinear, VQEmbedding]


def device_graphs(folder: Path) -> Graphs:
    """The device graphs of a folder on the CPU, with the sidecar's weights bound as inputs.

    Raises:
        InputDataError: there is no graph, or the sidecar is missing or lacks a tensor that a graph asks for.
    """
    paths, sidecar = sorted(folder.glob("*.onnx")), folder / SIDECAR
    if not paths or not sidecar.is_file():
        raise InputDataError(f"{folder}: expected device graphs and {SIDECAR}; run `mgvq rewrite` again")
    weights = load_file(sidecar)
    return {path.stem: _device_graph(path, weights) for path in paths}


def _device_graph(path: Path, weights: dict[str, NDArray]) -> Graph:
    model = onnx.load(path)
    evaluator = ReferenceEvaluator(model, new_ops=PLUGIN_OPS)
    ours = [node for node in model.graph.node if node.domain == vq_op.DOMAIN]
    bound = {name for node in ours for name in node.input[1:4]} & set(evaluator.input_names)
    missing = sorted(bound - set(weights))
    if missing:
        raise InputDataError(f"{path}: {SIDECAR} lacks {missing[:3]} ({len(missing)} in all); run `mgvq rewrite` again")
    given = {name: weights[name] for name in bound}

    def run(feeds: Feeds) -> Feeds:
        return dict(zip(evaluator.output_names, evaluator.run(None, dict(feeds) | given)))

    return run
