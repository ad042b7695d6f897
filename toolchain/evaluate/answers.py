"""A model on a manifest of images, questions and answers: what it answers, and how far it is from another model."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from toolchain.checkpoint.loading import load_any
from toolchain.checkpoint.modules import keep_decoded
from toolchain.device.families.base import Host, open_image
from toolchain.device.generation.answer import Graphs, greedy
from toolchain.errors import InputDataError, UsageError
from toolchain.files.folders import sha256_file
from toolchain.models.family import Processor
from toolchain.values import SILENT, Progress, Sample
from toolchain.vq.divergence import Interval, bootstrap, log_probabilities, token_divergences

BATCH = 16


@dataclass(frozen=True)
class Answered:
    """One question with the expected and the given answer."""

    sample: Sample
    given: str

    @property
    def is_right(self) -> bool:
        return self.given == (self.sample.answer or "").strip()


@dataclass(frozen=True)
class Evaluation:
    """Answers in manifest order. `accuracy` is the share of exactly equal answers, 0 to 1."""

    answers: tuple[Answered, ...]

    @property
    def accuracy(self) -> float:
        return sum(a.is_right for a in self.answers) / len(self.answers)


def answer_all(
    host: Host,
    graphs: Graphs,
    samples: Sequence[Sample],
    max_new_tokens: int = 24,
    progress: Progress = SILENT,
) -> Evaluation:
    """Greedy answers of the three graphs to every sample, in batches padded on the left.

    Raises:
        InputDataError: no samples, a sample without an answer to compare with, or an unreadable image.
    """
    if not samples:
        raise InputDataError("evaluation manifest: expected at least one line, found none")
    unanswered = [s for s in samples if s.answer is None]
    if unanswered:
        raise InputDataError(
            f'evaluation manifest: {len(unanswered)} of {len(samples)} lines have no "answer" to compare with, first: '
            f"{unanswered[0].image.name} {unanswered[0].prompt!r}; add one to every line"
        )
    answers = []
    for start in range(0, len(samples), BATCH):
        batch = samples[start : start + BATCH]
        prompts = [host.prepare(open_image(s.image), s.prompt) for s in batch]
        for sample, ids in zip(batch, greedy(host, graphs, prompts, max_new_tokens)):
            answers.append(Answered(sample, host.decode(ids)))
        progress.step(len(answers), len(samples))
    return Evaluation(tuple(answers))


def refuse_overlap(calibration: Sequence[Sample], evaluation: Sequence[Sample]) -> None:
    """Refuse when an image (by its bytes) is used both to calibrate and to evaluate.

    Raises:
        InputDataError: naming the first shared image.
    """
    seen = {sha256_file(s.image): s.image for s in calibration}
    for sample in evaluation:
        same = seen.get(sha256_file(sample.image))
        if same is not None:
            raise InputDataError(
                f"evaluation image {sample.image} has the same bytes as calibration image {same}; scores would be "
                "flattered, remove it from one of the manifests"
            )


def check_answers(samples: Sequence[Sample]) -> None:
    """Refuse samples that the divergence of an answer cannot be measured on.

    Raises:
        InputDataError: no samples, or one without an answer.
    """
    if not samples:
        raise InputDataError("evaluation manifest: expected at least one line, found none")
    for number, sample in enumerate(samples, start=1):
        if not sample.answer:
            raise InputDataError(
                f'evaluation manifest: sample {number} ({sample.image.name} {sample.prompt!r}) has no "answer" whose '
                "tokens could be compared; add one to every line"
            )


def answer_log_probabilities(model: nn.Module, processor: Processor, sample: Sample) -> Tensor:
    """float32[t, v]: what the model says at each token of the sample's answer, its stop token included, given the rest.

    The answer is the manifest's, not the model's own, so that two models are asked about the same tokens.
    """
    inputs = processor.model_inputs(sample, with_answer=True)
    tokens = len(processor.host.encode(sample.answer or "")) + 1
    with torch.inference_mode():
        # The last position says what follows the stop token; nothing does.
        logits = model(**inputs, use_cache=False, logits_to_keep=tokens + 1).logits[0, :-1]
    return log_probabilities(logits)


def log_probabilities_of(
    model: nn.Module, processor: Processor, samples: Sequence[Sample], progress: Progress
) -> list[Tensor]:
    """`answer_log_probabilities` of every sample: 4 · v bytes a token, held in memory."""
    found = []
    for sample in samples:
        found.append(answer_log_probabilities(model, processor, sample))
        progress.step(len(found), len(samples))
    return found


def checkpoint_log_probabilities(
    folder: Path, processor: Processor, samples: Sequence[Sample], progress: Progress
) -> list[Tensor]:
    """`log_probabilities_of` the checkpoint in a folder, quantized or not, which is gone from memory afterwards.

    Raises:
        InputDataError: the checkpoint is broken, or a sample has no answer.
    """
    check_answers(samples)
    model = load_any(folder)
    with keep_decoded(model):
        return log_probabilities_of(model, processor, samples, progress)


def divergences_from(
    reference: Sequence[Tensor],
    model: nn.Module,
    processor: Processor,
    samples: Sequence[Sample],
    progress: Progress,
) -> tuple[Tensor, ...]:
    """KL(reference ‖ model) in nats at every token of the answers, float32[t_i] a sample.

    Args:
        reference: `log_probabilities_of` the reference model on the same samples.

    Raises:
        UsageError: the models have different vocabularies.
    """
    divergences: list[Tensor] = []
    for expected, sample in zip(reference, samples, strict=True):
        found = answer_log_probabilities(model, processor, sample)
        if found.shape != expected.shape:
            raise UsageError(
                f"the reference model has a vocabulary of {expected.shape[-1]} tokens, this one of "
                f"{found.shape[-1]}; compare a model with the checkpoint it was quantized from"
            )
        divergences.append(token_divergences(expected, found))
        progress.step(len(divergences), len(samples))
    return tuple(divergences)


def image_clusters(samples: Sequence[Sample]) -> tuple[Hashable, ...]:
    """A digest of each sample's image: questions about one image go wrong together."""
    images = {path: sha256_file(path) for path in {sample.image for sample in samples}}
    return tuple(images[sample.image] for sample in samples)


def divergence_from(
    reference: Sequence[Tensor],
    model: nn.Module,
    processor: Processor,
    samples: Sequence[Sample],
    seed: int,
    progress: Progress,
) -> Interval:
    """`divergences_from` as their mean over tokens with its bootstrap interval, images as clusters."""
    found = divergences_from(reference, model, processor, samples, progress)
    return bootstrap(found, image_clusters(samples), seed)
