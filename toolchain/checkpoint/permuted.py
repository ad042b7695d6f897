"""A checkpoint whose columns are permuted: the permutations on file, and the float model brought to the same order.

A quantized checkpoint whose columns were permuted carries `orders.json`; whoever compares it with the float checkpoint
it was made from, inside the model and not only at its outputs, applies the same permutations to that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from toolchain.checkpoint.folder import Checkpoint
from toolchain.checkpoint.loading import load_model
from toolchain.errors import InputDataError
from toolchain.files.folders import read_json
from toolchain.models.configs import Config
from toolchain.models.family import Family
from toolchain.models.permutations import apply_permutations

PERMUTATIONS = "orders.json"


def permute_model(model: nn.Module, family: Family, config: Config, permutations: Mapping[str, Tensor]) -> None:
    """Fold the permutations into a dense model, whose outputs do not change."""
    apply_permutations(model, permutations, family.free_permutations(config))


def load_permuted(base: Checkpoint, family: Family, permutations: Mapping[str, Tensor]) -> nn.Module:
    """The float model of a checkpoint, its columns in the permutations of a model quantized from it."""
    model = load_model(base)
    permute_model(model, family, base.config, permutations)
    return model


def write_permutations(folder: Path, permutations: Mapping[str, Tensor]) -> None:
    """orders.json: free permutation → the old index of every new one."""
    text = json.dumps({name: order.tolist() for name, order in permutations.items()}, separators=(",", ":"))
    (folder / PERMUTATIONS).write_text(text + "\n", encoding="utf-8")


def read_permutations(folder: Path) -> dict[str, Tensor]:
    """The permutations a quantized checkpoint's columns are in; none where it carries none.

    Raises:
        InputDataError: the file is not what `write_permutations` writes.
    """
    path = Path(folder) / PERMUTATIONS
    if not path.is_file():
        return {}
    data = read_json(path)
    try:
        return {name: torch.tensor(order, dtype=torch.int64) for name, order in data.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError):
        raise InputDataError(
            f"{path}: expected lists of whole numbers by name; copy or quantize the checkpoint again"
        ) from None
