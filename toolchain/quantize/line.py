"""MGVQ over a whole model, as a line of stages with a value between each:

    survey → permutation → sensitivity → bit plan → sweep → refinement

The stages are in `quantize.mgvq`; what is off by default and not the paper's (rotation, K-segments, shared codebooks,
Jacobi rounds, fine-tuning) is in `quantize.refine`, and gives back what it was given unless the recipe has it on.
Stages keep what they have found in the store, so that a killed run goes on where it was.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from toolchain.bits.codebook_sharing import UNIVERSAL
from toolchain.files.store import ObjectStore
from toolchain.quantize.driver.request import QuantizationRequest
from toolchain.quantize.driver.sequence import LayerResult
from toolchain.quantize.mgvq.bit_plan import offered_codes, plan_model
from toolchain.quantize.mgvq.permutation import permute_columns
from toolchain.quantize.mgvq.recipe import Recipe
from toolchain.quantize.mgvq.run import MgvqRun
from toolchain.quantize.mgvq.sensitivity import Sensitivity, weigh_groups
from toolchain.quantize.mgvq.survey import survey_model, weigh_tokens
from toolchain.quantize.mgvq.sweep import sweep_model
from toolchain.quantize.refine.rotation import Trial, choose_rotations
from toolchain.quantize.refine.segments import find_segments, offer_segments, sort_columns, unit_measure
from toolchain.quantize.refine.shared_codebooks import shared_codebooks
from toolchain.quantize.refine.stages import refine_model
from toolchain.values import SILENT, BitPlan, Progress
from toolchain.vq.universal_codebooks import universal_codebooks


@dataclass(frozen=True)
class QuantizedModel:
    """The quantized model, its plan, how its layers came out, the column permutations, and what the plan was made
    from.
    """

    model: nn.Module
    plan: BitPlan
    layers: tuple[LayerResult, ...]
    permutations: dict[str, Tensor]
    sensitivity: Sensitivity | None
    refinement: dict[str, Any] = field(default_factory=dict)  # what rounds and fine-tuning did, JSON-clean
    rotations: dict[str, Trial] = field(
        default_factory=dict
    )  # group → proxy quantizations, plain and with rotated inputs


def quantize_model(
    request: QuantizationRequest, recipe: Recipe, store: ObjectStore, progress: Progress = SILENT
) -> QuantizedModel:
    """The request's model quantized by the recipe's parts. The model is given up: columns are permuted in it."""
    if recipe.codebooks == UNIVERSAL:
        request = replace(request, options=replace(request.options, codebooks=universal_codebooks()))
    request.model.requires_grad_(False)
    run = MgvqRun(request, recipe, store, progress)
    survey = survey_model(run)
    permutations = permute_columns(run, survey)
    token_weights = weigh_tokens(run, survey)
    rotations = choose_rotations(run, token_weights)
    segments = find_segments(run, survey, permutations, rotations)
    sensitivity = weigh_groups(run, token_weights, offered_codes(recipe), unit_measure(run, segments))
    sensitivity = offer_segments(run, token_weights, segments, sensitivity)
    plan = rotations.on(plan_model(run, sensitivity))
    permutations = sort_columns(run, survey, permutations, rotations, segments, plan)
    quantized, layers = sweep_model(run, plan, token_weights, shared_codebooks(run, plan, token_weights))
    refinement = refine_model(run, quantized, plan, token_weights)
    return QuantizedModel(quantized, plan, layers, permutations, sensitivity, refinement, dict(rotations.trials))
