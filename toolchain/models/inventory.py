"""What a model is made of, from its config or as loaded: every parameter that no quantized layer covers, by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.errors import InputDataError
from toolchain.values import LayerSpec

if TYPE_CHECKING:
    from torch import nn


def kept_elements(folder: Path, specs: Sequence[LayerSpec]) -> dict[str, int]:
    """Name → element count of every parameter outside `specs` (norms, biases, position tables), weights not needed.

    The model is built on the meta device, so a 70B config costs no memory.

    Raises:
        InputDataError: transformers refuses the config.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        config.__dict__.pop("quantization_config", None)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InputDataError(f"{folder / 'config.json'}: transformers cannot build this model ({error})") from error
    return kept_parameters(model, specs)


def kept_parameters(model: nn.Module, specs: Iterable[LayerSpec]) -> dict[str, int]:
    """Name → element count of every parameter of a model, on any device, that no spec names."""
    covered = {f"{spec.name}.weight" for spec in specs}
    return {name: p.numel() for name, p in model.named_parameters() if name not in covered}
