"""Engines of a line's graphs on the simulated device: names, types and shapes from the ONNX files, sums on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import simulated_tensorrt
from onnx.reference import ReferenceEvaluator
from simulated_cuda import SimulatedCuda
from simulated_tensorrt import SimulatedGraph

from toolchain.device.runtime.loaded_engines import LoadedEngine
from toolchain.graph.op.plugin_op import PLUGIN_OPS


def graphs_of_folder(folder: Path, functions: Mapping, profiles: Mapping) -> dict[str, SimulatedGraph]:
    """Graph → what its engine computes: `functions` of named arrays, with the profiles of host.json."""
    result = {}
    for number, (name, compute) in enumerate(functions.items()):
        graph = onnx.load(folder / f"{name}.onnx", load_external_data=False).graph
        of_graph = [shapes for key, shapes in profiles.items() if key == name or key.startswith(f"{name}.")]
        size = 4096 * (number + 1)
        result[name] = SimulatedGraph(_tensors(graph.input), _tensors(graph.output), of_graph, compute, size)
    return result


def device_functions(folder: Path, names: Sequence[str] = ("vision", "embed", "decoder")) -> dict:
    """Device graphs as functions of all their inputs, weights included, with the plugin op on the CPU."""

    def function(path):
        evaluator = ReferenceEvaluator(onnx.load(path), new_ops=PLUGIN_OPS)
        return lambda feeds: dict(zip(evaluator.output_names, evaluator.run(None, feeds)))

    return {name: function(folder / f"{name}.onnx") for name in names}


def loaded_engines(graphs: Mapping[str, SimulatedGraph], cuda: SimulatedCuda) -> dict[str, LoadedEngine]:
    """The engines, loaded."""
    trt = simulated_tensorrt.simulated_module(graphs, cuda)
    log = simulated_tensorrt.Logger()
    log.last = lambda: "it gave no reason"
    return {name: LoadedEngine(trt, trt.Runtime(log), name, name.encode(), log) for name in graphs}


def _tensors(entries) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    return {
        x.name: (
            np.dtype(onnx.helper.tensor_dtype_to_np_dtype(x.type.tensor_type.elem_type)),
            tuple(-1 if dim.dim_param else dim.dim_value for dim in x.type.tensor_type.shape.dim),
        )
        for x in entries
    }
