"""A tiny checkpoint quantized in memory, layer by layer, with nothing calibrated: linked, and ready to be asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from toolchain.bits.bitplan import plan as plan_bits
from toolchain.bits.codebook_sharing import GROUP, UNIVERSAL
from toolchain.checkpoint.install import CODEBOOKS, install_codebooks, install_layer, link_shared
from toolchain.checkpoint.loading import load_model
from toolchain.models.configs import read_config
from toolchain.models.inventory import kept_parameters
from toolchain.models.registry import family_for
from toolchain.values import BitPlan, LayerSpec, VQCode
from toolchain.vq.solve import quantize_group
from toolchain.vq.universal_codebooks import universal_codebooks
from toolchain.vq.weights import Options

FAST = Options(rounds=1, lloyd_rounds=1, samples=500)


def groups_of(specs: tuple[LayerSpec, ...]) -> dict[str, list[LayerSpec]]:
    """Group → its layers, tied ones left out."""
    groups: dict[str, list[LayerSpec]] = {}
    for spec in specs:
        if not spec.tied_to:
            groups.setdefault(spec.group, []).append(spec)
    return groups


def quantized_tiny(
    folder: Path, code: str, codebooks_of: str = GROUP
) -> tuple[nn.Module, tuple[LayerSpec, ...], BitPlan]:
    """(model, its layers, its plan) with every layer in one code, for inputs that are white noise.

    Args:
        codebooks_of: groups, or all: `codebook_sharing.GROUP` or UNIVERSAL.
    """
    options = replace(FAST, codebooks=universal_codebooks() if codebooks_of == UNIVERSAL else {})
    config = read_config(folder)
    specs = family_for(config).layers(config)
    model = load_model(folder).requires_grad_(False)
    plan = plan_bits(specs, kept_parameters(model, specs), bits=None, overrides=[("*", code)], codebooks=codebooks_of)
    codebooks = {}
    for layers in groups_of(specs).values():
        weights = [model.get_parameter(f"{spec.name}.weight").detach().flatten(1) for spec in layers]
        moment = torch.eye(layers[0].columns)
        group = quantize_group(weights, moment, VQCode.parse(code), options, torch.Generator().manual_seed(0))
        for spec, stored in zip(layers, group.layers, strict=True):
            install_layer(model, plan.layer(spec.name)).set_weights(stored)
            codebooks[plan.layer(spec.name).table] = stored.codebook
    for spec in specs:
        if spec.tied_to:
            install_layer(model, plan.layer(spec.name))
    install_codebooks(model, plan.layers)
    model.get_submodule(CODEBOOKS).load_state_dict(codebooks)
    link_shared(model, plan.layers)
    return model, specs, plan
