"""A quantized checkpoint as files: weights, config, bit plan, and the side files of the checkpoint it was made from."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from toolchain import __version__
from toolchain.bits.bitplan import real_bits
from toolchain.checkpoint.folder import WEIGHTS, Checkpoint
from toolchain.checkpoint.install import (
    CODEBOOKS,
    layers_json,
)
from toolchain.files.folders import sha256_file, write_json
from toolchain.values import FORMAT_VERSION, BitPlan

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8, "U8": torch.uint8}


def kept_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype most float elements of a checkpoint are stored in."""
    counts: Counter[torch.dtype] = Counter()
    for info in checkpoint.tensors.values():
        if TORCH_DTYPES.get(info.dtype, torch.int8).is_floating_point:
            counts[TORCH_DTYPES[info.dtype]] += info.elements
    return counts.most_common(1)[0][0] if counts else torch.float16


def is_format_tensor(name: str) -> bool:
    """Whether a stored tensor is codes, scales or a codebook, whose dtype is part of the format."""
    return name.startswith(f"{CODEBOOKS}.") or name.endswith((".codes", ".scales"))


def _as_kept(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype` where that loses nothing, which it does for what came from a file of that dtype."""
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    narrowed = tensor.to(dtype)
    return narrowed if torch.equal(narrowed.to(tensor.dtype), tensor) else tensor


def write_quantized(
    model: nn.Module,
    base: Checkpoint,
    folder: Path,
    plan: BitPlan,
    *,
    method: str,
    calibration: dict[str, Any],
) -> None:
    """Fill an empty folder with a quantized checkpoint: weights, config, bit plan, and the base's side files.

    Args:
        model: with the plan's layers installed and linked (see `toolchain.checkpoint.install`).
        base: the checkpoint it was made from.
        calibration: JSON-clean provenance of the statistics.
    """
    dtype = kept_dtype(base)
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensors[name] = (tensor if is_format_tensor(name) else _as_kept(tensor, dtype)).contiguous()
    # One key only: safetensors writes several in random order, and the same run must give the same bytes. The versions
    # stand in config.json.
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    for path in base.side_files():
        shutil.copyfile(path, folder / path.name)
    write_json(folder / "bitplan.json", plan.to_json())
    config = {k: v for k, v in base.config.items() if k != "quantization_config"}
    config["quantization_config"] = _quantization_config(base, plan, method, calibration)
    write_json(folder / "config.json", config)


def _quantization_config(base: Checkpoint, plan: BitPlan, method: str, calibration: dict[str, Any]) -> dict[str, Any]:
    counts = real_bits(plan)
    weights = {shard.name: sha256_file(shard) for shard in base.shards}
    return {
        "quant_method": "mgvq",
        "format_version": FORMAT_VERSION,
        "tool_version": __version__,
        "method": method,
        "layers": layers_json(plan),
        "bits": {"index": counts["total"].index, "model": counts["total"].real}
        | {part: count.real for part, count in counts.items() if part != "total"},
        "calibration": calibration,
        "base_model": {"name": base.folder.resolve().name, "weights_sha256": weights},
    }
