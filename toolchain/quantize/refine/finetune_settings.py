"""What a fine-tuning may do: how long, how fast, after what; and its learning rates from step to step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from toolchain.errors import UsageError


@dataclass(frozen=True)
class FineTuneSettings:
    """How long, how fast and after what.

    epochs, batch: passes over the training part, and samples a step. warm_up: share of the steps in which the rates
    rise; a cosine takes them to zero after it. patience: epochs without a new best before the end. save_every: steps.
    codebook_rate, scale_rate, kept_rate: Adam's, relative to the size of what they move (`lookup.TunedWeights`).
    text_weight: of the mean KL at all text after the image beside that at the answer; with 0 the teacher's
    log-probabilities are kept for answers only. temperature: both distributions are softened by it (`sample_loss`).
    kept_dtype: of norms and biases in the checkpoint (`writing.kept_dtype`). seed: draws the order of samples.
    """

    # Measured on the demo in 4,8,9, tuned on its 96 lines, a fifth of their images held out where it is a quarter
    # now: the answers' KL of 400 other questions, 0.0108 before. These defaults 0.0045 (mean of three seeds 0.0044; on
    # 600 questions that chose nothing 0.0087, 0.0206 before). Temperature 2 0.0047 (mean 0.0053), 1 0.0067. At 2: text
    # weight 3 0.0051, codebook rate 2e-3 0.0054, no codebook 0.0059, nothing kept 0.0051, batch 4 0.0049, scales and
    # kept at 5e-4 for 8 epochs 0.0067. At 1, last state of 8 epochs: answers alone 0.0071, with text 0.0055, that with
    # the last hidden state's squared error 0.0052, with every layer's 0.0053, rates two to three times as high 0.0089.
    # One seed each where no mean is given: 0.0007 is noise.
    epochs: int = 5
    batch: int = 8
    codebook_rate: float = 1e-3
    scale_rate: float = 1e-3
    kept_rate: float = 1e-3
    text_weight: float = 1.0
    temperature: float = 4.0
    warm_up: float = 0.1
    patience: int = 3
    save_every: int = 10
    kept_dtype: torch.dtype = torch.float16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "patience", "save_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"fine-tuning, {name}: expected at least 1, found {getattr(self, name)}")
        if not 0 <= self.warm_up < 1:
            raise UsageError(f"fine-tuning, warm_up: expected a share from 0 to below 1, found {self.warm_up}")


def rates(step: int, steps: int, settings: FineTuneSettings) -> tuple[float, float, float]:
    """Of codebooks, scales and kept values at a step: a rise in a line, then half a cosine to zero."""
    rise = settings.warm_up * steps
    share = (step + 1) / (rise + 1) if step < rise else 0.5 + 0.5 * math.cos(math.pi * (step - rise) / (steps - rise))
    return settings.codebook_rate * share, settings.scale_rate * share, settings.kept_rate * share
