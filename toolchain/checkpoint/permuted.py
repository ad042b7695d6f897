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
from toolchain.models.permutations import apply_orders

ORDERS = "orders.json"


def deal_model(model: nn.Module, family: Family, config: Config, orders: Mapping[str, Tensor]) -> None:
    """Fold the orders into a dense model, whose outputs do not change."""
    apply_orders(model, orders, family.free_orders(config))


def load_dealt(base: Checkpoint, family: Family, orders: Mapping[str, Tensor]) -> nn.Module:
    """The float model of a checkpoint, its columns in the orders of a model quantized from it."""
    model = load_model(base)
    deal_model(model, family, base.config, orders)
    return model


def write_orders(folder: Path, orders: Mapping[str, Tensor]) -> None:
    """orders.json: free order → the old index of every new one."""
    text = json.dumps({name: order.tolist() for name, order in orders.items()}, separators=(",", ":"))
    (folder / ORDERS).write_text(text + "\n", encoding="utf-8")


def read_orders(folder: Path) -> dict[str, Tensor]:
    """The orders a quantized checkpoint's columns are in; none where it carries none.

    Raises:
        InputDataError: the file is not what `write_orders` writes.
    """
    path = Path(folder) / ORDERS
    if not path.is_file():
        return {}
    data = read_json(path)
    try:
        return {name: torch.tensor(order, dtype=torch.int64) for name, order in data.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError):
        raise InputDataError(
            f"{path}: expected lists of whole numbers by name; copy or quantize the checkpoint again"
        ) from None
