"""Calibration lines without an answer, answered by the model in full precision, greedily.

Of a line without one, all that the loss gradients, the rounds and fine-tuning see is the next token. What the model
says by itself is what it should still say when its weights are quantized, and nobody needs to write it down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from toolchain.device.families.base import Host, open_image
from toolchain.device.generation.answer import Graphs, greedy
from toolchain.files.store import ObjectStore
from toolchain.values import SILENT, Progress, Sample

BATCH = 16


def answered(
    host: Host,
    graphs: Callable[[], Graphs],
    samples: Sequence[Sample],
    most_tokens: int,
    progress: Progress = SILENT,
    store: ObjectStore | None = None,
) -> list[Sample]:
    """The samples, those without an answer with the model's: its likeliest token after another, up to a stop token.

    An answer cut off at `most_tokens` serves as it is: no more of it is looked at than how likely each token is, given
    those before. A model that stops at once leaves its line as it was. Same samples, machine and threads: same answers.

    Args:
        graphs: gives the model's graphs; asked for where some answer is to be made.
        most_tokens: of every answer; 0 leaves all lines as they are.
        store: keeps what was answered, batch by batch, so that a killed run need not ask again.

    Raises:
        UsageError: a prompt and its answer would exceed the model's context.
        InputDataError: an image cannot be read.
    """
    wanted = [place for place, sample in enumerate(samples) if sample.answer is None]
    if not wanted or most_tokens == 0:
        return list(samples)
    filled, done = list(samples), 0
    for number, places in enumerate(_batches(wanted)):
        asked = [samples[place] for place in places]

        def make(asked: list[Sample] = asked) -> tuple[dict, list[str]]:
            return {}, _answers(host, graphs(), asked, most_tokens)

        texts = store.get_or_make(f"answers.{number}", make)[1] if store else make()[1]
        for place, text in zip(places, texts, strict=True):
            filled[place] = replace(samples[place], answer=text)
        done += len(places)
        progress.step(done, len(wanted), "answers")
    return filled


def _batches(places: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(places), BATCH):
        yield places[start : start + BATCH]


def _answers(host: Host, graphs: Graphs, asked: Sequence[Sample], most_tokens: int) -> list[str]:
    prompts = [host.prepare(open_image(sample.image), sample.prompt) for sample in asked]
    return [host.decode(ids) for ids in greedy(host, graphs, prompts, most_tokens)]
