"""Engines from the folder that `mgvq build` wrote, checked and loaded, and contexts bound to memory by pointers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from toolchain.bundle.manifest import Bundle
from toolchain.device.runtime.builder import collecting_logger
from toolchain.device.runtime.plugin_library import load_into
from toolchain.errors import EnvironmentMismatch, InputDataError
from toolchain.files.folders import sha256_file

Shape = tuple[int, ...]
RECORD_KEYS = {"backend", "builder_version", "bundle", "engines"}  # of build.json, which engines do not load without


@dataclass(frozen=True)
class EngineTensor:
    """An input or output of an engine; -1 is a free dimension."""

    name: str
    dtype: np.dtype
    shape: Shape
    is_input: bool


class LoadedEngine:
    """An engine on the device."""

    def __init__(self, trt: ModuleType, runtime: Any, name: str, content: bytes, log: Any) -> None:
        """Load one plan.

        Raises:
            EnvironmentMismatch: the library refuses it, or a tensor has to be in host memory.
        """
        self._trt, self._log, self.name = trt, log, name
        self._engine = runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise EnvironmentMismatch(f"engine {name} does not load ({log.last()}); build it again on this machine")
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self.tensors = {each: self._tensor(each) for each in names}

    @property
    def inputs(self) -> dict[str, EngineTensor]:
        return {name: tensor for name, tensor in self.tensors.items() if tensor.is_input}

    @property
    def profiles(self) -> int:
        return self._engine.num_optimization_profiles

    @property
    def memory_bytes(self) -> int:
        """Bytes that a context needs for activations, whichever profile it runs."""
        for name in ("device_memory_size_v2", "device_memory_size"):  # the second before TensorRT 10.1
            if hasattr(self._engine, name):
                return int(getattr(self._engine, name))
        raise EnvironmentMismatch(f"engine {self.name}: this TensorRT does not say what memory it takes")

    def largest_shape(self, name: str, profile: int = 0) -> Shape:
        """The largest shape of an input in a profile."""
        return tuple(self._engine.get_tensor_profile_shape(name, profile)[2])

    def takes(self, shapes: Mapping[str, Shape], profile: int) -> bool:
        """Whether inputs of these shapes lie inside a profile."""
        for name, shape in shapes.items():
            low, _, high = (tuple(each) for each in self._engine.get_tensor_profile_shape(name, profile))
            if len(shape) != len(low) or any(not a <= b <= c for a, b, c in zip(low, shape, high)):
                return False
        return True

    def layer_information(self) -> str:
        """What the engine's inspector says of its layers, as JSON text."""
        return self._engine.create_engine_inspector().get_engine_information(self._trt.LayerInformationFormat.JSON)

    def context(self, stream: int, profile: int, memory: int, memory_bytes: int) -> EngineContext:
        """A context of one profile whose activations go to `memory`, which other contexts may use at other times."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is None or not context.set_optimization_profile_async(profile, stream):
            raise EnvironmentMismatch(f"engine {self.name}: no context for profile {profile} ({self._log.last()})")
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(memory, memory_bytes)
        else:
            context.device_memory = memory
        return EngineContext(self, context, profile, self._log)

    def _tensor(self, name: str) -> EngineTensor:
        if self._engine.get_tensor_location(name) != self._trt.TensorLocation.DEVICE:
            raise EnvironmentMismatch(
                f"engine {self.name}: tensor {name} has to be in host memory, which this runtime does not do; make the "
                "bundle again with this version of mgvq"
            )
        dtype = np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name)))
        is_input = self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT
        return EngineTensor(name, dtype, tuple(self._engine.get_tensor_shape(name)), is_input)


class EngineContext:
    """An engine about to run: pointers and shapes are set, then `run` enqueues it."""

    def __init__(self, engine: LoadedEngine, context: Any, profile: int, log: Any) -> None:
        self.engine, self.profile, self.native, self._log = engine, profile, context, log

    def bind(self, name: str, pointer: int, shape: Shape | None = None) -> None:
        """Where a tensor is, and what shape an input has.

        Raises:
            InputDataError: the shape is outside the profile.
        """
        done = self.native.set_tensor_address(name, pointer)
        if shape is not None:
            done = done and self.native.set_input_shape(name, shape)
        if not done:
            most = self.engine.largest_shape(name, self.profile) if self.engine.tensors[name].is_input else "any"
            raise InputDataError(
                f"engine {self.engine.name}: {name} of shape {shape} is refused ({self._log.last()}); the largest it "
                f"is built for is {most}"
            )

    def output_shape(self, name: str) -> Shape:
        """The shape that the inputs' shapes give."""
        shape = tuple(self.native.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise InputDataError(
                f"engine {self.engine.name}: the shape of {name} is not known from the inputs: {shape}"
            )
        return shape

    def can_capture(self, stream: int) -> bool:
        """Whether `run` may stand in a CUDA graph with the shapes it ran with last; true where the library has no say.

        TensorRT for RTX compiles kernels at run time, and a context may then allocate or wait.
        """
        asked = getattr(self.native, "is_stream_capturable", None)
        return asked is None or bool(asked(stream))

    def run(self, stream: int) -> None:
        """Enqueue on the stream.

        Raises:
            EnvironmentMismatch: it is refused.
        """
        if not self.native.execute_async_v3(stream):
            raise EnvironmentMismatch(f"engine {self.engine.name} does not run ({self._log.last()})")


def load_engines(trt: ModuleType, folder: Path, backend: str, bundle: Bundle) -> dict[str, LoadedEngine]:
    """Every engine of a folder, by its graph's name; CUDA has to have started.

    Raises:
        InputDataError: as `checked_build`, or a file is not what it was.
        EnvironmentMismatch: as `checked_build`, or an engine or the plugins do not load.
    """
    record = checked_build(trt, folder, backend, bundle)
    log = collecting_logger(trt)
    if record.get("plugin"):
        path = folder / record["plugin"]["file"]
        _check_hash(path, record["plugin"]["sha256"])
        load_into(trt, log, path)
    runtime = trt.Runtime(log)
    engines = {}
    for entry in record["engines"]:
        path = folder / entry["file"]
        _check_hash(path, entry["sha256"])
        engines[entry["graph"]] = LoadedEngine(trt, runtime, entry["graph"], path.read_bytes(), log)
    return engines


def checked_build(trt: ModuleType, folder: Path, backend: str, bundle: Bundle) -> dict[str, Any]:
    """build.json of a folder of engines that belong here, which is known without a GPU.

    Raises:
        InputDataError: the folder has no build.json, or was built from another bundle.
        EnvironmentMismatch: it was built by another backend or version.
    """
    record = read_build(folder)
    _check_record(record, folder, backend, trt.__version__, bundle)
    return record


def read_build(folder: Path) -> dict[str, Any]:
    """build.json of a folder of engines.

    Raises:
        InputDataError: it is not there, or damaged.
    """
    path = folder / "build.json"
    if not path.is_file():
        raise InputDataError(
            f"{folder}: expected a folder of engines with build.json, found none; run `mgvq build` with -o {folder}"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputDataError(f"{path} is damaged ({error}); run `mgvq build` again") from None
    missing = sorted(RECORD_KEYS - set(record)) if isinstance(record, dict) else sorted(RECORD_KEYS)
    if missing:
        raise InputDataError(f"{path} lacks {', '.join(missing)}: it is not of mgvq; run `mgvq build` again")
    return record


def _check_record(record: Mapping[str, Any], folder: Path, backend: str, version: str, bundle: Bundle) -> None:
    needed, found = f"{record['backend']} {record['builder_version']}", f"{backend} {version}"
    if needed != found:
        raise EnvironmentMismatch(
            f"engines in {folder}: built with {needed}, found {found}; an engine runs in the version that built it: "
            "run `mgvq build` again"
        )
    if record["bundle"] != bundle.manifest["manifest_sha256"]:
        raise InputDataError(
            f"engines in {folder} were built from another bundle than {bundle.folder}; run `mgvq build` again, or give "
            "the bundle they belong to"
        )


def _check_hash(path: Path, expected: str) -> None:
    if not path.is_file():
        raise InputDataError(f"{path} is missing; run `mgvq build` again")
    if (found := sha256_file(path)) != expected:
        raise InputDataError(f"{path}: expected hash {expected[:12]}, found {found[:12]}; run `mgvq build` again")
