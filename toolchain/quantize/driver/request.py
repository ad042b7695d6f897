"""What is to be quantized and how: what a caller says, and what it becomes once the checkpoint is open."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from toolchain.bits.bitplan import plan
from toolchain.calibration.inputs import CalibrationInput
from toolchain.checkpoint.folder import Checkpoint
from toolchain.checkpoint.loading import load_model
from toolchain.checkpoint.writing import kept_dtype
from toolchain.models.configs import Config
from toolchain.models.family import Family
from toolchain.models.inventory import kept_parameters
from toolchain.models.registry import family_for
from toolchain.values import ANSWER_TOKENS, BitPlan, LayerSpec
from toolchain.vq.weights import Options


@dataclass(frozen=True)
class QuantizationRequest:
    """What to quantize and how. `model` is full precision and is given up: the result is made in it."""

    model: nn.Module
    family: Family
    config: Config
    specs: tuple[LayerSpec, ...]
    inputs: list[CalibrationInput]
    bits: float | None
    budget_bytes: int | None
    overrides: tuple[tuple[str, str], ...]
    options: Options
    seed: int
    kept_dtype: torch.dtype  # what stays in 16 bits is stored in it


@dataclass(frozen=True)
class QuantizeSettings:
    """What a caller says of a quantization.

    method: a recipe of mgvq (`quantize.mgvq.recipe`) or a baseline (`quantize.methods`).
    bits, budget_bytes, overrides: as for `bitplan.plan`.
    seed: everything random is drawn from it and a group's name; same machine and threads, same bytes.
    resume: "auto", "required" or "never" (`store.ObjectStore.open`).
    answer_tokens: of the answers that the model gives itself (`self_answers.answered`); 0 for none.
    """

    method: str = "mgvq"
    bits: float | None = 2.0
    budget_bytes: int | None = None
    overrides: tuple[tuple[str, str], ...] = ()
    seed: int = 0
    options: Options = field(default_factory=Options)
    resume: str = "auto"
    answer_tokens: int = ANSWER_TOKENS


def open_request(base: Checkpoint, settings: QuantizeSettings) -> QuantizationRequest:
    """The request of a checkpoint, its model loaded, without calibration inputs yet.

    Raises:
        UsageError, UnsupportedError, InputDataError: the checkpoint is quantized already, of no family known here, or
            broken.
    """
    family = family_for(base.config)
    return QuantizationRequest(
        load_model(base),
        family,
        base.config,
        family.layers(base.config),
        [],
        settings.bits,
        settings.budget_bytes,
        tuple(settings.overrides),
        settings.options,
        settings.seed,
        kept_dtype(base),
    )


def plan_request(request: QuantizationRequest, **choices: Any) -> BitPlan:
    """The plan under the request's limit.

    Args:
        choices: what else `bitplan.plan` takes: losses, whether codes overlap, whose the codebooks are.

    Raises:
        UsageError: bits, bytes or overrides that no plan can keep.
    """
    return plan(
        request.specs,
        kept_parameters(request.model, request.specs),
        bits=request.bits,
        budget_bytes=request.budget_bytes,
        overrides=request.overrides,
        **choices,
    )
