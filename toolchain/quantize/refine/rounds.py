"""Jacobi rounds over a whole quantized model: one KL(teacher ‖ quantized) gradient says which way every weight should
go, and all layers choose their codes again, at once, for weights moved that way (mgvq-algorithm 2.9, last row).

The target of a layer is W† = Ŵ − η u S_o⁻¹ G S_i⁻¹ (`kl_shifts`). One η for all layers, since all of them answer the
same error: the one whose model is nearest the teacher on images that the gradient has not seen, or none.

A round goes three times over the groups, and keeps what it has found in pieces of the run's store:

    shift.GROUP     N = S_o⁻¹ G S_i⁻¹ of its layers, S_i, S_o       batch by batch, gradients and moments collected
    moved.η.GROUP   the codes it takes for that η                   group by group; its shift goes when all η are there
    judged.η        nats of the model of that η                     η by η

Resident at any time are both models, the quantized one with a decoded copy, the teacher's log-probabilities, the codes
of two models, and of statistics those of one layer batch: as many groups as `RoundOptions.batch_bytes` holds, one at
least, counted as 12 m n bytes for G (its sum and two gradients of a sample), 12 n² for S_i (two halves and their sum)
and 4 m² for S_o; while groups move, N, S_i and S_o of one group, twice while their file is written or read. A
layer batch costs two backward passes over the samples fitted to and a forward pass over all, and where rows are coupled
a backward pass over all of the full-precision model: fewer passes where layer batches are longer. On disk lie 4 m n + 4
n² + 4 m² bytes of groups yet to move, some 70 GB of a 7B model. A killed round goes on after the last piece, to the
same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from toolchain.calibration.held_out import JUDGED, image_numbers, refinement_split
from toolchain.calibration.inputs import CalibrationInput
from toolchain.checkpoint.modules import keep_decoded, vq_modules
from toolchain.errors import InputDataError
from toolchain.files.store import Pieces
from toolchain.quantize.driver.sequence import layer_batches
from toolchain.quantize.refine.kl_gradients import (
    divergence_of,
    inner_product,
    kl_gradients,
    newton_step,
    step_unit,
)
from toolchain.quantize.refine.round_moves import RoundOptions, moved_group, store_weights, stored_weights, trusted_move
from toolchain.values import SILENT, BitPlan, LayerSpec, Progress, groups_of
from toolchain.vq.weights import VQWeights


@dataclass(frozen=True)
class RoundResult:
    """What a round did: the step taken (0: the model is as it was), nats a token on the held-out images by step,
    0 among them, the share of codes that changed, and seconds of the process that finished it, by what they went to.
    """

    step: float
    divergences: dict[float, float]
    changed: float
    seconds: dict[str, float]


@dataclass(frozen=True)
class Statistics:
    """What a round asks of the inputs of some groups of layers, in the model as it stands.

    moments: group → S_i float32[n, n].
    row_factors: layer → S_o float32[m, m] of mean diagonal 1; the identity where a layer has none.
    rows_up_to: only layers of at most so many outputs have an S_o.
    """

    moments: Callable[[Sequence[LayerSpec]], Mapping[str, Tensor]]
    row_factors: Callable[[Sequence[LayerSpec]], Mapping[str, Tensor]]
    rows_up_to: int

    def held_bytes(self, members: Sequence[LayerSpec]) -> int:
        """Of a group's statistics while they are collected, gradients among them."""
        rows, columns = [spec.rows for spec in members], members[0].columns
        coupled = sum(m**2 for m in rows if m <= self.rows_up_to)
        return 12 * sum(rows) * columns + 12 * columns**2 + 4 * coupled


@dataclass
class _Round:
    """What the parts of one round share."""

    model: nn.Module
    teacher: Sequence[Tensor]
    inputs: Sequence[CalibrationInput]
    statistics: Statistics
    plan: BitPlan
    options: RoundOptions
    pieces: Pieces
    seed: int
    members: dict[str, list[LayerSpec]]
    fit: list[int]
    apart: list[int]
    progress: Progress
    clock: _Clock

    @cached_property
    def shared(self) -> set[str]:
        """Ids of codebooks that layers of more than one group use."""
        users: dict[str, set[str]] = {}
        for piece in (piece for layer in self.plan.layers if not layer.tied_to for piece in layer.pieces):
            users.setdefault(piece.table, set()).add(piece.group)
        return {codebook for codebook, groups in users.items() if len(groups) > 1}

    @property
    def specs(self) -> list[LayerSpec]:
        return [spec for layers in self.members.values() for spec in layers]

    def held_out(self) -> float:
        with keep_decoded(self.model):
            return divergence_of(self.model, self.teacher, self.inputs, self.apart)


def jacobi_round(
    model: nn.Module,
    teacher: Sequence[Tensor],
    inputs: Sequence[CalibrationInput],
    statistics: Statistics,
    specs: Sequence[LayerSpec],
    plan: BitPlan,
    pieces: Pieces,
    options: RoundOptions | None = None,
    *,
    seed: int = 0,
    progress: Progress = SILENT,
) -> RoundResult:
    """One round, in place: the model of the best step, or the model as it was where no step is better held out.

    Args:
        model: quantized, with its codebooks installed and linked.
        teacher: `teacher_scores` of the full-precision model on the same inputs.
        specs: the layers that may move, whole groups of them; tied ones follow theirs.
        pieces: of this round alone, from this model and these arguments; the caller clears them when the result is
            kept.
        seed: draws the answers whose gradients set the length of a step; the result depends on nothing else random.

    Raises:
        InputDataError: too few calibration images to hold some out.
    """
    fit, apart, images = refinement_split(inputs)
    if not images:
        raise InputDataError(
            f"a Jacobi round holds every {JUDGED}th calibration image out: expected at least {JUDGED} different "
            f"images, found {len(set(image_numbers(inputs)))}; add images, or leave rounds out"
        )
    members = groups_of(spec for spec in specs if not spec.tied_to)
    own = (plan, options or RoundOptions(), pieces, seed, members, fit, apart, progress, _Clock())
    run = _Round(model, teacher, inputs, statistics, *own)
    unit = _shifted(run)
    shares = _moved(run, unit)
    return _chosen(run, shares)


def _shifted(run: _Round) -> float:
    """Every group's shift in a piece; the one u that shortens them all."""
    done = run.pieces.get("unit")
    if done is not None:
        return done[1]["unit"]
    inner: dict[str, float] = {}
    divergence = 0.0
    parts = list(layer_batches(run.specs, run.options.batch_bytes, run.statistics.held_bytes))
    for number, layer_batch in enumerate(parts):
        values = _batch_shifts(run, layer_batch, number, len(parts))
        inner |= {name: value for one in values for name, value in one["inner"].items()}
        divergence = values[0]["divergence"]
    unit = step_unit(divergence, [inner[spec.name] for spec in run.specs])
    run.pieces.put("unit", {}, {"unit": unit})
    return unit


def _batch_shifts(run: _Round, layer_batch: Sequence[LayerSpec], number: int, count: int) -> list[dict[str, Any]]:
    """The values of the layer batch's pieces, which are made where one is missing: ⟨G, N⟩ a layer, and the
    divergence.
    """
    groups = groups_of(layer_batch)
    kept = [value for group in groups for value in _kept_value(run, f"shift.{group}")]
    if len(kept) == len(groups):
        return kept
    first, total = number * len(run.fit), count * len(run.fit)
    gradients = kl_gradients(
        run.model,
        run.teacher,
        run.inputs,
        run.fit,
        [spec.name for spec in layer_batch],
        torch.Generator().manual_seed(run.seed),
        lambda done: run.progress.step(first + done, total, "round: gradients"),
    )
    run.clock.stop("gradients")
    moments, rows = run.statistics.moments(layer_batch), run.statistics.row_factors(layer_batch)
    run.clock.stop("statistics")
    values = []
    for group, layers in groups.items():
        tensors, inner = {"moment": moments[group]}, {}
        for spec in layers:
            factor = rows.get(spec.name)
            shift = newton_step(gradients, spec, moments[group], factor, run.options.dampings)
            inner[spec.name] = inner_product(gradients.means.pop(spec.name), shift)
            tensors |= {f"shift.{spec.name}": shift} | ({} if factor is None else {f"rows.{spec.name}": factor})
        values.append({"inner": inner, "divergence": gradients.divergence})
        run.pieces.put(f"shift.{group}", tensors, values[-1])
    run.clock.stop("shifts")
    return values


def _kept_value(run: _Round, name: str) -> list[Any]:
    """The value of a piece that is there, alone; its tensors are not held."""
    found = run.pieces.get(name)
    return [] if found is None else [found[1]]


def _moved(run: _Round, unit: float) -> list[float]:
    """Every group's codes for every step in pieces; step by step the share of all codes that changed."""
    changed, total = [0.0] * len(run.options.steps), 0.0
    for done, (group, layers) in enumerate(run.members.items(), start=1):
        weights = sum(spec.rows * spec.columns for spec in layers)
        total += weights
        for number, share in enumerate(_group_shares(run, unit, group)):
            changed[number] += share * weights
        run.progress.step(done, len(run.members), "round: groups")
    run.clock.stop("descent")
    return [share / total if total else 0.0 for share in changed]


def _group_shares(run: _Round, unit: float, group: str) -> list[float]:
    """The share of a group's codes that changes, step by step; its codes are kept."""
    kept = {number: _kept_value(run, f"moved.{number}.{group}") for number in range(len(run.options.steps))}
    if not all(kept.values()):
        shift = run.pieces.get(f"shift.{group}")
        if shift is None:  # it was damaged, or a kill came after it was dropped and a step is damaged
            _batch_shifts(run, run.members[group], 0, 1)
            shift = run.pieces.wanted(f"shift.{group}")
        for number, value in kept.items():
            kept[number] = value or [{"share": _moved_step(run, unit, group, shift[0], number)}]
    run.pieces.drop(f"shift.{group}")
    return [value["share"] for [value] in kept.values()]


def _moved_step(run: _Round, unit: float, group: str, tensors: Mapping[str, Tensor], number: int) -> float:
    """The share of a group's codes that changes for one step; its codes are kept."""
    layers, step = run.members[group], run.options.steps[number]
    modules = [vq_modules(run.model)[spec.name] for spec in layers]
    device = modules[0].scales.device
    own = {name: tensor.to(device) for name, tensor in tensors.items()}
    targets = []
    for module, spec in zip(modules, layers, strict=True):
        weight, move = module.dense(torch.float32), step * (unit * own[f"shift.{spec.name}"])
        targets.append(weight + trusted_move(weight, move, own["moment"], module.code))
    factors = [own.get(f"rows.{spec.name}") for spec in layers]
    is_shared = modules[0].codebook_id in run.shared
    stored, share = moved_group(modules, targets, own["moment"], factors, run.options, is_shared=is_shared)
    run.pieces.put(f"moved.{number}.{group}", dict(_named(layers, stored)), {"share": share})
    return share


def _named(layers: Sequence[LayerSpec], stored: Sequence[VQWeights]) -> Iterator[tuple[str, Tensor]]:
    yield "codebook", stored[0].codebook
    for spec, weights in zip(layers, stored, strict=True):
        yield f"{spec.name}.codes", weights.codes
        yield f"{spec.name}.scales", weights.scales


def _stored_step(run: _Round, number: int) -> dict[str, VQWeights]:
    """Every layer as it was kept for a step."""
    found = {}
    modules = vq_modules(run.model)
    for group, layers in run.members.items():
        kept, _ = run.pieces.wanted(f"moved.{number}.{group}")
        for spec in layers:
            m, device = modules[spec.name], modules[spec.name].scales.device
            names = (f"{spec.name}.codes", "codebook", f"{spec.name}.scales")
            found[spec.name] = VQWeights(m.code, m.rows, m.columns, *(kept[name].to(device) for name in names))
    return found


def _chosen(run: _Round, shares: Sequence[float]) -> RoundResult:
    """The model takes over the best step's codes, or keeps its own."""
    names = [spec.name for spec in run.specs]
    before = stored_weights(run.model, names)
    divergences = {0.0: run.pieces.get_or_make("judged.start", lambda: ({}, run.held_out()))[1]}
    best: int | None = None
    for number, step in enumerate(run.options.steps):

        def judge(number: int = number) -> tuple[dict[str, Tensor], float]:
            store_weights(run.model, _stored_step(run, number), run.plan)
            return {}, run.held_out()

        divergences[step] = run.pieces.get_or_make(f"judged.{number}", judge)[1]
        if divergences[step] < min(value for other, value in divergences.items() if other != step):
            best = number
        run.progress.step(number + 1, len(run.options.steps), "round: steps")
    store_weights(run.model, before if best is None else _stored_step(run, best), run.plan)
    changed = 0.0 if best is None else shares[best]
    run.clock.stop("held out")
    return RoundResult(min(divergences, key=divergences.__getitem__), divergences, changed, run.clock.seconds)


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
