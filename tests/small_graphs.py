"""Small hand-made ONNX graphs for passes: inputs with named sizes in, an onnx-graphsurgeon graph or a session out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper, numpy_helper

from toolchain.device.generation.ort_graphs import open_session, session_graph
from toolchain.graph.rewrite import import_graph, save_graph

TYPES = {"float": TensorProto.FLOAT, "half": TensorProto.FLOAT16, "int64": TensorProto.INT64}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def step(op: str, inputs: str, output: str, **attributes) -> onnx.NodeProto:
    """A node called after its output."""
    return helper.make_node(op, inputs.split(), [output], name=output, **attributes)


def small_graph(folder: Path, nodes, inputs: dict[str, tuple], outputs, weights=None) -> gs.Graph:
    """The graph, shapes inferred. `inputs`: name → (type, *shape); `outputs` are float, of inferred shape."""
    entries = [helper.make_tensor_value_info(name, TYPES[kind], list(shape)) for name, (kind, *shape) in inputs.items()]
    results = [helper.make_tensor_value_info(name, TYPES["float"], None) for name in outputs]
    stored = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(nodes, "small", entries, results, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path = folder / "small.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return import_graph(path)[0]


def run_graph(graph: gs.Graph, folder: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The graph's outputs in onnxruntime."""
    save_graph(graph, folder / "run.onnx")
    return session_graph(open_session(folder / "run.onnx"))(feeds)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected))
