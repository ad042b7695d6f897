"""MGVQ over a whole model: deal the columns, weigh the groups, plan the bits, sweep with drift, then mend the whole.

Each stage can be left out by the recipe; each is kept in the store, so that a killed run goes on where it was.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from toolchain.bit_allocation import CODES_BY_BITS, OVERLAPPING_BY_BITS
from toolchain.bitplan import plan as plan_bits
from toolchain.mgvq.dealing import (
    Ranking,
    composed,
    cut_orders,
    deal_model,
    energies_now,
    groups_to_cut,
    measured_orders,
    rank_columns,
)
from toolchain.mgvq.drift_solver import DriftSolver, row_weights_of
from toolchain.mgvq.held_out import gate_samples
from toolchain.mgvq.job import Job
from toolchain.mgvq.mending import Watch, mend_by_rounds, mend_by_tuning
from toolchain.mgvq.moments import Masses, Survey, collect_pairs, survey_inputs
from toolchain.mgvq.part_tables import train_part_tables
from toolchain.mgvq.recipe import Recipe
from toolchain.mgvq.rotation_choice import Trial, rotated_layers, trials_json, try_rotations
from toolchain.mgvq.segment_planning import GroupLosses, Planner
from toolchain.mgvq.segmentation import unit_widths
from toolchain.mgvq.sensitivity import Sensitivity, measure_sensitivity
from toolchain.mgvq.statistics import collect_loss_statistics
from toolchain.models.inventory import kept_parameters
from toolchain.objects import ObjectStore
from toolchain.rotated import rotate_model, turn_model_back
from toolchain.sequence import LayerResult, Progress, group_generator, quantize_in_sequence
from toolchain.table_sharing import PART, UNIVERSAL
from toolchain.values import BitPlan, LayerSpec
from toolchain.vq.universal import universal_tables

# At 2 bits quads with one window bit to spare stand beside pairs with four: the better one depends on how evenly
# column energies lie.
CODES_OFFERED = (*OVERLAPPING_BY_BITS.values(), "4,8,9")


@dataclass(frozen=True)
class Made:
    """The quantized model, its plan, how its layers came out, the column orders, and what the plan was made from."""

    model: nn.Module
    plan: BitPlan
    layers: tuple[LayerResult, ...]
    orders: dict[str, Tensor]
    sensitivity: Sensitivity | None
    mended: dict[str, Any] = field(default_factory=dict)  # what rounds and fine-tuning did, JSON-clean
    rotations: dict[str, Trial] = field(default_factory=dict)  # group → dry runs, plain and with rotated inputs


def quantize_model(
    job: Job, recipe: Recipe, store: ObjectStore, progress: Progress | None = None, watch: Watch | None = None
) -> Made:
    """The job done by the recipe's parts."""
    say = watch or (lambda what, done, total: None)
    if recipe.tables == UNIVERSAL:
        job = replace(job, options=replace(job.options, tables=universal_tables()))
    full = job.model.requires_grad_(False)
    linears = [spec for spec in job.specs if spec.kind != "embedding"]
    cap = job.options.norm_quantile if recipe.caps else None
    survey = survey_inputs(full, job.inputs, linears, lambda done, total: say("survey", done, total), cap)
    orders = _dealt(job, recipe, survey.energies)
    masses = _masses(job, recipe, linears, survey, say)
    trials = _trials(job, recipe, store, masses, say)
    blocks = rotated_layers(job.specs, trials)
    rotate_model(job.model, blocks)
    ranks = _ranks(job, recipe, survey.energies, orders, blocks)
    sensitivity = _sensitivity(job, recipe, store, masses, ranks, say)
    sensitivity = _segmented(job, recipe, store, masses, ranks, sensitivity)
    plan = with_rotations(_plan(job, recipe, sensitivity), blocks)
    free = ranks.free or _rankings(job, survey.energies, orders, blocks)
    then = cut_orders(free, plan, recipe.deal)
    _deal_again(job, then, blocks)
    orders = composed(orders, then)
    tables = train_part_tables(job, plan, masses, store, say) if recipe.tables == PART else {}
    quantized = copy.deepcopy(full)
    solver = DriftSolver(job, recipe, plan, full, masses, tables)
    layers = quantize_in_sequence(quantized, job.specs, plan, solver, store, job.seed, progress)
    mended: dict[str, Any] = {}
    if recipe.rounds:
        mended["rounds"] = mend_by_rounds(job, recipe, quantized, plan, masses, store, say)
    if recipe.tune:
        mended["tune"] = mend_by_tuning(job, recipe, quantized, store, say)
    return Made(quantized, plan, layers, orders, sensitivity, mended, trials)


def _dealt(job: Job, recipe: Recipe, energies: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Orders, folded into the model; none without the recipe's part."""
    if not recipe.deal:
        return {}
    orders = measured_orders(job.family, job.config, job.specs, energies)
    deal_model(job.model, job.family, job.config, orders)
    return orders


def _masses(job: Job, recipe: Recipe, linears: Sequence[LayerSpec], survey: Survey, say: Watch) -> Masses:
    """Token masses: by the loss gradient where the recipe and the options say so, else every modality alike; those of
    attention sinks capped where the recipe says so.
    """
    if not recipe.fisher:
        return survey.masses
    found = collect_loss_statistics(
        job.model,
        job.inputs,
        linears,
        seed=job.seed,
        power=job.options.token_power,
        progress=lambda done, total: say("gradients", done, total),
    ).masses
    return survey.capped(found, job.options.norm_quantile) if recipe.caps else found


def _trials(job: Job, recipe: Recipe, store: ObjectStore, masses: Masses, say: Watch) -> dict[str, Trial]:
    """Dry runs with rotated inputs, kept in the store; none without the recipe's part."""
    if not recipe.rotate:
        return {}

    def make() -> tuple[dict[str, Tensor], dict]:
        found = try_rotations(job, masses, _offered(recipe), lambda done, total: say("rotations", done, total))
        return {}, trials_json(found)

    return {group: Trial(**trial) for group, trial in store.made("rotations", make)[1].items()}


def _offered(recipe: Recipe) -> tuple[str, ...]:
    """The codes that a plan chooses among."""
    return CODES_OFFERED if recipe.overlap else tuple(CODES_BY_BITS.values())


def with_rotations(plan: BitPlan, blocks: Mapping[str, int]) -> BitPlan:
    """The plan with the block that each layer's inputs are rotated in."""
    layers = tuple(replace(layer, rotation=blocks.get(layer.name, 0)) for layer in plan.layers)
    return replace(plan, layers=layers)


def _deal_again(job: Job, orders: Mapping[str, Tensor], blocks: Mapping[str, int]) -> None:
    """Fold further orders in: a rotated layer's columns are no inputs, so it is turned back for as long."""
    if orders:
        turn_model_back(job.model, blocks)
        deal_model(job.model, job.family, job.config, orders)
        rotate_model(job.model, blocks)


@dataclass(frozen=True)
class Ranks:
    """Free order → its ranking, and group → the ranking its columns have, of the groups that may be cut there."""

    free: dict[str, Ranking] = field(default_factory=dict)
    groups: dict[str, Ranking] = field(default_factory=dict)


def _ranks(
    job: Job,
    recipe: Recipe,
    energies: Mapping[str, Tensor],
    orders: Mapping[str, Tensor],
    rotated: Collection[str],
) -> Ranks:
    """What may be cut, none of the layers `rotated` among it; nothing without the recipe's part, or where there is
    nothing to plan for.
    """
    if not (recipe.segments and recipe.mix) or (job.bits is None and job.budget_bytes is None):
        return Ranks()
    free = _rankings(job, energies, orders, rotated)
    now = energies_now(job.family, job.config, job.specs, energies, orders)
    return Ranks(free, groups_to_cut(_unrotated(job, rotated), free, now))


def _rankings(
    job: Job, energies: Mapping[str, Tensor], orders: Mapping[str, Tensor], rotated: Collection[str]
) -> dict[str, Ranking]:
    now = energies_now(job.family, job.config, job.specs, energies, orders)
    return rank_columns(job.model, job.family, job.config, _unrotated(job, rotated), now)


def _unrotated(job: Job, rotated: Collection[str]) -> list[LayerSpec]:
    return [spec for spec in job.specs if spec.name not in rotated]


def _sensitivity(
    job: Job, recipe: Recipe, store: ObjectStore, masses: Masses, ranks: Ranks, say: Watch
) -> Sensitivity | None:
    """Losses to plan by, kept in the store; None where nothing is left to choose."""
    if not recipe.mix or (job.bits is None and job.budget_bytes is None):
        return None

    def make() -> tuple[dict[str, Tensor], dict]:
        found = measure_sensitivity(
            job.model,
            job.inputs,
            job.specs,
            masses,
            _offered(recipe),
            held_out=gate_samples(job.inputs),
            row_weights=row_weights_of,
            ranks={group: one.banded(unit_widths(len(one.order)), recipe.deal) for group, one in ranks.groups.items()},
            seed=job.seed,
            options=job.options,
            watch=lambda done, total: say("sensitivity", done, total),
        )
        return {}, vars(found)

    return Sensitivity(**store.made("sensitivity", make)[1])


def _segmented(
    job: Job, recipe: Recipe, store: ObjectStore, masses: Masses, ranks: Ranks, sensitivity: Sensitivity | None
) -> Sensitivity | None:
    """The sensitivity with the segmentations that a plan may choose, kept in the store."""
    if sensitivity is None or not ranks.groups:
        return sensitivity

    def make() -> tuple[dict[str, Tensor], GroupLosses]:
        members = {group: [spec for spec in job.specs if spec.group == group] for group in ranks.groups}

        def weights(group: str) -> tuple[list[Tensor], Tensor]:
            own = [
                job.model.get_parameter(f"{spec.name}.weight").detach().flatten(1).float() for spec in members[group]
            ]
            pairs = collect_pairs(job.model, None, job.inputs, members[group], masses)
            return own, pairs[group].whole.moment

        planner = Planner(
            sensitivity,
            ranks.groups,
            weights,
            lambda losses: _planned(job, recipe, losses),
            job.options,
            lambda group: group_generator(job.seed, group),
            recipe.deal,
        )
        return {}, planner.confirmed()

    return replace(sensitivity, segmented=store.made("segments", make)[1])


def _plan(job: Job, recipe: Recipe, sensitivity: Sensitivity | None) -> BitPlan:
    if sensitivity is None:
        return _planned(job, recipe, None)
    single = sensitivity.losses(job.options.modalities)
    return _planned(job, recipe, {group: one | sensitivity.segmented.get(group, {}) for group, one in single.items()})


def _planned(job: Job, recipe: Recipe, losses: GroupLosses | None) -> BitPlan:
    return plan_bits(
        job.specs,
        kept_parameters(job.model, job.specs),
        bits=job.bits,
        budget_bytes=job.budget_bytes,
        overrides=job.overrides,
        losses=losses,
        overlapping=recipe.overlap,
        tables=recipe.tables,
    )
