"""Proof that engines compute here what the model did where the bundle was made: stored calls, repeated and compared.

reference/ of a bundle holds calls of the quantized model, some with the past in the buckets that engines are built for
(graph/reference.py). Each of those is answered by its engine, and compared as validation compares the device graphs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from toolchain.bundle.manifest import Bundle
from toolchain.device.engines.compare import Source, ValidationReport, answered, compare_calls
from toolchain.device.engines.recorded_calls import BUCKETED, INDEX, load_reference
from toolchain.device.families.base import Feeds
from toolchain.device.runtime.cuda import Cuda
from toolchain.device.runtime.loaded_engines import EngineContext, LoadedEngine
from toolchain.device.runtime.weights import SIDECAR, upload_weights
from toolchain.errors import InputDataError

FOLDER = "reference"
ENGINES = "engines"
DEVICE_GRAPHS = "onnx-device"  # validation's name of the graphs that engines are built from
# An engine may be off by so many times what the device graphs may. TensorRT fuses otherwise and may sum in float16, and
# no board's engine has been measured yet: chosen so that what is wrong, which is off by as much as the output, is
# refused, and what is less exact is said.
ENGINE_FACTOR = 8.0


def has_calls(bundle: Bundle) -> bool:
    """Whether a bundle holds calls that engines can repeat."""
    if f"{FOLDER}/{INDEX}" not in bundle.files:
        return False
    return any(entry["step"].startswith(BUCKETED) for entry in bundle.read_json(f"{FOLDER}/{INDEX}")["calls"])


def check_engines(bundle: Bundle, engines: Mapping[str, LoadedEngine], cuda: Cuda) -> ValidationReport:
    """Every tap's worst error of these engines against the stored calls, with the budget that `require` holds it to.

    Raises:
        InputDataError: reference/ or the sidecar is not of these engines.
        BudgetError: memory does not suffice for the engines and their weights.
        EnvironmentMismatch: an engine does not run.
    """
    calls = [call for call in load_reference(bundle.folder / FOLDER, BUCKETED) if call.graph in engines]
    source = calls_source(bundle)
    weights = upload_weights(bundle.path(SIDECAR), engines, cuda)
    size = max(engine.memory_bytes for engine in engines.values())
    memory = cuda.allocate(size, "activations of the engines")
    try:
        graphs = {name: EngineGraph(engine, cuda, weights, memory, size) for name, engine in engines.items()}
        return compare_calls(source, calls, ENGINES, answered(Source(ENGINES, graphs), calls), engine_budgets(bundle))
    finally:
        for pointer in (memory, *weights.values()):
            cuda.free(pointer)


def calls_source(bundle: Bundle) -> str:
    """What computed the stored calls."""
    return str(bundle.read_json(f"{FOLDER}/{INDEX}")["source"])


def engine_budgets(bundle: Bundle) -> dict[tuple[str, str], float]:
    """(graph, tap) → the largest relative error of an engine, from what validation allowed the device graphs.

    Raises:
        InputDataError: validation.json is missing or has no such comparison.
    """
    try:
        reports = bundle.read_json(f"{FOLDER}/validation.json")["reports"]
        taps = next(report["taps"] for report in reports if report["b"] == DEVICE_GRAPHS)
        return {(tap["graph"], tap["tap"]): ENGINE_FACTOR * tap["budget"] for tap in taps if tap["budget"]}
    except (json.JSONDecodeError, KeyError, TypeError, StopIteration) as error:
        raise InputDataError(
            f"bundle file {FOLDER}/validation.json: expected the budgets of {DEVICE_GRAPHS} ({error!r}); make the "
            "bundle again"
        ) from None


class EngineGraph:
    """An engine as a function from named arrays to named arrays, with memory of its own for each call."""

    def __init__(
        self, engine: LoadedEngine, cuda: Cuda, weights: Mapping[str, int], memory: int, memory_bytes: int
    ) -> None:
        self._engine, self._cuda, self._weights = engine, cuda, weights
        self._contexts = [engine.context(cuda.stream, p, memory, memory_bytes) for p in range(engine.profiles)]

    def __call__(self, feeds: Feeds) -> Feeds:
        arrays = {name: np.ascontiguousarray(x, self._engine.inputs[name].dtype) for name, x in feeds.items()}
        context, held = self._context({name: array.shape for name, array in arrays.items()}), []
        try:
            for name in self._engine.inputs:
                if name in self._weights:
                    context.bind(name, self._weights[name])
            for name, array in arrays.items():
                held.append(self._cuda.allocate(array.nbytes, f"{self._engine.name}'s input {name}"))
                context.bind(name, held[-1], array.shape)
                self._cuda.upload(held[-1], array)
            return self._outputs(context, held)
        finally:
            self._cuda.synchronize()
            for pointer in held:
                self._cuda.free(pointer)

    def _outputs(self, context: EngineContext, held: list[int]) -> Feeds:
        """Run, and all outputs as float32; their memory is added to `held`."""
        outputs = {name: tensor for name, tensor in self._engine.tensors.items() if not tensor.is_input}
        places: dict[str, tuple[int, tuple[int, ...]]] = {}
        for name, tensor in outputs.items():
            shape = context.output_shape(name)
            size = tensor.dtype.itemsize * int(np.prod(shape))
            held.append(self._cuda.allocate(size, f"{self._engine.name}'s output {name}"))
            context.bind(name, held[-1])
            places[name] = held[-1], shape
        context.run(self._cuda.stream)
        found = {name: self._cuda.download(*place, outputs[name].dtype) for name, place in places.items()}
        return {name: array.astype(np.float32, copy=False) for name, array in found.items()}

    def _context(self, shapes: Mapping[str, tuple[int, ...]]) -> EngineContext:
        """That of the last profile which takes the shapes: profiles of one token stand behind those of many."""
        fitting = [c for c in self._contexts if self._engine.takes(shapes, c.profile)]
        return (fitting or self._contexts)[-1]


def summary(report: ValidationReport) -> dict[str, Any]:
    """What build.json says of a check."""
    worst = report.worst
    return {
        "passed": report.passed,
        "against": report.a,
        "calls": max(tap.calls for tap in report.taps),
        "worst": f"{worst.graph}/{worst.tap}",
        "relative_error": worst.relative,
        "allowed": worst.budget,
        "taps": [tap.to_json() for tap in report.taps],
    }
