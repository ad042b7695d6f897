"""Fine-tuning of what stays continuous after quantization: codebooks, row scales, norms and biases; the codes stay.

KL(full precision ‖ quantized) is followed end to end (mgvq-algorithm.md 4.6; as VPTQ does, Liu et al. 2024). Every
value is rounded to what is stored before it is used, gradients go straight through, so nothing changes on storing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from toolchain.calibration.held_out import refinement_split
from toolchain.calibration.inputs import CalibrationInput
from toolchain.checkpoint.modules import keep_decoded, vq_modules
from toolchain.errors import InputDataError, NumericGateError, UsageError
from toolchain.quantize.refine.finetune_loss import Target, sample_loss, teacher_target, text_scores
from toolchain.quantize.refine.finetune_settings import FineTuneSettings, rates
from toolchain.quantize.refine.finetune_state import run_mark
from toolchain.quantize.refine.lookup import Offsets, TunedWeights
from toolchain.values import SILENT, Progress


@dataclass(frozen=True)
class FineTuneResult:
    """What fine-tuning did. Losses and divergences are nats an answer token, on the held-out images.

    loss_before, loss_after: what was minimised, which chose the best state. before, after: the answers' KL alone.
    improved: False where no state was better than the start; the model is then what it was.
    held_out_images: 0 where there were too few images to hold any out; the figures are then of the training data.
    history: the loss at the start and after every epoch.
    """

    loss_before: float
    loss_after: float
    before: float
    after: float
    improved: bool
    steps: int
    best_step: int
    held_out_images: int
    held_out_samples: int
    history: tuple[float, ...]


@dataclass
class _State:
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
    settings: FineTuneSettings
    tuned: TunedWeights
    optimizer: torch.optim.Adam
    now: _State

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
    settings: FineTuneSettings,
    *,
    progress: Progress = SILENT,
    save: Callable[[dict[str, Any]], None] | None = None,
    resume: dict[str, Any] | None = None,
) -> FineTuneResult:
    """Train a quantized model's codebooks, scales, norms and biases in place, and tell how far it came.

    The best state on held-out images is kept; where none is better than the start, the model stays what it was. Same
    seed, inputs, machine and threads: same bytes, whether the run was interrupted or not.

    Args:
        model: in eval mode, its quantized layers `modules.VQModule`s.
        teacher: what it was quantized from; asked once about every input.
        inputs: on the model's device.
        save: called every `save_every` steps with a state for `resume`: tensors, numbers, text, lists and
            dicts, which `finetune_state.packed` takes.

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
    train, held, images = refinement_split(inputs)
    with _tunable(model, settings) as tuned:
        groups = [{"params": list(tuned.offsets[kind].values())} for kind in ("codebooks", "scales", "kept")]
        run = _Run(model, inputs, targets, train, held, settings, tuned, torch.optim.Adam(groups), _State())
        mark = run_mark(inputs, tuned, train, settings)
        with keep_decoded(model):
            loss_before, before = held_out_loss(run)
        run.now.history = [loss_before]
        if resume is not None:
            _restore(run, resume, mark)
        while not run.is_over:
            _step(run)
            if run.now.step % run.steps_an_epoch == 0:
                _judge(run)
            progress.step(run.now.step, run.steps, "fine-tuning")
            if save and run.now.step % settings.save_every == 0:
                save(_state(run, mark))
    now = run.now
    if now.best is not None:
        tuned.store(now.best)
    after = now.best_answer if now.best is not None else before
    return FineTuneResult(
        loss_before=loss_before,
        loss_after=min(now.history),
        before=before,
        after=after,
        improved=now.best is not None,
        steps=now.step,
        best_step=now.best_step,
        held_out_images=images,
        held_out_samples=len(held) if images else 0,
        history=tuple(now.history),
    )


@contextmanager
def _tunable(model: nn.Module, settings: FineTuneSettings) -> Iterator[TunedWeights]:
    """The model's continuous values, to be moved; the model is as it was when the context ends, however it ends."""
    tuned = TunedWeights(model, settings.kept_dtype)
    try:
        yield tuned
    finally:
        tuned.release()


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


def _step(run: _Run) -> None:
    """One step of Adam."""
    epoch, within = divmod(run.now.step, run.steps_an_epoch)
    generator = torch.Generator().manual_seed((run.settings.seed << 16) + epoch)
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
            f"fine-tuning, step {run.now.step + 1}: expected a finite loss, found {total}; lower codebook_rate, "
            "scale_rate and kept_rate, or compute in float32"
        )
    run.tuned.backward()
    for group, rate in zip(run.optimizer.param_groups, rates(run.now.step, run.steps, run.settings)):
        group["lr"] = rate
    run.optimizer.step()
    run.now.step += 1


def _judge(run: _Run) -> None:
    """Measure the held-out images, and remember the state where it is the best so far."""
    run.tuned.install()
    loss, answer = held_out_loss(run)
    now = run.now
    if loss < min(now.history):
        now.best_step, now.best_answer, now.best = now.step, answer, run.tuned.copied()
    now.history.append(loss)


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
    run.now = _State(**state["progress"])
    if run.now.best is not None:  # a state from a file lies on the CPU
        own = run.tuned.offsets
        run.now.best = {k: {n: x.to(own[k][n].device) for n, x in v.items()} for k, v in run.now.best.items()}
