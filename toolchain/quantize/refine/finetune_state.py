"""A fine-tuning's state as what a store keeps, and the mark of the run that it belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from toolchain.calibration.inputs import CalibrationInput
from toolchain.quantize.refine.finetune_settings import FineTuneSettings
from toolchain.quantize.refine.lookup import TunedWeights

TENSOR, PAIRS = "tensor", "pairs"  # how a tensor and a dict are written in the JSON value


def run_mark(
    inputs: Sequence[CalibrationInput], tuned: TunedWeights, train: Sequence[int], settings: FineTuneSettings
) -> str:
    """SHA-256 of what must be equal for one run to go on with another's state: settings, seed, samples and how they
    are parted, and everything the model stored when the run began. The teacher is not in it: the samples stand for it.
    """
    facts = asdict(settings) | {"train": list(train), "answers": [one.answer_tokens for one in inputs]}
    digest = hashlib.sha256(json.dumps(facts, default=str).encode())
    for one in inputs:
        digest.update(one.image_digest + _content(one.tensors["input_ids"]))
    for name, module in tuned.modules.items():
        digest.update(name.encode() + _content(module.codes))
    for values in tuned.start.values():
        for name, value in values.items():
            digest.update(name.encode() + _content(value))
    return digest.hexdigest()


def _content(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def packed(state: Any) -> tuple[dict[str, Tensor], Any]:
    """(tensors by number, JSON value that names them) of a state: dicts of any keys, lists, tuples, tensors, numbers,
    text, True, False and None. Tuples become lists.
    """
    tensors: dict[str, Tensor] = {}

    def written(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = str(len(tensors))
            tensors[name] = value
            return {TENSOR: name}
        if isinstance(value, Mapping):
            return {PAIRS: [[key, written(one)] for key, one in value.items()]}
        return [written(one) for one in value] if isinstance(value, list | tuple) else value

    return tensors, written(state)


def unpacked(tensors: Mapping[str, Tensor], value: Any) -> Any:
    """The state that `packed` was given, keys of dicts in their types."""
    if isinstance(value, dict):
        if TENSOR in value:
            return tensors[value[TENSOR]]
        return {key: unpacked(tensors, one) for key, one in value[PAIRS]}
    return [unpacked(tensors, one) for one in value] if isinstance(value, list) else value
