"""What is to be quantized and how: the value that every part of the method takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from toolchain.calibration import CalibrationInput
from toolchain.models.family import Config, Family
from toolchain.values import LayerSpec
from toolchain.vq.weights import Options


@dataclass(frozen=True)
class Job:
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
