"""What fine-tuning minimises: the divergence from a teacher at a sample's answer and at the text before it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from toolchain.calibration.inputs import CalibrationInput
from toolchain.errors import NumericGateError
from toolchain.quantize.refine.finetune_settings import FineTuneSettings
from toolchain.vq.divergence import log_probabilities, token_divergences


@dataclass(frozen=True)
class Target:
    """The teacher's log-probabilities float32[t, v] of a sample's last t text tokens, the last `answer` its answer."""

    log_probabilities: Tensor
    answer: int


def text_tokens(one: CalibrationInput) -> int:
    """How many tokens stand after the last image token; all but the first where there is no image."""
    places = one.is_image.nonzero()
    last = int(places[-1]) if len(places) else 0
    return len(one.is_image) - 1 - last


def text_scores(model: nn.Module, one: CalibrationInput, tokens: int) -> Tensor:
    """float32[t, v]: log-probabilities at a sample's last `tokens` tokens; and of what follows, without an answer."""
    logits = model(**one.tensors, use_cache=False, logits_to_keep=tokens + 1).logits[0]
    return log_probabilities(logits[:-1] if one.answer_tokens else logits)


@torch.no_grad()
def teacher_target(teacher: nn.Module, one: CalibrationInput, settings: FineTuneSettings) -> Target:
    """What the teacher says at a sample's answer, or at the next token without one, and at the text before it.

    Raises:
        NumericGateError: it says something that is not a number.
    """
    tokens = max(text_tokens(one), one.answer_tokens) if settings.text_weight else one.answer_tokens
    found = text_scores(teacher, one, tokens)
    if bool(found.isnan().any()):
        raise NumericGateError(
            "fine-tuning: expected numbers from the full-precision model, found NaN; load it in float32 or bfloat16"
        )
    return Target(found, max(one.answer_tokens, 1))


def sample_loss(expected: Tensor, found: Tensor, answer: int, settings: FineTuneSettings) -> tuple[Tensor, Tensor]:
    """(the loss, the answer's KL at temperature 1), both summed over the answer's tokens, nats.

    The loss is τ² (Σ_answer KL + text_weight · answer tokens · mean KL over the text after the image), with both
    distributions at temperature τ (Hinton et al. 2015), from log-probabilities float32[t, v].
    """
    own = token_divergences(expected[-answer:], found.detach()[-answer:]).sum()
    soft = (log_probabilities(x / settings.temperature) for x in (expected, found))
    divergences = settings.temperature**2 * token_divergences(*soft)
    loss = divergences[-answer:].sum()
    if settings.text_weight:
        loss = loss + settings.text_weight * answer * divergences.mean()
    return loss, own
