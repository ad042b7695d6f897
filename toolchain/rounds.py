"""Jacobi rounds over a whole quantized model: one backward pass of KL(teacher ‖ quantized) says which way every weight
should go, and all layers choose their codes again, at once, for weights moved that way (mgvq-algorithm 2.9, last row).

The target of a layer is W† = Ŵ − η u S_o⁻¹ G S_i⁻¹ (`kl_shifts`). One η for all layers, since all of them answer the
same error: the one whose model is nearest the teacher on pictures that the gradient has not seen, or none.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from toolchain.calibration import CalibrationInput
from toolchain.held_out import every_nth_picture
from toolchain.install import TABLES, link_shared
from toolchain.kl_shifts import Progress, divergence_of, kl_gradients, newton_shifts
from toolchain.modules import VQModule, chunk_windows, keep_decoded, vq_modules
from toolchain.values import CHUNK_ROWS, BitPlan, LayerSpec
from toolchain.vq.assign import index_dtype
from toolchain.vq.curvature import damp
from toolchain.vq.descent import Descent, descend
from toolchain.vq.factor import factor_moment
from toolchain.vq.kronecker import Objective
from toolchain.vq.refit_cg import refit
from toolchain.vq.solve import Solution
from toolchain.vq.weights import Problem, VQWeights, pack_group, stack_group

HELD_OUT = 4  # every so many-th picture chooses the step, and gives no gradient
CAP_TRIES = 6  # the least gain of a change is raised so often to stay under the cap


@dataclass(frozen=True)
class RoundOptions:
    """What a round may do. `dampings` are of (S_o, S_i) in the Newton step, shares of the mean diagonals."""

    steps: tuple[float, ...] = (0.1, 0.2, 0.4, 1.0)
    dampings: tuple[float, float] = (0.1, 0.1)
    cap: float = 0.05  # of a group's codes that may change
    moment_damping: float = 0.01  # of S_i in the objective, as in the sweep
    refits: bool = True
    descent: Descent = field(default_factory=lambda: Descent(sweeps=1))


@dataclass(frozen=True)
class RoundResult:
    """What a round did: the step taken (0: the model is as it was), nats a token on the held-out pictures by step,
    0 among them, the share of codes that changed, and seconds by what they went to.
    """

    step: float
    divergences: dict[float, float]
    changed: float
    seconds: dict[str, float]

    @property
    def is_better(self) -> bool:
        return self.step > 0


def stored_weights(model: nn.Module, names: Sequence[str]) -> dict[str, VQWeights]:
    """Layer → what it holds now; nothing here is changed when the model takes over other weights."""
    found = {}
    modules = vq_modules(model)
    for name in names:
        module = modules[name]
        found[name] = VQWeights(
            module.code, module.rows, module.columns, module.codes, module.table.clone(), module.scales
        )
    return found


def store_weights(model: nn.Module, weights: Mapping[str, VQWeights], plan: BitPlan) -> None:
    """The model takes these weights over: codes, scales, and the tables that it stores once."""
    tables, modules = model.get_submodule(TABLES), vq_modules(model)
    for name, stored in weights.items():
        modules[name].set_weights(stored)
        tables.get_buffer(plan.layer(name).table).copy_(stored.table)
    link_shared(model, plan.layers)


def windows_of(module: VQModule) -> Tensor:
    """Table indices [m, n / V] of a module's codes, m rows padded to whole row groups, n to whole column groups."""
    code = module.code
    chunks = module.codes.view(*code.chunk_shape(module.rows, module.columns), code.chunk_bytes)
    windows = chunk_windows(chunks, code, torch.arange(CHUNK_ROWS, device=chunks.device))
    return windows.permute(0, 3, 1, 2).flatten(0, 2).to(index_dtype(code.entries))


def solution_of(modules: Sequence[VQModule], problem: Problem) -> Solution:
    """What the layers of a group hold, as a solution of their stacked problem."""
    indices = torch.cat([windows_of(module)[:held] for module, held in zip(modules, problem.held, strict=True)])
    scales = [nn.functional.pad(m.scales, (0, held - m.rows)) for m, held in zip(modules, problem.held, strict=True)]
    return Solution(indices, modules[0].table.clone(), torch.cat(scales), 0.0)


def capped_descent(
    problem: Problem,
    start: Solution,
    damped: Tensor,
    factors: list[Tensor] | None,
    modules: Sequence[VQModule],
    options: RoundOptions,
) -> tuple[Solution, float]:
    """(the start after a descent that changes at most `options.cap` of its codes, the share that changed).

    The changes that gain most are the ones to keep: where too many codes change, a change must gain more, until the
    share is under the cap. Where no gain tried comes under it, none changes.
    """
    code = modules[0].code
    objective = Objective.of(problem, damped, factors)
    begin, settings = objective.loss(start.decode()), options.descent
    live = start.scales > 0
    for _ in range(CAP_TRIES + 1):
        found = descend(problem, start, code, damped, factors, settings)
        changes = (found.indices != start.indices)[live]
        share = float(changes.float().mean()) if changes.numel() else 0.0
        if share <= options.cap:
            return found, share
        # Twice the mean gain of those that changed, then twice as much again.
        unit = CHUNK_ROWS if code.window > code.shift else 1
        mean_gain = (begin - objective.loss(found.decode())) * unit / float(changes.sum())
        settings = replace(settings, least_gain=2 * max(settings.least_gain, mean_gain))
    return start, 0.0


@dataclass
class _Round:
    """What the steps of one round share."""

    model: nn.Module
    teacher: Sequence[Tensor]
    inputs: Sequence[CalibrationInput]
    moments: Mapping[str, Tensor]
    row_factors: Mapping[str, Tensor]
    plan: BitPlan
    options: RoundOptions
    members: dict[str, list[LayerSpec]]
    shifts: dict[str, Tensor] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [spec.name for layers in self.members.values() for spec in layers]

    def held_out(self, apart: Sequence[int]) -> float:
        with keep_decoded(self.model):
            return divergence_of(self.model, self.teacher, self.inputs, apart)

    def moved(self, group: str, step: float) -> tuple[dict[str, VQWeights], float]:
        """(the layers of a group for Ŵ + step · shift, the share of its codes that changed)."""
        layers = self.members[group]
        modules = [vq_modules(self.model)[spec.name] for spec in layers]
        targets = [m.dense(torch.float32) + step * self.shifts[s.name] for m, s in zip(modules, layers, strict=True)]
        code, damping = modules[0].code, self.options.moment_damping
        problem = stack_group(targets, self.moments[group], code, searches_paths=True)
        damped = factor_moment(problem.moment, problem.columns, code.vector, damping).damped
        factors = self._factors(layers)
        start = solution_of(modules, problem)
        found, share = capped_descent(problem, start, damped, factors, modules, self.options)
        if self.options.refits:
            found = refit(problem, found, code, Objective.of(problem, damped, factors))
        packed = pack_group(problem, found.indices, found.table, found.scales, code)
        return {spec.name: stored for spec, stored in zip(layers, packed.layers, strict=True)}, share

    def _factors(self, layers: list[LayerSpec]) -> list[Tensor] | None:
        """S_o of every layer of a group, damped; None where no layer has one."""
        if not any(spec.name in self.row_factors for spec in layers):
            return None
        given = [self.row_factors.get(s.name, torch.eye(s.rows)) for s in layers]
        return [damp(factor, self.options.dampings[0]) for factor in given]


def jacobi_round(
    model: nn.Module,
    teacher: Sequence[Tensor],
    inputs: Sequence[CalibrationInput],
    moments: Mapping[str, Tensor],
    row_factors: Mapping[str, Tensor],
    specs: Sequence[LayerSpec],
    plan: BitPlan,
    options: RoundOptions | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> RoundResult:
    """One round, in place: the model of the best step, or the model as it was where no step is better held out.

    Args:
        model: quantized, with its tables installed and linked.
        teacher: `teacher_scores` of the full-precision model on the same inputs.
        moments: group → S_i float32[n, n] of the inputs it sees in `model`; a group without one is left alone.
        row_factors: layer → S_o float32[m, m] of mean diagonal 1; the identity where a layer has none.
        seed: draws the answers whose gradients set the length of a step; the result depends on nothing else random.
        progress: called with (what is done, how many, of how many).

    Raises:
        InputDataError: too few calibration pictures to hold some out.
    """
    options = options or RoundOptions()
    fit, apart = every_nth_picture(inputs, HELD_OUT)
    members: dict[str, list[LayerSpec]] = {}
    for spec in specs:
        if spec.group in moments and not spec.tied_to:
            members.setdefault(spec.group, []).append(spec)
    run = _Round(model, teacher, inputs, moments, row_factors, plan, options, members)
    clock = _Clock()
    gradients = kl_gradients(model, teacher, inputs, fit, run.names, torch.Generator().manual_seed(seed), progress)
    clock.stop("gradients")
    run.shifts = newton_shifts(gradients, members, moments, row_factors, options.dampings)
    clock.stop("shifts")
    before = stored_weights(model, run.names)
    divergences = {0.0: run.held_out(apart)}
    clock.stop("held out")
    best, changed = before, 0.0
    for done, step in enumerate(options.steps, start=1):
        tried, share = _moved_model(run, step)
        clock.stop("descent")
        store_weights(model, tried, plan)
        divergences[step] = run.held_out(apart)
        if divergences[step] < min(value for other, value in divergences.items() if other != step):
            best, changed = tried, share
        store_weights(model, before, plan)
        clock.stop("held out")
        if progress:
            progress("steps", done, len(options.steps))
    store_weights(model, best, plan)
    return RoundResult(min(divergences, key=divergences.__getitem__), divergences, changed, clock.seconds)


def _moved_model(run: _Round, step: float) -> tuple[dict[str, VQWeights], float]:
    """(every layer for one step, the share of all codes that changed)."""
    found: dict[str, VQWeights] = {}
    changed = total = 0.0
    for group, layers in run.members.items():
        stored, share = run.moved(group, step)
        weights = sum(spec.rows * spec.columns for spec in layers)
        changed, total = changed + share * weights, total + weights
        found |= stored
    return found, changed / total if total else 0.0


class _Clock:
    """Seconds by what they went to."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.since = time.monotonic()

    def stop(self, what: str) -> None:
        """Count the time since the last stop as `what`."""
        now = time.monotonic()
        self.seconds[what] = self.seconds.get(what, 0.0) + now - self.since
        self.since = now
