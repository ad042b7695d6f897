"""Columns dealt over vectors through a whole model: orders from measured energies, folded into weights, kept on file.

A quantized checkpoint whose columns were dealt carries `orders.json`; whoever compares it with the float checkpoint it
was made from, inside the model and not only at its outputs, applies the same orders to that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from toolchain.checkpoint import load_model
from toolchain.errors import InputDataError
from toolchain.folders import read_json
from toolchain.models.family import Config, Family
from toolchain.models.orders import apply_orders, combined_energies, dealt_order
from toolchain.values import LayerSpec

ORDERS = "orders.json"
VECTOR = 4  # dealt quads are dealt pairs too


def measured_orders(
    family: Family, config: Config, specs: Sequence[LayerSpec], energies: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Free order → int64[size], dealt by the energies of the layers that read it.

    An order whose unit is no multiple of VECTOR, or that only an embedding reads, is left out: those columns stay.

    Args:
        energies: group → float32[columns], diag H.
    """
    by_layer = {spec.name: energies[spec.group] for spec in specs if spec.kind != "embedding"}
    orders = {}
    for free in family.free_orders(config):
        weights = {reader: float(reader in by_layer) for reader in free.readers}
        if free.unit % VECTOR == 0 and any(weights.values()):
            orders[free.name] = dealt_order(free, combined_energies(free, by_layer, weights), VECTOR)
    return orders


def deal_model(model: nn.Module, family: Family, config: Config, orders: Mapping[str, Tensor]) -> None:
    """Fold the orders into a dense model, whose outputs do not change."""
    apply_orders(model, orders, family.free_orders(config))


def load_dealt(folder: Path, family: Family, config: Config, orders: Mapping[str, Tensor]) -> nn.Module:
    """The float model of a checkpoint folder, its columns in the orders of a model quantized from it."""
    model = load_model(folder)
    deal_model(model, family, config, orders)
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
