"""K-segments as steps of the line: groups that may be cut, what a plan may choose there, columns sorted for cuts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor

from toolchain.calibration.activations import Survey, TokenWeights, collect_pairs
from toolchain.checkpoint.permuted import permute_model
from toolchain.checkpoint.rotated import inverse_rotate_model, rotate_model
from toolchain.quantize.driver.sequence import dense_weight, group_generator
from toolchain.quantize.mgvq.bit_plan import offered_codes, plan_for_losses
from toolchain.quantize.mgvq.proxy import PROXY_CODES, quick
from toolchain.quantize.mgvq.run import MgvqRun
from toolchain.quantize.mgvq.sensitivity import MeasuredGroup, Sensitivity, UnitMeasure
from toolchain.quantize.refine.rotation import Rotations
from toolchain.quantize.refine.segment_permutations import (
    Ranking,
    composed,
    groups_to_cut,
    permuted_energies,
    rank_columns,
    segment_permutations,
)
from toolchain.quantize.refine.segment_planning import GroupLosses, Planner
from toolchain.quantize.refine.segmentation import unit_widths
from toolchain.quantize.refine.unit_losses import RankedGroup, measure_units
from toolchain.values import BitPlan, LayerSpec, VQCode


@dataclass(frozen=True)
class Segments:
    """Free permutation → its ranking, and group → the ranking its columns have, of the groups that may be cut there."""

    free: Mapping[str, Ranking] = field(default_factory=dict)
    groups: Mapping[str, Ranking] = field(default_factory=dict)


def find_segments(run: MgvqRun, survey: Survey, permutations: Mapping[str, Tensor], rotations: Rotations) -> Segments:
    """What may be cut, no rotated layer among it; nothing without the recipe's part, or with nothing to choose."""
    if not (run.recipe.segments and run.has_choice):
        return Segments()
    request, now = run.request, _energies(run, survey, permutations)
    free = _rankings(run, now, rotations)
    return Segments(free, groups_to_cut(_unrotated(run, rotations), free, now, request.options.segment_spread))


def unit_measure(run: MgvqRun, segments: Segments) -> UnitMeasure | None:
    """What the stage of sensitivity is to ask of the groups that may be cut; None where none may."""
    if not segments.groups:
        return None
    request = run.request
    ranks = {
        group: one.banded(unit_widths(len(one.order)), run.recipe.interleave) for group, one in segments.groups.items()
    }
    lengths = sorted({VQCode.parse(code).vector for code in offered_codes(run.recipe)})
    proxy_codes = [PROXY_CODES[vector] for vector in lengths]

    def measure(case: MeasuredGroup, total: float) -> dict[str, Any] | None:
        if case.group not in ranks:
            return None
        ranked = RankedGroup(case.weights, case.moments, case.gradient_samples, ranks[case.group])
        generator = partial(group_generator, request.seed, case.group)
        return asdict(measure_units(ranked, proxy_codes, total, quick(request.options), generator))

    return measure


def offer_segments(
    run: MgvqRun, token_weights: TokenWeights, segments: Segments, sensitivity: Sensitivity | None
) -> Sensitivity | None:
    """The sensitivity with the segmentations that a plan may choose, kept in the store."""
    if sensitivity is None or not segments.groups:
        return sensitivity

    def make() -> tuple[dict[str, Tensor], GroupLosses]:
        planner = Planner(
            sensitivity,
            segments.groups,
            partial(_weights_and_moment, run, token_weights),
            partial(plan_for_losses, run),
            run.request.options,
            partial(group_generator, run.request.seed),
            run.recipe.interleave,
        )
        return {}, planner.confirmed()

    return replace(sensitivity, segmented=run.store.get_or_make("segments", make)[1])


def sort_columns(
    run: MgvqRun,
    survey: Survey,
    permutations: Mapping[str, Tensor],
    rotations: Rotations,
    segments: Segments,
    plan: BitPlan,
) -> dict[str, Tensor]:
    """The permutations with the columns of every layer that the plan cuts sorted too; folded into the model.

    A rotated layer's columns are no inputs, so it is turned back for as long.
    """
    free = segments.free or _rankings(run, _energies(run, survey, permutations), rotations)
    then = segment_permutations(free, plan, run.recipe.interleave)
    if then:
        inverse_rotate_model(run.request.model, rotations.blocks)
        permute_model(run.request.model, run.request.family, run.request.config, then)
        rotate_model(run.request.model, rotations.blocks)
    return composed(permutations, then)


def _weights_and_moment(run: MgvqRun, token_weights: TokenWeights, group: str) -> tuple[list[Tensor], Tensor]:
    request = run.request
    members = [spec for spec in request.specs if spec.group == group]
    weights = [dense_weight(request.model, spec) for spec in members]
    return weights, collect_pairs(request.model, None, request.inputs, members, token_weights)[group].whole.moment


def _energies(run: MgvqRun, survey: Survey, permutations: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return permuted_energies(run.request.family, run.request.config, run.request.specs, survey.energies, permutations)


def _rankings(run: MgvqRun, energies: Mapping[str, Tensor], rotations: Rotations) -> dict[str, Ranking]:
    request = run.request
    return rank_columns(request.model, request.family, request.config, _unrotated(run, rotations), energies)


def _unrotated(run: MgvqRun, rotations: Rotations) -> list[LayerSpec]:
    return [spec for spec in run.request.specs if spec.name not in rotations.blocks]
