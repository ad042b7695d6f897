"""Stage 4: a code for every group, so that the losses add up to the least within the bits or bytes asked for."""

from __future__ import annotations

from collections.abc import Mapping

from toolchain.bits.allocation import CODES_BY_BITS, OVERLAPPING_BY_BITS
from toolchain.quantize.driver.request import plan_request
from toolchain.quantize.mgvq.recipe import Recipe
from toolchain.quantize.mgvq.run import MgvqRun
from toolchain.quantize.mgvq.sensitivity import Sensitivity
from toolchain.values import BitPlan

# At 2 bits quads with one window bit to spare stand beside pairs with four: the better one depends on how evenly
# column energies lie.
CODES_OFFERED = (*OVERLAPPING_BY_BITS.values(), "4,8,9")


def offered_codes(recipe: Recipe) -> tuple[str, ...]:
    """The codes that a plan chooses among."""
    return CODES_OFFERED if recipe.overlap else tuple(CODES_BY_BITS.values())


def plan_model(run: MgvqRun, sensitivity: Sensitivity | None) -> BitPlan:
    """The plan under the request's limit, by the measured losses; one rate for all where nothing was measured."""
    if sensitivity is None:
        return plan_for_losses(run, None)
    single = sensitivity.losses(run.request.options.modalities)
    losses = {group: one | sensitivity.segmented.get(group, {}) for group, one in single.items()}
    return plan_for_losses(run, losses)


def plan_for_losses(run: MgvqRun, losses: Mapping[str, Mapping[str, float]] | None) -> BitPlan:
    """The plan under the request's limit for these losses, group → code or segments → loss."""
    return plan_request(run.request, losses=losses, overlapping=run.recipe.overlap, codebooks=run.recipe.codebooks)
