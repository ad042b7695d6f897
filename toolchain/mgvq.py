"""MGVQ over a whole model: deal the columns, weigh the groups, plan the bits, sweep with drift, then mend the whole.

Each stage can be left out by the recipe; each is kept in the store, so that a killed run goes on where it was.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from toolchain.bit_allocation import CODES_BY_BITS, OVERLAPPING_BY_BITS
from toolchain.bitplan import plan as plan_bits
from toolchain.calibration import CalibrationInput, tied_moment
from toolchain.dealing import deal_model, measured_orders
from toolchain.mending import ROWS_UP_TO, Patient, Watch, mend_by_rounds, mend_by_tuning
from toolchain.models.family import Config, Family
from toolchain.models.inventory import kept_parameters
from toolchain.moments import Masses, collect_pairs, survey_inputs
from toolchain.objects import ObjectStore
from toolchain.recipe import Recipe
from toolchain.sensitivity import Sensitivity, expected_loss, measure_sensitivity
from toolchain.sequence import LayerResult, Progress, Solved, planned_code, quantize_in_sequence
from toolchain.statistics import LossStatistics, collect_loss_statistics
from toolchain.values import BitPlan, LayerSpec, VQCode
from toolchain.vq.curvature import damp
from toolchain.vq.descent import Descent
from toolchain.vq.drift import PairMoments, gated_shift
from toolchain.vq.factor import factor_moment
from toolchain.vq.refit_cg import refine
from toolchain.vq.scales import rms_scales
from toolchain.vq.solve import quantize_group, solve_problem
from toolchain.vq.weights import Options, VQGroup, pack_group, stack_group

ROW_DAMPING = 0.1  # of S_o, which few samples know: heavy damping turns it into I
HELD_OUT = 4  # every so many-th sample weighs the groups and gates what the others fitted
# At 2 bits quads with one window bit to spare stand beside pairs with four: the better one depends on how evenly
# column energies lie.
CODES_OFFERED = (*OVERLAPPING_BY_BITS.values(), "4,8,9")


@dataclass(frozen=True)
class Job:
    """What to quantize and how. `model` is full precision and is given up: the result is made in it."""

    model: nn.Module
    family: Family
    config: Config
    specs: tuple[LayerSpec, ...]
    inputs: list[CalibrationInput]
    bits: float | None
    budget_bytes: int | None
    overrides: tuple[tuple[str, str], ...]
    options: Options
    seed: int
    kept_dtype: torch.dtype  # what stays in 16 bits is stored in it


@dataclass(frozen=True)
class Made:
    """The quantized model, its plan, how its layers came out, the column orders, and what the plan was made from."""

    model: nn.Module
    plan: BitPlan
    layers: tuple[LayerResult, ...]
    orders: dict[str, Tensor]
    sensitivity: Sensitivity | None
    mended: dict[str, Any] = field(default_factory=dict)  # what rounds and fine-tuning did, JSON-clean


def quantize_model(
    job: Job, recipe: Recipe, store: ObjectStore, progress: Progress | None = None, watch: Watch | None = None
) -> Made:
    """The job done by the recipe's parts."""
    say = watch or (lambda what, done, total: None)
    full = job.model.requires_grad_(False)
    linears = [spec for spec in job.specs if spec.kind != "embedding"]
    survey = survey_inputs(full, job.inputs, linears, lambda done, total: say("survey", done, total))
    orders = _dealt(job, recipe, survey.energies)
    masses = _masses(job, recipe, linears, survey.masses, say)
    sensitivity = _sensitivity(job, recipe, store, masses, say)
    plan = _plan(job, recipe, sensitivity)
    quantized = copy.deepcopy(full)
    solver = DriftSolver(job, recipe, plan, full, masses)
    layers = quantize_in_sequence(quantized, job.specs, plan, solver, store, job.seed, progress)
    patient = Patient(quantized, full, job.inputs, job.specs, plan, masses, job.seed, job.kept_dtype)
    mended: dict[str, Any] = {}
    if recipe.rounds:
        mended["rounds"] = mend_by_rounds(patient, store, recipe.fisher, say)
    if recipe.tune:
        mended["tune"] = mend_by_tuning(patient, store, say)
    return Made(quantized, plan, layers, orders, sensitivity, mended)


def _dealt(job: Job, recipe: Recipe, energies: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Orders, folded into the model; none without the recipe's part."""
    if not recipe.deal:
        return {}
    orders = measured_orders(job.family, job.config, job.specs, energies)
    deal_model(job.model, job.family, job.config, orders)
    return orders


def _masses(job: Job, recipe: Recipe, linears: Sequence[LayerSpec], even: Masses, say: Watch) -> Masses:
    """Token masses: by the loss gradient where the recipe and the options say so, else every modality alike."""
    if not recipe.fisher:
        return even
    return collect_loss_statistics(
        job.model,
        job.inputs,
        linears,
        seed=job.seed,
        power=job.options.token_power,
        progress=lambda done, total: say("gradients", done, total),
    ).masses


def _sensitivity(job: Job, recipe: Recipe, store: ObjectStore, masses: Masses, say: Watch) -> Sensitivity | None:
    """Losses to plan by, kept in the store; None where nothing is left to choose."""
    if not recipe.mix or (job.bits is None and job.budget_bytes is None):
        return None

    def make() -> tuple[dict[str, Tensor], dict]:
        found = measure_sensitivity(
            job.model,
            job.inputs,
            job.specs,
            masses,
            CODES_OFFERED if recipe.overlap else tuple(CODES_BY_BITS.values()),
            held_out=held_out_samples(job.inputs),
            row_weights=row_weights_of,
            seed=job.seed,
            options=job.options,
            watch=lambda done, total: say("sensitivity", done, total),
        )
        return {}, vars(found)

    return Sensitivity(**store.made("sensitivity", make)[1])


def held_out_samples(inputs: Sequence[CalibrationInput]) -> range:
    """Every HELD_OUT-th sample; all of them where there are fewer."""
    return range(len(inputs)) if len(inputs) < HELD_OUT else range(1, len(inputs), HELD_OUT)


def _plan(job: Job, recipe: Recipe, sensitivity: Sensitivity | None) -> BitPlan:
    return plan_bits(
        job.specs,
        kept_parameters(job.model, job.specs),
        bits=job.bits,
        budget_bytes=job.budget_bytes,
        overrides=job.overrides,
        losses=None if sensitivity is None else sensitivity.losses(),
        overlapping=recipe.overlap,
    )


def row_weights_of(spec: LayerSpec, weight: Tensor) -> Tensor:
    """float32[m]: what an error in each row counts. An embedding's rows are normalised after they are read: what
    counts is the error relative to the row, and a rare token's loud row must not take the bits of a common one's.
    """
    if spec.kind != "embedding":
        return torch.ones(len(weight), device=weight.device)
    squares = rms_scales(weight, weight.shape[1]).square()
    return torch.where(squares > 0, squares.mean() / squares.clamp_min(1e-12), 0.0)


class DriftSolver:
    """Codes groups for the inputs that the quantized prefix gives, against what full precision would have put out."""

    def __init__(self, job: Job, recipe: Recipe, plan: BitPlan, full: nn.Module, masses: Masses) -> None:
        self.job, self.recipe, self.plan, self.full, self.masses = job, recipe, plan, full, masses
        self.pairs: dict[str, PairMoments] = {}
        self.statistics = LossStatistics()

    def begin(self, model: nn.Module, step: Sequence[LayerSpec]) -> None:
        groups = {spec.group for spec in step}
        asked = [spec for spec in self.job.specs if spec.group in groups and spec.kind != "embedding"]
        full = self.full if self.recipe.drift else None
        self.pairs = collect_pairs(model, full, self.job.inputs, asked, self.masses) if asked else {}
        if self.recipe.descent and asked:
            self.statistics = collect_loss_statistics(
                self.full,
                self.job.inputs,
                asked,
                held_out=held_out_samples(self.job.inputs),
                rows_up_to=ROWS_UP_TO if self.recipe.fisher else 0,
                draws=2,
                seed=self.job.seed,
            )

    def solve(
        self, model: nn.Module, members: Sequence[LayerSpec], weights: list[Tensor], generator: torch.Generator
    ) -> Solved:
        spec, options = members[0], self.job.options
        code = planned_code(self.plan, spec)
        pairs = self.pairs.get(spec.group)
        if spec.kind == "embedding":
            moment = torch.eye(spec.columns) if pairs is None else tied_moment(pairs.whole.moment)
            rows = [row_weights_of(spec, weight) for weight in weights]
            return Solved(quantize_group(weights, moment.to(weights[0]), code, options, generator, rows))
        assert pairs is not None
        moment = pairs.whole.moment / pairs.whole.mass
        if not self.recipe.drift:
            return Solved(self._coded(members, weights, moment, code, generator))
        stacked = torch.cat(weights)
        shift = gated_shift(stacked, pairs, self._expected_error(stacked, moment, code, generator))
        targets = list((stacked + shift.value).split([len(w) for w in weights]))
        group = self._coded(members, targets, moment, code, generator)
        return Solved(group, self._biases(model, members, weights, group, pairs), shift.step)

    def _coded(
        self,
        members: Sequence[LayerSpec],
        targets: list[Tensor],
        moment: Tensor,
        code: VQCode,
        generator: torch.Generator,
    ) -> VQGroup:
        """The sweep's codes, or descent's where they lose less by the gradients of samples it has not seen."""
        options = self.job.options
        if not self.recipe.descent:
            return quantize_group(targets, moment, code, options, generator)
        problem = stack_group(targets, moment, code, searches_paths=True)
        swept = solve_problem(problem, code, options, generator)
        damped = factor_moment(problem.moment, problem.columns, code.vector, options.damping).damped
        refined = refine(problem, swept, code, damped, self._row_factors(members), Descent(sweeps=2), rounds=1)
        groups = [pack_group(problem, found.indices, found.table, found.scales, code) for found in (swept, refined)]
        return min(groups, key=lambda group: self._held_out_loss(members, targets, group))

    def _row_factors(self, members: Sequence[LayerSpec]) -> list[Tensor] | None:
        rows = self.statistics.rows
        if not any(spec.name in rows for spec in members):
            return None
        return [damp(rows.get(spec.name, torch.eye(spec.rows)), ROW_DAMPING) for spec in members]

    def _held_out_loss(self, members: Sequence[LayerSpec], targets: Sequence[Tensor], group: VQGroup) -> float:
        """E_b⟨G_b, E⟩² over the probes: the gate between a descent that helps and one that fits (equation 16)."""
        products = [
            [probe.product(target - stored.decode().to(target)) for probe in self.statistics.probes[spec.name]]
            for spec, target, stored in zip(members, targets, group.layers)
        ]
        return float(torch.tensor(products, dtype=torch.float64).sum(dim=0).square().mean())

    def _expected_error(self, weight: Tensor, moment: Tensor, code: VQCode, generator: torch.Generator) -> float:
        """tr(E H Eᵀ) that coding without a shift would leave, from a dry run in the code's stand-in."""
        fork = torch.Generator(generator.device)
        fork.set_state(generator.get_state())
        return expected_loss(weight, moment, code, self.job.options, fork)

    def _biases(
        self,
        model: nn.Module,
        members: Sequence[LayerSpec],
        weights: Sequence[Tensor],
        group: VQGroup,
        pairs: PairMoments,
    ) -> dict[str, Tensor]:
        """b + E[W x_f − Ŵ x_q] of the layers that have a bias (mgvq-algorithm 4.6)."""
        if not self.recipe.bias:
            return {}
        full_mean, mean = (m / pairs.whole.mass for m in (pairs.whole.full_mean, pairs.whole.mean))
        found = {}
        for spec, weight, stored in zip(members, weights, group.layers):
            bias = getattr(model.get_submodule(spec.name), "bias", None)
            if bias is not None:
                corrected = bias.detach().float() + weight @ full_mean - stored.decode().to(weight) @ mean
                found[spec.name] = corrected.to(self.job.kept_dtype).float()
        return found
