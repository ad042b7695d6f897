"""Calibration samples as forward passes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from toolchain.models.family import Processor
from toolchain.values import Sample


@dataclass(frozen=True)
class CalibrationInput:
    """One forward pass: the model's keyword arguments (batch of 1); which positions hold image features, bool[S]; how
    many of the last tokens are the answer, its stop token included (0 where the line has none).
    """

    tensors: dict[str, Tensor]
    is_image: Tensor
    answer_tokens: int = 0

    @cached_property
    def image_digest(self) -> bytes:
        """SHA-256 of the pixels, or of the tokens where it has no image: equal images, equal digests."""
        seen = self.tensors.get("pixel_values", self.tensors["input_ids"]).detach().cpu().contiguous()
        return hashlib.sha256(repr(tuple(seen.shape)).encode() + seen.view(torch.uint8).numpy().tobytes()).digest()


def calibration_inputs(processor: Processor, samples: Iterable[Sample]) -> list[CalibrationInput]:
    """Samples as forward passes, answers included where there are any."""
    found = []
    for sample in samples:
        tensors = processor.model_inputs(sample, with_answer=True)
        answer_tokens = len(processor.host.encode(sample.answer)) + 1 if sample.answer else 0
        found.append(CalibrationInput(tensors, processor.is_image(tensors["input_ids"])[0], answer_tokens))
    return found
