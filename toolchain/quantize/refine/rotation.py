"""Which groups are coded for rotated inputs: those that proxy quantizations of both forms say lose enough less.

A rotation helps where weights are heavy-tailed, or where no order of the columns is free. Elsewhere interleaved columns
do
better: they let a high-energy column have more of its vector's bits, which a rotation takes away (mgvq-algorithm 3.6,
4.7). It costs a product of 64 columns with their block, and a launch, whenever the layer runs (`roofline`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from toolchain.calibration.activations import TokenWeights, collect_pairs
from toolchain.checkpoint.rotated import rotate_model
from toolchain.quantize.driver.request import QuantizationRequest
from toolchain.quantize.driver.sequence import dense_weight, group_generator
from toolchain.quantize.mgvq.bit_plan import offered_codes
from toolchain.quantize.mgvq.proxy import expected_loss
from toolchain.quantize.mgvq.run import MgvqRun
from toolchain.quantize.mgvq.sensitivity import moment_batches
from toolchain.values import SILENT, BitPlan, LayerSpec, Progress, VQCode, groups_of
from toolchain.vq.rotation import block_of, rotate, rotate_moment
from toolchain.vq.segments import weighted_square


@dataclass(frozen=True)
class Trial:
    """tr(E H Eᵀ) / tr(W H Wᵀ) of a group at 2 bits by proxy quantizations, plain and rotated, and the block it is
    rotated in: 0 where that does not pay.
    """

    plain: float
    rotated: float
    block: int


@dataclass(frozen=True)
class Rotations:
    """Group → its trial, of the groups that were tried; layer → the block its inputs are rotated in, 0 left out."""

    trials: Mapping[str, Trial] = field(default_factory=dict)
    blocks: Mapping[str, int] = field(default_factory=dict)

    def on(self, plan: BitPlan) -> BitPlan:
        """The plan with the block that each layer's inputs are rotated in."""
        layers = tuple(replace(layer, rotation=self.blocks.get(layer.name, 0)) for layer in plan.layers)
        return replace(plan, layers=layers)


def choose_rotations(run: MgvqRun, token_weights: TokenWeights) -> Rotations:
    """The rotations that pay, put into the model; trials are kept in the store. None without the recipe's part."""
    if not run.recipe.rotate:
        return Rotations()

    def make() -> tuple[dict[str, Tensor], dict]:
        return {}, trials_json(try_rotations(run.request, token_weights, offered_codes(run.recipe), run.progress))

    trials = {group: Trial(**trial) for group, trial in run.store.get_or_make("rotations", make)[1].items()}
    blocks = rotated_layers(run.request.specs, trials)
    rotate_model(run.request.model, blocks)
    return Rotations(trials, blocks)


def try_rotations(
    request: QuantizationRequest, token_weights: TokenWeights, codes: Sequence[str], progress: Progress = SILENT
) -> dict[str, Trial]:
    """Group → its trial, of the groups whose inputs can be rotated: untied linears of whole blocks of columns that no
    override cuts into segments.

    Args:
        codes: what the plan will choose among; those of 2 bits are compared.
    """
    asked = [spec for spec in request.specs if spec.group in _rotatable(request)]
    pairs = [VQCode.parse(code) for code in codes if VQCode.parse(code).index_bits == 2]
    found: dict[str, Trial] = {}
    done = 0
    for layer_batch in moment_batches(asked):
        moments = collect_pairs(request.model, None, request.inputs, layer_batch, token_weights)
        for group, members in groups_of(layer_batch).items():
            weights = [dense_weight(request.model, spec) for spec in members]
            found[group] = _trial(weights, moments[group].whole.moment, pairs, request, group)
            done += len(members)
            progress.step(done, len(asked), "rotations")
    return found


def rotated_layers(specs: Sequence[LayerSpec], trials: Mapping[str, Trial]) -> dict[str, int]:
    """Layer → its block, of the groups that are to be rotated."""
    return {spec.name: trials[spec.group].block for spec in specs if spec.group in trials and trials[spec.group].block}


def trials_json(trials: Mapping[str, Trial]) -> dict[str, dict[str, float]]:
    """Group → {"plain", "rotated", "block"}."""
    return {group: asdict(trial) for group, trial in trials.items()}


def _rotatable(request: QuantizationRequest) -> set[str]:
    tied = {name for spec in request.specs if spec.tied_to for name in (spec.name, spec.tied_to)}
    cut = [pattern for pattern, code in request.overrides if "+" in code]
    return {
        group
        for group, members in groups_of(request.specs).items()
        if all(s.kind == "linear" and s.name not in tied and block_of(s.columns) for s in members)
        and not any(fnmatchcase(s.name, pattern) for s in members for pattern in cut)
    }


def _trial(
    weights: list[Tensor], moment: Tensor, codes: Sequence[VQCode], request: QuantizationRequest, group: str
) -> Trial:
    stacked = torch.cat(weights)
    block, whole = block_of(stacked.shape[1]), weighted_square(stacked, moment)

    def least(weight: Tensor, own: Tensor) -> float:
        """The least share of the output energy that any of the codes would lose."""
        generators = [group_generator(request.seed, group) for _ in codes]
        losses = [expected_loss(weight, own, str(c), request.options, g) for c, g in zip(codes, generators)]
        return min(losses) / whole if whole > 0 else 0.0

    plain, rotated = least(stacked, moment), least(rotate(stacked, block), rotate_moment(moment, block))
    return Trial(plain, rotated, block if rotated < request.options.rotation_gain * plain else 0)
