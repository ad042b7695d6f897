"""The sidecar's weights on the device: uploaded once, and bound as inputs of every engine that reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from numpy.typing import NDArray

from toolchain.device.runtime.cuda import Cuda
from toolchain.device.runtime.loaded_engines import LoadedEngine
from toolchain.errors import InputDataError

SIDECAR = "device/weights.safetensors"


def upload_weights(path: Path | None, engines: Mapping[str, LoadedEngine], cuda: Cuda) -> dict[str, int]:
    """Name → pointer of every tensor of the sidecar, uploaded one at a time; empty for None.

    Raises:
        InputDataError: a tensor is read by no engine, or is not what an engine reads.
    """
    pointers: dict[str, int] = {}
    for name, array in _sidecar(path):
        readers = [engine for engine in engines.values() if name in engine.inputs]
        if not readers:
            raise InputDataError(f"{path}: tensor {name} is read by no engine; run `mgvq build` again")
        for engine in readers:
            expected = engine.tensors[name]
            if (array.dtype, array.shape) != (expected.dtype, expected.shape):
                raise InputDataError(
                    f"{path}: tensor {name} is {array.dtype}{list(array.shape)}, engine {engine.name} reads "
                    f"{expected.dtype}{list(expected.shape)}; run `mgvq build` again"
                )
        pointers[name] = cuda.allocate(array.nbytes, f"weight {name}")
        cuda.upload(pointers[name], array)
        cuda.synchronize()
    return pointers


def _sidecar(path: Path | None) -> Iterator[tuple[str, NDArray]]:
    """Tensors of a sidecar, read as they are asked for."""
    if path is None:
        return
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        names = file.keys()
        for name in names:
            yield name, file.get_tensor(name)
