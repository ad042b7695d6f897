"""Proof that the VQ plugins compute here what the format says: small stored cases with exact answers.

Entries and inputs are small integers and scales powers of two, so that every product and sum is exact in float32 in
whatever order it is formed: an answer is right bit by bit, or wrong. `write_cases` runs where the bundle is made, with
the format's own decoder (toolchain/vq/format.py); the others run on the board.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolchain.device.runtime.builder import Builder
from toolchain.device.runtime.cuda import Cuda
from toolchain.device.runtime.loaded_engines import LoadedEngine
from toolchain.errors import EnvironmentMismatch, InputDataError, NumericGateError
from toolchain.values import FORMAT_VERSION, VQCode
from toolchain.vq import format as vq_format

FILE = "selftest.safetensors"
LINEAR, EMBEDDING = "VQLinear", "VQEmbedding"
# Padded rows and columns, and one, a few and many tokens: the three ways a product is formed.
ROWS, COLUMNS, TOKENS = 200, 80, (1, 5, 70)
INPUTS = {LINEAR: ("x", "codes", "table", "scales", "bias"), EMBEDDING: ("ids", "codes", "table", "scales")}
TYPES = {"float32": "FLOAT", "float16": "HALF", "int8": "INT8", "int64": "INT64"}  # NumPy's name → DataType's


@dataclass(frozen=True)
class Case:
    """One node: its op, code, size, inputs by the contract's names, and the output expected, float32."""

    name: str
    op: str
    code: VQCode
    rows: int
    columns: int
    inputs: dict[str, NDArray]
    expected: NDArray[np.float32]


def make_cases(codes: Iterable[VQCode], seed: int = 0) -> list[Case]:
    """For every code: a linear with each count of tokens, and an embedding; the same cases for the same seed."""
    rng, cases = np.random.default_rng(seed), []
    for code in sorted(set(codes), key=str):
        symbols = rng.integers(0, 1 << code.shift, (*code.chunk_shape(ROWS, COLUMNS), 16)).astype(np.uint8)
        packed = vq_format.pack(symbols, code)
        table = rng.integers(-8, 9, (code.entries, code.vector)).astype(code.codebook_dtype)
        scales = rng.choice([0.5, 1.0, 2.0], ROWS).astype(np.float16)
        weight = vq_format.decode(packed, table, scales, code, ROWS, COLUMNS)
        device = vq_format.device_from_checkpoint(packed, code, ROWS, COLUMNS).view(np.int8)
        stored = {"codes": device, "table": table, "scales": scales}
        bias = rng.integers(-8, 9, ROWS).astype(np.float32)
        for tokens in TOKENS:
            x = rng.integers(-4, 5, (tokens, COLUMNS)).astype(np.float32)
            inputs = {"x": x, **stored, "bias": bias}
            name = f"{LINEAR}/{code}/{tokens}"
            cases.append(Case(name, LINEAR, code, ROWS, COLUMNS, inputs, x @ weight.T + bias))
        ids = rng.integers(0, ROWS, 9)
        cases.append(Case(f"{EMBEDDING}/{code}", EMBEDDING, code, ROWS, COLUMNS, {"ids": ids, **stored}, weight[ids]))
    return cases


def write_cases(codes: Iterable[VQCode], path: Path) -> None:
    """Store `make_cases` as safetensors: NAME/INPUT and NAME/expected, with the sizes as JSON in the metadata.

    Equal codes give equal bytes.
    """
    from safetensors.numpy import save_file

    cases = make_cases(codes)
    tensors = {
        f"{case.name}/{key}": np.ascontiguousarray(array) for case in cases for key, array in case.inputs.items()
    }
    tensors |= {f"{case.name}/expected": case.expected for case in cases}
    sizes = [{"name": c.name, "op": c.op, "code": str(c.code), "rows": c.rows, "columns": c.columns} for c in cases]
    save_file(tensors, path, metadata={"cases": json.dumps(sizes)})  # one key: their order is not fixed


def read_cases(path: Path) -> list[Case]:
    """The cases of a file.

    Raises:
        InputDataError: it is no such file, or a tensor is missing.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            sizes = json.loads(file.metadata()["cases"])
            return [_read_case(file, each) for each in sizes]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputDataError(f"{path}: expected the plugins' self-test ({error!r}); copy the bundle again") from None


def check_plugins(trt: ModuleType, builder: Builder, cuda: Cuda, cases: Sequence[Case]) -> None:
    """Run all cases as one engine of plugin nodes and compare bit by bit. The plugin library is loaded already.

    Raises:
        NumericGateError: an output differs; it names the case and the first element.
        EnvironmentMismatch: the plugin refuses a node, or the engine does not build or run.
    """
    network = builder.empty_network()
    for case in cases:
        _add_node(trt, builder.log, network, case)
    try:
        plan = builder.build_network("selftest", network)
    except InputDataError as error:
        raise EnvironmentMismatch(f"the plugins' self-test does not build: {error}") from None
    runtime = trt.Runtime(builder.log)
    engine = LoadedEngine(trt, runtime, "selftest", bytes(memoryview(plan)), builder.log)
    memory = cuda.allocate(engine.memory_bytes, "the self-test")
    context = engine.context(cuda.stream, 0, memory, engine.memory_bytes)
    inputs = {f"{case.name}/{key}": _uploaded(cuda, each) for case in cases for key, each in case.inputs.items()}
    outputs = {f"{case.name}/y": cuda.allocate(case.expected.nbytes, "the self-test") for case in cases}
    for name, pointer in (inputs | outputs).items():
        context.bind(name, pointer)
    context.run(cuda.stream)
    for case in cases:
        found = cuda.download(outputs[f"{case.name}/y"], case.expected.shape, np.float32)
        compare(case, found, "the plugin")
    for pointer in (memory, *inputs.values(), *outputs.values()):
        cuda.free(pointer)


def compare(case: Case, found: NDArray[np.float32], what: str) -> None:
    """Refuse an output that is not the expected one, bit by bit.

    Raises:
        NumericGateError: it is not.
    """
    if np.array_equal(found, case.expected):
        return
    place = tuple(int(i) for i in np.argwhere(found != case.expected)[0])
    raise NumericGateError(
        f"self-test {case.name}: {what} gives {found[place]} at {place}, expected {case.expected[place]} "
        f"({int((found != case.expected).sum())} of {found.size} differ); do not use this library: build it from the "
        "bundle's sources on this board, and report it if that does not help"
    )


def _add_node(trt: ModuleType, log: Any, network: Any, case: Case) -> None:
    inputs = []
    for key in INPUTS[case.op]:
        array = case.inputs[key]
        kind = getattr(trt.DataType, TYPES[str(array.dtype)])
        inputs.append(network.add_input(f"{case.name}/{key}", kind, array.shape))
    sizes = {"rows": case.rows, "columns": case.columns, "vector": case.code.vector, "shift": case.code.shift}
    sizes |= {"window": case.code.window, "format_version": FORMAT_VERSION}
    numbers = {key: np.array([value], dtype=np.int32) for key, value in sizes.items()}  # fields point into them
    fields = [trt.PluginField(key, number, trt.PluginFieldType.INT32) for key, number in numbers.items()]
    creator = trt.get_plugin_registry().get_creator(case.op, "1", "")
    plugin = creator.create_plugin(case.name, trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)
    layer = None if plugin is None else network.add_plugin_v3(inputs, [], plugin)
    if layer is None:
        raise EnvironmentMismatch(f"self-test {case.name}: the plugin refuses the node ({log.last()})")
    output = layer.get_output(0)
    output.name = f"{case.name}/y"
    network.mark_output(output)


def _uploaded(cuda: Cuda, array: NDArray) -> int:
    pointer = cuda.allocate(array.nbytes, "the self-test")
    cuda.upload(pointer, array)
    return pointer


def _read_case(file: Any, sizes: Mapping[str, Any]) -> Case:
    name, op = sizes["name"], sizes["op"]
    inputs = {key: file.get_tensor(f"{name}/{key}") for key in INPUTS[op]}
    code = VQCode.parse(sizes["code"])
    return Case(name, op, code, sizes["rows"], sizes["columns"], inputs, file.get_tensor(f"{name}/expected"))
