"""Fine-tuning of what stays continuous after quantization: tables, row scales, norms and biases; the codes stay.

KL(full precision ‖ quantized) is followed end to end (mgvq-algorithm.md 4.6; as VPTQ does, Liu et al. 2024). Every
value is rounded to what is stored before it is used, gradients go straight through, so nothing changes on storing.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from toolchain.calibration import CalibrationInput, picture_digest
from toolchain.errors import InputDataError, NumericGateError, UsageError
from toolchain.kl import log_probabilities, token_divergences
from toolchain.lookup import Offsets, TunedWeights
from toolchain.modules import keep_decoded, vq_modules

FEWEST_PICTURES = 5  # with fewer, what is held out would say nothing


@dataclass(frozen=True)
class TuneSettings:
    """How long, how fast and after what.

    epochs, batch: passes over the training part, and samples a step. warm_up: share of the steps in which the rates
    rise; a cosine takes them to zero after it. patience: epochs without a new best before the end. held_out: share of
    the pictures that are not trained on. save_every: steps.
    table_rate, scale_rate, kept_rate: Adam's, relative to the size of what they move (`lookup.TunedWeights`).
    text_weight: of the mean KL at all text after the picture beside that at the answer; with 0 the teacher's
    log-probabilities are kept for answers only. temperature: both distributions are softened by it (`sample_loss`).
    kept_dtype: of norms and biases in the checkpoint (`checkpoint.kept_dtype`).
    """

    # Measured on the demo in 4,8,9, tuned on its 96 lines: the answers' KL of 400 other questions, 0.0108 before. These
    # defaults 0.0045 (mean of three seeds 0.0044; on 600 questions that chose nothing 0.0087, 0.0206 before).
    # Temperature 2 0.0047 (mean 0.0053), 1 0.0067. At 2: text weight 3 0.0051, table rate 2e-3 0.0054, no table 0.0059,
    # nothing kept 0.0051, batch 4 0.0049, scales and kept at 5e-4 for 8 epochs 0.0067. At 1, last state of 8 epochs:
    # answers alone 0.0071, with text 0.0055, that with the last hidden state's squared error 0.0052, with every layer's
    # 0.0053, rates two to three times as high 0.0089. One seed each where no mean is given: 0.0007 is noise.
    epochs: int = 5
    batch: int = 8
    table_rate: float = 1e-3
    scale_rate: float = 1e-3
    kept_rate: float = 1e-3
    text_weight: float = 1.0
    temperature: float = 4.0
    warm_up: float = 0.1
    held_out: float = 0.2
    patience: int = 3
    save_every: int = 10
    kept_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "patience", "save_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"fine-tuning, {name}: expected at least 1, found {getattr(self, name)}")
        for name in ("warm_up", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(
                    f"fine-tuning, {name}: expected a share from 0 to below 1, found {getattr(self, name)}"
                )


@dataclass(frozen=True)
class TuneResult:
    """What fine-tuning did. Losses and divergences are nats an answer token, on the held-out pictures.

    loss_before, loss_after: what was minimised, which chose the best state. before, after: the answers' KL alone.
    improved: False where no state was better than the start; the model is then what it was.
    held_out_pictures: 0 where there were too few pictures to hold any out; the figures are then of the training data.
    history: the loss at the start and after every epoch.
    """

    loss_before: float
    loss_after: float
    before: float
    after: float
    improved: bool
    steps: int
    best_step: int
    held_out_pictures: int
    held_out_samples: int
    history: tuple[float, ...]


@dataclass(frozen=True)
class Target:
    """The teacher's log-probabilities float32[t, v] of a sample's last t text tokens, the last `answer` its answer."""

    log_probabilities: Tensor
    answer: int


@dataclass
class _Progress:
    """All that changes from step to step, the offsets and Adam's moments apart."""

    step: int = 0
    history: list[float] = field(default_factory=list)
    best_step: int = 0
    best_answer: float = math.inf
    best: Offsets | None = None


@dataclass
class _Run:
    """What the steps of one run share. `train` and `held` are places in `inputs`."""

    model: nn.Module
    inputs: Sequence[CalibrationInput]
    targets: list[Target]
    train: list[int]
    held: list[int]
    settings: TuneSettings
    seed: int
    tuned: TunedWeights
    optimizer: torch.optim.Adam
    now: _Progress

    @property
    def steps_an_epoch(self) -> int:
        return -(-len(self.train) // self.settings.batch)

    @property
    def steps(self) -> int:
        return self.steps_an_epoch * self.settings.epochs

    @property
    def is_over(self) -> bool:
        """All steps are done, or no epoch of the last `patience` was better than the best before them."""
        epochs_since = (self.now.step - self.now.best_step) // self.steps_an_epoch
        return self.now.step >= self.steps or epochs_since >= self.settings.patience


def fine_tune(
    model: nn.Module,
    teacher: nn.Module,
    inputs: Sequence[CalibrationInput],
    settings: TuneSettings,
    *,
    seed: int,
    progress: Callable[[int, int, float], None] | None = None,
    save: Callable[[dict[str, Any]], None] | None = None,
    resume: dict[str, Any] | None = None,
) -> TuneResult:
    """Train a quantized model's tables, scales, norms and biases in place, and tell how far it came.

    The best state on held-out pictures is kept; where none is better than the start, the model stays what it was. Same
    seed, inputs, machine and threads: same bytes, whether the run was interrupted or not.

    Args:
        model: in eval mode, its quantized layers `modules.VQModule`s.
        teacher: what it was quantized from; asked once about every input.
        inputs: on the model's device.
        progress: called after every step with (steps done, steps at most, loss an answer token of the batch).
        save: called every `save_every` steps with a state for `resume`: tensors, numbers, text, lists and dicts.

    Raises:
        InputDataError: no inputs.
        UsageError: no quantized layers, or `resume` is of another run.
        NumericGateError: the loss is not finite; the model is as it was.
    """
    if not inputs:
        raise InputDataError("fine-tuning: expected calibration inputs, found none; name a manifest with answers")
    if not vq_modules(model):
        raise UsageError("fine-tuning: expected a quantized model, found no quantized layer in it; quantize it first")
    targets = [teacher_target(teacher, one, settings) for one in inputs]
    train, held, pictures = split_pictures(inputs, settings.held_out, seed)
    with _tunable(model, settings) as tuned:
        groups = [{"params": list(tuned.offsets[kind].values())} for kind in ("tables", "scales", "kept")]
        run = _Run(model, inputs, targets, train, held, settings, seed, tuned, torch.optim.Adam(groups), _Progress())
        mark = _fingerprint(run)
        with keep_decoded(model):
            loss_before, before = held_out_loss(run)
        run.now.history = [loss_before]
        if resume is not None:
            _restore(run, resume, mark)
        while not run.is_over:
            loss = _step(run)
            if run.now.step % run.steps_an_epoch == 0:
                _judge(run)
            if progress:
                progress(run.now.step, run.steps, loss)
            if save and run.now.step % settings.save_every == 0:
                save(_state(run, mark))
    now = run.now
    if now.best is not None:
        tuned.store(now.best)
    after = now.best_answer if now.best is not None else before
    return TuneResult(
        loss_before=loss_before,
        loss_after=min(now.history),
        before=before,
        after=after,
        improved=now.best is not None,
        steps=now.step,
        best_step=now.best_step,
        held_out_pictures=pictures,
        held_out_samples=len(held) if pictures else 0,
        history=tuple(now.history),
    )


@contextmanager
def _tunable(model: nn.Module, settings: TuneSettings) -> Iterator[TunedWeights]:
    """The model's continuous values, to be moved; the model is as it was when the context ends, however it ends."""
    tuned = TunedWeights(model, settings.kept_dtype)
    try:
        yield tuned
    finally:
        tuned.release()


def split_pictures(inputs: Sequence[CalibrationInput], share: float, seed: int) -> tuple[list[int], list[int], int]:
    """Places (trained on, held out) of the inputs, all questions about a picture on one side; pictures held out.

    With fewer than FEWEST_PICTURES pictures, or a share of 0, both are all of the inputs and none is held out.
    """
    keys = [picture_digest(one) for one in inputs]
    pictures = list(dict.fromkeys(keys))
    if len(pictures) < FEWEST_PICTURES or share == 0:
        return list(range(len(keys))), list(range(len(keys))), 0
    count = max(1, round(share * len(pictures)))
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed)).tolist()
    apart = {pictures[i] for i in order[:count]}
    return [i for i, key in enumerate(keys) if key not in apart], [i for i, k in enumerate(keys) if k in apart], count


def text_tokens(one: CalibrationInput) -> int:
    """How many tokens stand after the last picture token; all but the first where there is no picture."""
    places = one.is_image.nonzero()
    last = int(places[-1]) if len(places) else 0
    return len(one.is_image) - 1 - last


def text_scores(model: nn.Module, one: CalibrationInput, tokens: int) -> Tensor:
    """float32[t, v]: log-probabilities at a sample's last `tokens` tokens; and of what follows, without an answer."""
    logits = model(**one.tensors, use_cache=False, logits_to_keep=tokens + 1).logits[0]
    return log_probabilities(logits[:-1] if one.answer_tokens else logits)


@torch.no_grad()
def teacher_target(teacher: nn.Module, one: CalibrationInput, settings: TuneSettings) -> Target:
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


def sample_loss(expected: Tensor, found: Tensor, answer: int, settings: TuneSettings) -> tuple[Tensor, Tensor]:
    """(the loss, the answer's KL at temperature 1), both summed over the answer's tokens, nats.

    The loss is τ² (Σ_answer KL + text_weight · answer tokens · mean KL over the text after the picture), with both
    distributions at temperature τ (Hinton et al. 2015), from log-probabilities float32[t, v].
    """
    own = token_divergences(expected[-answer:], found.detach()[-answer:]).sum()
    soft = (log_probabilities(x / settings.temperature) for x in (expected, found))
    divergences = settings.temperature**2 * token_divergences(*soft)
    loss = divergences[-answer:].sum()
    if settings.text_weight:
        loss = loss + settings.text_weight * answer * divergences.mean()
    return loss, own


def _loss_of(run: _Run, place: int) -> tuple[Tensor, Tensor]:
    target, one = run.targets[place], run.inputs[place]
    tokens = len(target.log_probabilities) - (0 if one.answer_tokens else 1)
    found = text_scores(run.model, one, tokens)
    return sample_loss(target.log_probabilities.to(found.device), found, target.answer, run.settings)


@torch.no_grad()
def held_out_loss(run: _Run) -> tuple[float, float]:
    """(the loss, the answer's KL) an answer token on the held-out inputs, of the model as it stands."""
    sums = torch.tensor([[float(x) for x in _loss_of(run, place)] for place in run.held], dtype=torch.float64).sum(
        dim=0
    )
    tokens = sum(run.targets[place].answer for place in run.held)
    loss, answer = (sums / tokens).tolist()
    return loss, answer


def _step(run: _Run) -> float:
    """One step of Adam; the loss an answer token of its batch before it."""
    epoch, within = divmod(run.now.step, run.steps_an_epoch)
    generator = torch.Generator().manual_seed((run.seed << 16) + epoch)
    order = torch.randperm(len(run.train), generator=generator).tolist()
    size = run.settings.batch
    batch = [run.train[i] for i in order[within * size : (within + 1) * size]]
    tokens = sum(run.targets[place].answer for place in batch)
    run.tuned.install()
    total = 0.0
    for place in batch:
        loss = _loss_of(run, place)[0] / tokens
        loss.backward()
        total += float(loss.detach())
    if not math.isfinite(total):
        raise NumericGateError(
            f"fine-tuning, step {run.now.step + 1}: expected a finite loss, found {total}; lower table_rate, "
            "scale_rate and kept_rate, or compute in float32"
        )
    run.tuned.backward()
    for group, rate in zip(run.optimizer.param_groups, rates(run.now.step, run.steps, run.settings)):
        group["lr"] = rate
    run.optimizer.step()
    run.now.step += 1
    return total


def rates(step: int, steps: int, settings: TuneSettings) -> tuple[float, float, float]:
    """Of tables, scales and kept values at a step: a rise in a line, then half a cosine to zero."""
    rise = settings.warm_up * steps
    share = (step + 1) / (rise + 1) if step < rise else 0.5 + 0.5 * math.cos(math.pi * (step - rise) / (steps - rise))
    return settings.table_rate * share, settings.scale_rate * share, settings.kept_rate * share


def _judge(run: _Run) -> None:
    """Measure the held-out pictures, and remember the state where it is the best so far."""
    run.tuned.install()
    loss, answer = held_out_loss(run)
    now = run.now
    if loss < min(now.history):
        now.best_step, now.best_answer, now.best = now.step, answer, run.tuned.copied()
    now.history.append(loss)


def _fingerprint(run: _Run) -> str:
    """What must be equal for one run to go on with another's state."""
    digest = hashlib.sha256(json.dumps(asdict(run.settings) | {"seed": run.seed}, default=str).encode())
    for one in run.inputs:
        digest.update(picture_digest(one) + one.tensors["input_ids"].cpu().contiguous().numpy().tobytes())
    for module in run.tuned.modules.values():
        for buffer in (module.codes, module.table, module.scales):
            digest.update(buffer.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _state(run: _Run, mark: str) -> dict[str, Any]:
    """A copy of everything the next steps depend on."""
    now = {name: getattr(run.now, name) for name in run.now.__dataclass_fields__}
    return copy.deepcopy(
        {"run": mark, "progress": now, "offsets": run.tuned.copied(), "optimizer": run.optimizer.state_dict()}
    )


def _restore(run: _Run, state: dict[str, Any], mark: str) -> None:
    if state.get("run") != mark:
        raise UsageError(
            "fine-tuning, resume: expected the state of a run with these settings, seed, inputs and codes, found "
            "another's; delete it and start again, or put back what was changed"
        )
    state = copy.deepcopy(state)
    run.tuned.load(state["offsets"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.now = _Progress(**state["progress"])
