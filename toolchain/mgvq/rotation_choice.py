"""Which groups are coded for rotated inputs: those that dry runs of both forms say lose enough less.

A rotation helps where weights are heavy-tailed, or where no order of the columns is free. Elsewhere dealt columns do
better: they let a loud column have more of its vector's bits, which a rotation takes away (mgvq-algorithm 3.6, 4.7).
It costs a product of 64 columns with their block, and a launch, whenever the layer runs (`roofline`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from toolchain.mgvq.dry_runs import expected_loss
from toolchain.mgvq.job import Job
from toolchain.mgvq.moments import Masses, collect_pairs
from toolchain.mgvq.sensitivity import moment_stretches
from toolchain.sequence import group_generator, groups_of
from toolchain.values import LayerSpec, VQCode
from toolchain.vq.rotation import block_of, rotate, rotate_moment
from toolchain.vq.segments import weighted_square

# A rotated layer must lose at most this share of what the plain one loses.
LEAST_GAIN = 0.9


@dataclass(frozen=True)
class Trial:
    """tr(E H Eᵀ) / tr(W H Wᵀ) of a group at 2 bits by dry runs, plain and rotated, and the block it is rotated in: 0
    where that does not pay.
    """

    plain: float
    rotated: float
    block: int


def try_rotations(
    job: Job, masses: Masses, codes: Sequence[str], watch: Callable[[int, int], None] | None = None
) -> dict[str, Trial]:
    """Group → its trial, of the groups whose inputs can be rotated: untied linears of whole blocks of columns that no
    override cuts into segments.

    Args:
        codes: what the plan will choose among; those of 2 bits are compared.
    """
    asked = [spec for spec in job.specs if spec.group in _rotatable(job)]
    pairs = [VQCode.parse(code) for code in codes if VQCode.parse(code).index_bits == 2]
    found: dict[str, Trial] = {}
    done = 0
    for stretch in moment_stretches(asked):
        moments = collect_pairs(job.model, None, job.inputs, stretch, masses)
        for group, members in groups_of(stretch).items():
            weights = [job.model.get_parameter(f"{s.name}.weight").detach().flatten(1).float() for s in members]
            found[group] = _trial(weights, moments[group].whole.moment, pairs, job, group)
            done += len(members)
            if watch:
                watch(done, len(asked))
    return found


def rotated_layers(specs: Sequence[LayerSpec], trials: Mapping[str, Trial]) -> dict[str, int]:
    """Layer → its block, of the groups that are to be rotated."""
    return {spec.name: trials[spec.group].block for spec in specs if spec.group in trials and trials[spec.group].block}


def trials_json(trials: Mapping[str, Trial]) -> dict[str, dict[str, float]]:
    """Group → {"plain", "rotated", "block"}."""
    return {group: asdict(trial) for group, trial in trials.items()}


def _rotatable(job: Job) -> set[str]:
    tied = {name for spec in job.specs if spec.tied_to for name in (spec.name, spec.tied_to)}
    cut = [pattern for pattern, code in job.overrides if "+" in code]
    return {
        group
        for group, members in groups_of(job.specs).items()
        if all(s.kind == "linear" and s.name not in tied and block_of(s.columns) for s in members)
        and not any(fnmatchcase(s.name, pattern) for s in members for pattern in cut)
    }


def _trial(weights: list[Tensor], moment: Tensor, codes: Sequence[VQCode], job: Job, group: str) -> Trial:
    stacked = torch.cat(weights)
    block, whole = block_of(stacked.shape[1]), weighted_square(stacked, moment)

    def least(weight: Tensor, own: Tensor) -> float:
        """The least share of the output energy that any of the codes would lose."""
        generators = [group_generator(job.seed, group) for _ in codes]
        losses = [expected_loss(weight, own, str(c), job.options, g) for c, g in zip(codes, generators)]
        return min(losses) / whole if whole > 0 else 0.0

    plain, rotated = least(stacked, moment), least(rotate(stacked, block), rotate_moment(moment, block))
    return Trial(plain, rotated, block if rotated < LEAST_GAIN * plain else 0)
