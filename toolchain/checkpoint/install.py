"""Putting quantized modules into a model, and tying what is stored once: codebooks, and a head and its embedding."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from toolchain.checkpoint.modules import VQCodebooks, VQModule, replacement_for, vq_modules
from toolchain.checkpoint.segmented import VQSegmentedLinear, segmented_replacement
from toolchain.errors import InputDataError, ShapeError
from toolchain.values import BitPlan, LayerPlan

CODEBOOKS = "mgvq_tables"
LAYER_KEYS = ("part", "kind", "rows", "columns", "group", "code", "table", "tied_to")
OPTIONAL_KEYS = {"rotation": 0}  # key → what a layer has that does not name it


def layers_json(plan: BitPlan) -> dict[str, dict[str, Any]]:
    """The `layers` of a quantization_config: module name → everything its buffers are built from."""
    return {layer.name: _layer_json(layer) for layer in plan.layers}


def _layer_json(layer: LayerPlan) -> dict[str, Any]:
    """What is as a rule stays unsaid, so that an older reader takes what it can read, and refuses what it cannot."""
    unusual = {key: getattr(layer, key) for key, usual in OPTIONAL_KEYS.items() if getattr(layer, key) != usual}
    return {key: getattr(layer, key) for key in LAYER_KEYS} | unusual


def layers_from_json(layers: Mapping[str, Mapping[str, Any]]) -> tuple[LayerPlan, ...]:
    """The inverse of `layers_json`.

    Raises:
        InputDataError: an entry lacks a key or has one too many.
    """
    fields = {field.name for field in dataclasses.fields(LayerPlan)}
    for name, entry in layers.items():
        odd = sorted((set(entry) | set(OPTIONAL_KEYS) | {"name"}) ^ fields)
        if odd:
            raise InputDataError(f"quantization_config, layer {name}: keys {odd} are missing or unknown")
    return tuple(LayerPlan(name=name, **entry) for name, entry in layers.items())


def install_layer(model: nn.Module, layer: LayerPlan) -> VQModule | VQSegmentedLinear:
    """Put an empty quantized module in the place of a dense one and give it back; ties are made by `link_shared`."""
    try:
        dense = model.get_submodule(layer.name)
    except AttributeError:
        raise InputDataError(
            f"layer {layer.name} of the quantization_config: the model has no such module; "
            "check that config.json belongs to these weights"
        ) from None
    module: VQModule | VQSegmentedLinear
    try:
        if layer.segments:
            module = segmented_replacement(dense, layer)
        else:
            module = replacement_for(dense, layer)
    except ShapeError as error:
        raise ShapeError(f"layer {layer.name}: {error}") from None
    model.set_submodule(layer.name, module)
    return module


def install_layers(model: nn.Module, layers: tuple[LayerPlan, ...]) -> None:
    """Empty modules for all layers and the codebooks they share, ready for a state dict to be loaded."""
    for layer in layers:
        install_layer(model, layer)
    install_codebooks(model, layers)
    link_shared(model, layers)


def install_codebooks(model: nn.Module, layers: tuple[LayerPlan, ...]) -> None:
    """Register `mgvq_tables` on the model's root: one buffer a codebook id, empty."""
    codes = {piece.table: piece.vq_code for layer in layers for piece in layer.pieces}
    device = next(iter(vq_modules(model).values())).codes.device
    model.register_module(CODEBOOKS, VQCodebooks(codes, device))


def link_shared(model: nn.Module, layers: tuple[LayerPlan, ...]) -> None:
    """Hand every module its codebook, tie tied modules, and tell the library there is no dense weight left to tie."""
    modules = vq_modules(model)
    codebooks = model.get_submodule(CODEBOOKS)
    for piece in (piece for layer in layers for piece in layer.pieces):
        modules[piece.name].codebook = codebooks.get_buffer(piece.table)
    for layer in layers:
        if layer.tied_to:
            modules[layer.name].tie_to(modules[layer.tied_to])
    untie_dense(model)


def untie_dense(model: nn.Module) -> None:
    """Drop a tie between dense weights that are no longer there."""
    quantized = vq_modules(model)

    def is_dense(parameter: str) -> bool:
        return parameter.rpartition(".")[0] not in quantized

    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
        ties = getattr(model, attribute, None)
        if isinstance(ties, dict):
            setattr(model, attribute, {a: b for a, b in ties.items() if is_dense(a) and is_dense(b)})


def check_values(model: nn.Module) -> None:
    """Refuse scales or codebooks that no quantization writes.

    Raises:
        InputDataError: a scale or a codebook entry is not finite, or a scale is negative.
    """
    for name, module in vq_modules(model).items():
        scales, codebook = module.scales.float(), module.codebook.float()
        if not bool(torch.isfinite(scales).all()) or bool((scales < 0).any()):
            raise InputDataError(f"{name}.scales: expected finite values of at least 0; copy or quantize again")
        if not bool(torch.isfinite(codebook).all()):
            raise InputDataError(f"{CODEBOOKS}.{module.codebook_id}: expected finite values; copy or quantize again")
