"""How long each phase of an answer takes, measured on any backend that runs a `Runner` and can time its layers.

A backend is opened twice. First without layer times: that gives the figures. Then with them, for fewer repeats: that
says where the time went, and how much slower the recording made it (profilers change what they measure).

    prepare   image and prompt to graph inputs        vision    one call an image
    embed     ids and features merged                   prefill   the prompt through the decoder
    decode    one more token: embedding, decoder, choosing it; per token

`first_token`, the time to the first token, is the sum of the first four and of choosing it, as one clock saw it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from toolchain.device.families.base import Host, Prepared
from toolchain.device.generation.generate import Runner
from toolchain.device.profile.layers import LayerTime, Tally, tally
from toolchain.errors import UsageError
from toolchain.values import SILENT, Progress

PHASES = ("prepare", "vision", "embed", "prefill", "decode")
LAYER_REPEATS = 3  # of the repeats, how many are recorded again layer by layer, and how many tokens of each
LAYER_TOKENS = 8


@dataclass(frozen=True)
class GraphCall:
    """One call of one graph, in milliseconds of wall time."""

    graph: str
    ms: float


class Recording(Protocol):
    """A runner whose graph calls are timed; `calls` grows with every one of them.

    A backend that would run slower if it looked (engines in CUDA graphs) leaves `calls` empty when layers are not asked
    for. There is then no phase "embed": prefill has it.
    """

    runner: Runner
    calls: list[GraphCall]

    def layers(self) -> list[list[LayerTime]]:
        """Layers of every call, in the order of `calls`; the recording is over then. Lists are empty without layers.

        Raises:
            EnvironmentMismatch: the backend lost some of them.
        """


class ProfileBackend(Protocol):
    """Something that can be profiled; `uses_gpu` says whether a GPU's clocks tell anything of it."""

    name: str

    @property
    def uses_gpu(self) -> bool: ...

    def describe(self) -> dict[str, Any]:
        """What ran, for the report: versions, provider, device, threads."""

    def open(self, capacity: int, layers: bool) -> Recording:
        """A fresh recording with room for `capacity` tokens; `layers` asks for times of single layers."""


@dataclass(frozen=True)
class Settings:
    """How much is run: `repeats` answers of `tokens` tokens after `warmup` that do not count."""

    repeats: int = 10
    warmup: int = 2
    tokens: int = 32

    def __post_init__(self) -> None:
        if self.repeats < 1 or self.warmup < 0 or self.tokens < 2:
            raise UsageError(
                f"repeats {self.repeats}, warmup {self.warmup}, tokens {self.tokens}: expected at least 1, 0 and 2"
            )

    def for_layers(self) -> Settings:
        """The second, recorded pass: at most a few answers of a few tokens, after one that does not count."""
        return Settings(min(self.repeats, LAYER_REPEATS), 1, min(self.tokens, LAYER_TOKENS))


@dataclass(frozen=True)
class Question:
    """What is asked, again and again. `image_size` is (width, height) of the image given, None without one."""

    prompt: str
    image: Image.Image | None = None

    @property
    def image_size(self) -> tuple[int, int] | None:
        return None if self.image is None else self.image.size


@dataclass(frozen=True)
class Spread:
    """Of `count` values: median, median absolute deviation, tenth and ninetieth percentile, least.

    `mad` is the median of |value - median|, not scaled (times 1.4826 it estimates a normal distribution's standard
    deviation); percentiles are interpolated linearly between the two nearest values. Decode's values are all tokens
    after the first of all answers, pooled: their spread holds the growing context, too.
    """

    median: float
    mad: float
    p10: float
    p90: float
    least: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Raises ValueError where there are no values."""
        if not len(values):
            raise ValueError("no values to summarise")
        data = np.asarray(values, dtype=np.float64)
        median = float(np.median(data))
        low, high = (float(x) for x in np.percentile(data, (10, 90)))
        return cls(median, float(np.median(np.abs(data - median))), low, high, float(data.min()), len(data))


@dataclass
class PhaseRun:
    """One run of one phase: its wall time, and which graph calls (by index) were made in it.

    `step` counts the decoded tokens of an answer: each has one place more to attend to than the one before.
    """

    phase: str
    ms: float
    calls: list[int] = field(default_factory=list)
    step: int = 0


@dataclass(frozen=True)
class Measured:
    """All that was measured. `phases` and `first_token` are of the pass without layers, `tallies` of the one with.

    `slowdown` is, by phase, the recorded pass's mean over the other's mean of the same tokens: what recording costs.
    """

    phases: dict[str, Spread]
    graph_ms: dict[str, float]  # phase → median milliseconds inside graph calls, where those were timed
    first_token: Spread
    tallies: dict[str, Tally]
    slowdown: dict[str, float]
    prompt_tokens: int
    image_tokens: int
    answer: tuple[int, ...]
    settings: Settings

    @property
    def tokens_per_s(self) -> float:
        """Of decoding, from the median token."""
        return 1000 / self.phases["decode"].median


def measure(
    backend: ProfileBackend,
    host: Host,
    question: Question,
    settings: Settings,
    progress: Progress = SILENT,
) -> Measured:
    """Profile one question: first the figures, then where the time went.

    Stop tokens do not end an answer here, so that every repeat does the same work.

    Raises:
        What the backend raises; BudgetError where prompt and tokens exceed its room.
    """
    prepared = host.prepare(question.image, question.prompt)
    capacity = prepared.length + settings.tokens
    plain = backend.open(capacity, layers=False)
    runs, answer = _repeat(plain, host, question, settings, partial(progress.step, what="timing"), split=True)
    plain.layers()
    recorded = backend.open(capacity, layers=True)
    fewer = settings.for_layers()
    split = any(run.phase == "embed" for run in runs)
    layer_runs, again = _repeat(
        recorded, host, question, fewer, partial(progress.step, what="recording layers"), split=split
    )
    if again != answer[: len(again)]:
        raise RuntimeError(f"recording layers changed the answer from token ids {answer[: len(again)]} to {again}")
    tallies = tallies_of(recorded, layer_runs)
    by_phase = {phase: [run for run in runs if run.phase == phase] for phase in (*PHASES, "first_token")}
    return Measured(
        {phase: Spread.of([run.ms for run in by_phase[phase]]) for phase in PHASES if by_phase[phase]},
        {p: _median_inside(plain.calls, by_phase[p]) for p in PHASES if any(run.calls for run in by_phase[p])},
        Spread.of([run.ms for run in by_phase["first_token"]]),
        tallies,
        {phase: found.total_ms / _mean_until(fewer.tokens - 1, by_phase[phase]) for phase, found in tallies.items()},
        prepared.length,
        sum(end - start for start, end in prepared.image_places),
        tuple(answer),
        settings,
    )


def tallies_of(recorded: Recording, runs: Sequence[PhaseRun]) -> dict[str, Tally]:
    """Rows of every phase that was recorded; the recording is over then."""
    layers = recorded.layers()

    def parts(run: PhaseRun) -> tuple[float, float, list[LayerTime]]:
        inside = sum(recorded.calls[i].ms for i in run.calls)
        return run.ms, inside, [layer for i in run.calls for layer in layers[i]]

    by_phase = {phase: [parts(run) for run in runs if run.phase == phase] for phase in PHASES if phase != "prepare"}
    return {phase: tally(found) for phase, found in by_phase.items() if found}


def _repeat(
    recording: Recording,
    host: Host,
    question: Question,
    settings: Settings,
    tell: Callable[[int, int], None],
    *,
    split: bool,
) -> tuple[list[PhaseRun], list[int]]:
    """Phase runs of the repeats that count, and the token ids of the answer."""
    kept: list[PhaseRun] = []
    answer: list[int] = []
    total = settings.warmup + settings.repeats
    for index in range(total):
        runs, answer = _answer(recording, host, question, settings.tokens, split)
        if index >= settings.warmup:
            kept += runs
        tell(index + 1, total)
    return kept, answer


def _answer(
    recording: Recording, host: Host, question: Question, tokens: int, split: bool
) -> tuple[list[PhaseRun], list[int]]:
    """One whole answer of `tokens` tokens, phase by phase; `split` keeps the embedding apart from prefill."""
    began = time.perf_counter()
    prepared = host.prepare(question.image, question.prompt)
    runs = [PhaseRun("prepare", _ms_since(began))]
    runner = recording.runner
    runner.truncate(0)
    features = []
    for feeds in prepared.vision_feeds:
        run, made = _timed(recording, "vision", partial(runner.image_features, feeds))
        runs.append(run)
        features.append(made)
    prefill, logits = _timed(recording, "prefill", lambda: runner.extend(*_prompt(host, prepared, features)))
    token = int(logits.argmax())
    first = PhaseRun("first_token", _ms_since(began))
    runs += [*(_without_embed(recording, prefill) if split else [prefill]), first]
    ids = [token]
    for step in range(tokens - 1):
        place = prepared.next_position + step
        run, token = _timed(recording, "decode", partial(_step, host, runner, token, place))
        run.step = step
        runs.append(run)
        ids.append(token)
    return runs, ids


def _prompt(host: Host, prepared: Prepared, features: list[NDArray]) -> tuple[NDArray, NDArray, NDArray]:
    nothing = np.zeros((0, host.settings["decoder"]["hidden"]), dtype=np.float32)
    return prepared.input_ids, np.concatenate([nothing, *features]), prepared.positions


def _step(host: Host, runner: Runner, token: int, position: int) -> int:
    nothing = np.zeros((0, host.settings["decoder"]["hidden"]), dtype=np.float32)
    places = np.full((host.axes, 1), position, dtype=np.int64)
    return int(runner.extend(np.asarray([token], dtype=np.int64), nothing, places).argmax())


def _timed(recording: Recording, phase: str, work: Callable[[], Any]) -> tuple[PhaseRun, Any]:
    first, began = len(recording.calls), time.perf_counter()
    result = work()
    return PhaseRun(phase, _ms_since(began), list(range(first, len(recording.calls)))), result


def _without_embed(recording: Recording, prefill: PhaseRun) -> list[PhaseRun]:
    """Prefill as two phases, where the runner's calls keep the embedding apart from the decoder."""
    embed = [i for i in prefill.calls if recording.calls[i].graph == "embed"]
    if not embed:
        return [prefill]
    ms = sum(recording.calls[i].ms for i in embed)
    rest = [i for i in prefill.calls if i not in embed]
    return [PhaseRun("embed", ms, embed), PhaseRun("prefill", prefill.ms - ms, rest)]


def _mean_until(step: int, runs: Sequence[PhaseRun]) -> float:
    return float(np.mean([run.ms for run in runs if run.step < step]))


def _median_inside(calls: Sequence[GraphCall], runs: Sequence[PhaseRun]) -> float:
    return float(np.median([sum(calls[i].ms for i in run.calls) for run in runs]))


def _ms_since(began: float) -> float:
    return 1000 * (time.perf_counter() - began)
