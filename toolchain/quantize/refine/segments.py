"""K-segments as steps of the line: groups that may be cut, what a plan may choose there, columns sorted for cuts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor

from toolchain.calibration.activations import Masses, Survey, collect_pairs
from toolchain.checkpoint.permuted import deal_model
from toolchain.checkpoint.rotated import rotate_model, turn_model_back
from toolchain.quantize.driver.sequence import group_generator
from toolchain.quantize.mgvq.bit_plan import offered_codes, plan_for_losses
from toolchain.quantize.mgvq.proxy import STAND_INS, quick
from toolchain.quantize.mgvq.run import MgvqRun
from toolchain.quantize.mgvq.sensitivity import MeasuredGroup, Sensitivity, UnitMeasure
from toolchain.quantize.refine.rotation import Rotations
from toolchain.quantize.refine.segment_orders import (
    Ranking,
    composed,
    cut_orders,
    energies_now,
    groups_to_cut,
    rank_columns,
)
from toolchain.quantize.refine.segment_planning import GroupLosses, Planner
from toolchain.quantize.refine.segmentation import unit_widths
from toolchain.quantize.refine.unit_losses import RankedGroup, measure_units
from toolchain.values import BitPlan, LayerSpec, VQCode


@dataclass(frozen=True)
class Segments:
    """Free order → its ranking, and group → the ranking its columns have, of the groups that may be cut there."""

    free: Mapping[str, Ranking] = field(default_factory=dict)
    groups: Mapping[str, Ranking] = field(default_factory=dict)


def find_segments(run: MgvqRun, survey: Survey, orders: Mapping[str, Tensor], rotations: Rotations) -> Segments:
    """What may be cut, no rotated layer among it; nothing without the recipe's part, or with nothing to choose."""
    if not (run.recipe.segments and run.has_choice):
        return Segments()
    job, now = run.job, _energies(run, survey, orders)
    free = _rankings(run, now, rotations)
    return Segments(free, groups_to_cut(_unrotated(run, rotations), free, now, job.options.segment_spread))


def unit_measure(run: MgvqRun, segments: Segments) -> UnitMeasure | None:
    """What the stage of sensitivity is to ask of the groups that may be cut; None where none may."""
    if not segments.groups:
        return None
    job = run.job
    ranks = {group: one.banded(unit_widths(len(one.order)), run.recipe.deal) for group, one in segments.groups.items()}
    lengths = sorted({VQCode.parse(code).vector for code in offered_codes(run.recipe)})
    stand_ins = [STAND_INS[vector] for vector in lengths]

    def measure(case: MeasuredGroup, total: float) -> dict[str, Any] | None:
        if case.group not in ranks:
            return None
        ranked = RankedGroup(case.weights, case.moments, case.probes, ranks[case.group])
        generator = partial(group_generator, job.seed, case.group)
        return asdict(measure_units(ranked, stand_ins, total, quick(job.options), generator))

    return measure


def offer_segments(
    run: MgvqRun, masses: Masses, segments: Segments, sensitivity: Sensitivity | None
) -> Sensitivity | None:
    """The sensitivity with the segmentations that a plan may choose, kept in the store."""
    if sensitivity is None or not segments.groups:
        return sensitivity

    def make() -> tuple[dict[str, Tensor], GroupLosses]:
        planner = Planner(
            sensitivity,
            segments.groups,
            partial(_weights_and_moment, run, masses),
            partial(plan_for_losses, run),
            run.job.options,
            partial(group_generator, run.job.seed),
            run.recipe.deal,
        )
        return {}, planner.confirmed()

    return replace(sensitivity, segmented=run.store.made("segments", make)[1])


def sort_columns(
    run: MgvqRun,
    survey: Survey,
    orders: Mapping[str, Tensor],
    rotations: Rotations,
    segments: Segments,
    plan: BitPlan,
) -> dict[str, Tensor]:
    """The permutations with the columns of every layer that the plan cuts sorted too; folded into the model.

    A rotated layer's columns are no inputs, so it is turned back for as long.
    """
    free = segments.free or _rankings(run, _energies(run, survey, orders), rotations)
    then = cut_orders(free, plan, run.recipe.deal)
    if then:
        turn_model_back(run.job.model, rotations.blocks)
        deal_model(run.job.model, run.job.family, run.job.config, then)
        rotate_model(run.job.model, rotations.blocks)
    return composed(orders, then)


def _weights_and_moment(run: MgvqRun, masses: Masses, group: str) -> tuple[list[Tensor], Tensor]:
    job = run.job
    members = [spec for spec in job.specs if spec.group == group]
    weights = [job.model.get_parameter(f"{spec.name}.weight").detach().flatten(1).float() for spec in members]
    return weights, collect_pairs(job.model, None, job.inputs, members, masses)[group].whole.moment


def _energies(run: MgvqRun, survey: Survey, orders: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return energies_now(run.job.family, run.job.config, run.job.specs, survey.energies, orders)


def _rankings(run: MgvqRun, energies: Mapping[str, Tensor], rotations: Rotations) -> dict[str, Ranking]:
    job = run.job
    return rank_columns(job.model, job.family, job.config, _unrotated(run, rotations), energies)


def _unrotated(run: MgvqRun, rotations: Rotations) -> list[LayerSpec]:
    return [spec for spec in run.job.specs if spec.name not in rotations.blocks]
