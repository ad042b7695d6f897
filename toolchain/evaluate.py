"""Exact-answer accuracy of a model on a manifest of pictures, questions and answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from toolchain.device.answer import Graphs, greedy
from toolchain.device.families.base import Host, open_image
from toolchain.errors import InputDataError
from toolchain.values import Sample, sha256_file

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
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Greedy answers of the three graphs to every sample, in batches padded on the left.

    `progress(done, total)` is called after each batch.

    Raises:
        InputDataError: no samples, a sample without an answer to compare with, or an unreadable picture.
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
        if progress:
            progress(len(answers), len(samples))
    return Evaluation(tuple(answers))


def refuse_overlap(calibration: Sequence[Sample], evaluation: Sequence[Sample]) -> None:
    """Refuse when a picture (by its bytes) is used both to calibrate and to evaluate.

    Raises:
        InputDataError: naming the first shared picture.
    """
    seen = {sha256_file(s.image): s.image for s in calibration}
    for sample in evaluation:
        twin = seen.get(sha256_file(sample.image))
        if twin is not None:
            raise InputDataError(
                f"evaluation picture {sample.image} has the same bytes as calibration picture {twin}; scores would be "
                "flattered, remove it from one of the manifests"
            )
