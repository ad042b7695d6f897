"""Checkpoint folders on disk: configs and safetensors headers, read and checked without loading weights.

Standard library only.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import InputDataError
from toolchain.files.folders import read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPE_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
DTYPE_BYTES |= {"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
# What a checkpoint folder holds beside config and weights, by pattern.
SIDE_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")


@dataclass(frozen=True)
class TensorInfo:
    """dtype as safetensors writes it (F16, BF16, …) and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose files are all there and whole. `tensors` has the names as stored in the files."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    shards: tuple[Path, ...]

    @property
    def is_quantized(self) -> bool:
        return self.config.get("quantization_config", {}).get("quant_method") == "mgvq"

    def side_files(self) -> list[Path]:
        """Tokenizer, processor, chat template, generation config: all but config.json and the weights' index."""
        found = {path for pattern in SIDE_FILES for path in self.folder.glob(pattern) if path.is_file()}
        skipped = {"config.json", INDEX}
        return sorted(path for path in found if path.name not in skipped)


def open_checkpoint(source: Checkpoint | Path | str, config: dict[str, Any] | None = None) -> Checkpoint:
    """The checkpoint in a folder, checked: config.json parses, every shard is there and as long as its header says. One
    that is open is given back as it is.

    Args:
        config: its config.json, where that is read already.

    Raises:
        InputDataError: something is missing, broken or truncated.
    """
    if isinstance(source, Checkpoint):
        return source
    folder = Path(source)
    if not folder.is_dir():
        raise InputDataError(f"checkpoint {folder} does not exist; expected a folder with config.json and safetensors")
    if config is None:
        config = _read_object(folder / "config.json", "expected a transformers checkpoint folder")
    if not isinstance(config.get("quantization_config") or {}, dict):
        raise InputDataError(f"{folder / 'config.json'}: quantization_config must be an object; download it again")
    shards, wanted = _shards(folder)
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        tensors |= read_header(shard)
    lost = sorted(set(wanted) - set(tensors))
    if lost:
        raise InputDataError(f"{folder / INDEX}: names {lost[0]}, which no shard holds; download the checkpoint again")
    return Checkpoint(folder, config, tensors, shards)


def _read_object(path: Path, expected: str) -> dict[str, Any]:
    if not path.is_file():
        raise InputDataError(f"{path} does not exist; {expected}")
    return read_json(path)


def _shards(folder: Path) -> tuple[tuple[Path, ...], list[str]]:
    """The weight files, and the tensor names an index promises."""
    if (folder / WEIGHTS).is_file():
        return (folder / WEIGHTS,), []
    if not (folder / INDEX).is_file():
        raise InputDataError(f"checkpoint {folder}: no weights; expected {WEIGHTS} or {INDEX} beside config.json")
    weight_map = _read_object(folder / INDEX, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputDataError(f"{folder / INDEX}: expected a weight_map; download it again")
    shards = tuple(folder / name for name in sorted(set(weight_map.values())))
    for shard in shards:
        if not shard.is_file():
            raise InputDataError(f"checkpoint {folder}: shard {shard.name} of {INDEX} is missing; download it")
    return shards, list(weight_map)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Name → dtype and shape of a safetensors file, whose length is checked against them.

    Raises:
        InputDataError: no safetensors header, or the file is shorter or longer than its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= length <= size - 8:
            raise InputDataError(f"{path}: truncated or not safetensors ({size} bytes); copy or download it again")
        try:
            header = json.loads(stream.read(length))
            entries = {name: value for name, value in header.items() if name != "__metadata__"}
            infos = {name: TensorInfo(value["dtype"], tuple(value["shape"])) for name, value in entries.items()}
            end = max((value["data_offsets"][1] for value in entries.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise InputDataError(f"{path}: broken safetensors header ({error}); copy or download it again") from None
    expected = 8 + length + end
    if size != expected:
        kind = "truncated" if size < expected else "longer than its header says"
        raise InputDataError(f"{path}: {kind}, expected {expected} bytes, found {size}; copy or download it again")
    for name, value in entries.items():
        start, stop = value["data_offsets"]
        if stop - start != infos[name].elements * DTYPE_BYTES.get(infos[name].dtype, 0):
            raise InputDataError(f"{path}: header gives {name} another size than its shape; copy or download it again")
    return infos
