"""Checkpoints in and out of memory: float ones through transformers, quantized ones through our own strict loader."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from toolchain.checkpoint.folder import Checkpoint, TensorInfo, open_checkpoint
from toolchain.checkpoint.install import (
    check_values,
    install_layers,
    layers_from_json,
    link_shared,
)
from toolchain.checkpoint.writing import TORCH_DTYPES, is_format_tensor
from toolchain.errors import InputDataError, UsageError
from toolchain.values import FORMAT_VERSION, LayerPlan

SAFETENSORS_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def load_model(source: Checkpoint | Path | str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The transformers model of a float checkpoint, open or in a folder, in eval mode; every weight is from the file.

    Raises:
        InputDataError: the checkpoint is broken, or lacks or has too many tensors for its architecture.
        UsageError: it is quantized already.
    """
    from transformers import AutoModelForImageTextToText

    checkpoint = open_checkpoint(source)
    folder = checkpoint.folder
    if checkpoint.is_quantized:
        raise UsageError(f"checkpoint {folder} is quantized already; name the float checkpoint it was made from")
    with _no_library_bars():
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            str(folder), dtype=dtype, local_files_only=True, output_loading_info=True
        )
    model, info = loaded
    _refuse_odd_keys(folder, set(info["missing_keys"]), set(info["unexpected_keys"]))
    return model.eval()


@contextmanager
def _no_library_bars() -> Iterator[None]:
    """Keep transformers' own progress bars off stderr, where our progress goes."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def _refuse_odd_keys(folder: Path, missing: set[str], unexpected: set[str]) -> None:
    for odd, words in ((missing, "lacks"), (unexpected, "has, but the architecture does not,")):
        if odd:
            names = ", ".join(sorted(odd)[:3])
            raise InputDataError(
                f"checkpoint {folder} {words} {len(odd)} tensors ({names}); download or quantize it again, "
                "or check that config.json belongs to these weights"
            )


def quantized_layers(config: dict[str, Any], where: str) -> tuple[LayerPlan, ...]:
    """The layers of a checkpoint's quantization_config.

    Raises:
        InputDataError: there is none, or it is of a format version that is not known here.
    """
    found = config.get("quantization_config") or {}
    if found.get("quant_method") != "mgvq":
        raise InputDataError(f"{where}: not an mgvq checkpoint; expected quantization_config.quant_method 'mgvq'")
    if found.get("format_version") != FORMAT_VERSION:
        raise InputDataError(
            f"{where}: weight format version {found.get('format_version')}, this mgvq reads {FORMAT_VERSION}; "
            "install the version that wrote it, or quantize again"
        )
    if not isinstance(found.get("layers"), dict) or not found["layers"]:
        raise InputDataError(f"{where}: quantization_config names no layers; copy or quantize the checkpoint again")
    return layers_from_json(found["layers"])


def load_quantized(source: Checkpoint | Path | str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of a quantized checkpoint, in eval mode, computing in `dtype`; loaded whole or not at all.

    Raises:
        InputDataError: a tensor is missing, unexpected, of another shape or dtype, or holds values none would write.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig
    from transformers.initialization import no_init_weights

    checkpoint = open_checkpoint(source)
    folder = checkpoint.folder
    layers = quantized_layers(checkpoint.config, str(folder))
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    with no_init_weights():
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    install_layers(model, layers)
    expected = model.state_dict()
    check_tensors(folder, checkpoint.tensors, expected)
    state: dict[str, Tensor] = {}
    for shard in checkpoint.shards:
        with safe_open(shard, framework="pt") as stored:
            state |= {name: stored.get_tensor(name).to(expected[name].dtype) for name in stored.keys()}  # noqa: SIM118
    model.load_state_dict(state, strict=True, assign=True)
    link_shared(model, layers)
    check_values(model)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    return model.eval()


def load_any(source: Checkpoint | Path | str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of a checkpoint folder, quantized or not; see `load_model` and `load_quantized`."""
    checkpoint = open_checkpoint(source)
    load = load_quantized if checkpoint.is_quantized else load_model
    return load(checkpoint, dtype)


def check_tensors(folder: Path, stored: dict[str, TensorInfo], expected: dict[str, Tensor]) -> None:
    """Refuse a file whose tensors are not exactly those of the model; kept tensors may be of any float dtype.

    Raises:
        InputDataError: naming the first tensors that differ.
    """
    _refuse_odd_keys(folder, set(expected) - set(stored), set(stored) - set(expected))
    for name, tensor in expected.items():
        info = stored[name]
        same_dtype = TORCH_DTYPES.get(info.dtype) == tensor.dtype
        both_float = tensor.is_floating_point() and TORCH_DTYPES.get(info.dtype, torch.int8).is_floating_point
        if info.shape != tuple(tensor.shape) or not (same_dtype or (both_float and not is_format_tensor(name))):
            wanted = f"{SAFETENSORS_NAMES.get(tensor.dtype, tensor.dtype)}{list(tensor.shape)}"
            raise InputDataError(
                f"checkpoint {folder}, tensor {name}: expected {wanted}, found {info.dtype}{list(info.shape)}; "
                "copy or quantize it again"
            )
