"""Plans whose groups may be in K-segments: offered by what units lose, confirmed by a proxy quantization before they
are taken.

A segmentation's offered loss is pieced together from proxy quantizations in one code over all columns (`unit_losses`).
Those that a plan picks are run as they are, with a codebook and row scales a segment, and their losses corrected; then
the plan is made again, until it picks only what was confirmed. Single codes are known by proxy codes, which foretell
too much where codebooks fit few vectors well; a confirmed loss is put in their currency, or cuts would be picked for
being run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from toolchain.quantize.mgvq.proxy import GAUSSIAN_ERROR, PROXY_CODES, proxy_segments, quick
from toolchain.quantize.mgvq.sensitivity import Sensitivity
from toolchain.quantize.refine.segment_permutations import Ranking
from toolchain.quantize.refine.segmentation import segment_units, segmented_losses
from toolchain.values import CODES, BitPlan, VQCode, parse_format
from toolchain.vq.weights import Options

ATTEMPTS = 4  # plans made while they pick what is not confirmed; after them only what is may be picked

GroupLosses = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Planner:
    """What segmentations are planned with.

    weights: group → (weights float32[m_i, n] of its layers, H float32[n, n]), columns as the model has them.
    plan: losses → the plan under the request's limit.
    """

    sensitivity: Sensitivity
    rankings: Mapping[str, Ranking]
    weights: Callable[[str], tuple[list[Tensor], Tensor]]
    plan: Callable[[GroupLosses], BitPlan]
    options: Options
    generator: Callable[[str], torch.Generator]
    interleaves: bool

    def confirmed(self) -> GroupLosses:
        """Group → segments → loss, of all that was picked and run; a plan may choose among these and single codes."""
        single = self.sensitivity.losses(self.options.modalities)
        offered = {group: self.offered(group, single[group]) for group in self.rankings}
        known: GroupLosses = {group: {} for group in self.rankings}
        for _ in range(ATTEMPTS):
            plan = self.plan(
                {group: one | offered.get(group, {}) | known.get(group, {}) for group, one in single.items()}
            )
            picked = {(x.group, x.code) for x in plan.layers if x.segments and x.group in known}
            new = sorted((group, text) for group, text in picked if text not in known[group])
            if not new:
                break
            for group, text in new:
                known[group][text] = self.confirm(group, text, single[group])
        return known

    def offered(self, group: str, single: Mapping[str, float]) -> dict[str, float]:
        """Segments → loss, by what the units lose."""
        units = self.sensitivity.units[group]["losses"]

        def loss(code: str, unit: int) -> float:
            return units[_proxy_code(code)][unit] * _ratio(code)

        return segmented_losses(len(self.rankings[group].order), single, loss, single)

    def confirm(self, group: str, text: str, single: Mapping[str, float]) -> float:
        """The loss of a segmentation, each segment's corrected by what a proxy quantization of it loses of the group's
        output.

        Args:
            single: code → loss of the group in that code, as the plan has it; the one nearest in rate is run too, and
                what the plan has over what the run says multiplies the result.
        """
        weights, moment = self.weights(group)
        near = _nearest(text, len(moment), single)
        believed, ran = single[near], self._run(group, near, weights, moment)
        return self._run(group, text, weights, moment) * (believed / ran if ran > 0 else 1.0)

    def _run(self, group: str, text: str, weights: list[Tensor], moment: Tensor) -> float:
        """The loss of a format by a proxy quantization of it: what each segment loses, times what its units make of
        that.
        """
        columns = len(moment)
        order = self.rankings[group].banded([s.columns for s in parse_format(text, columns)], self.interleaves)
        ordered = [weight[:, order] for weight in weights]
        lost = proxy_segments(ordered, moment[order][:, order], text, quick(self.options), self.generator(group))
        units = self.sensitivity.units[group]
        total = 0.0
        for (code, own), segment_lost in zip(segment_units(text, columns), lost, strict=True):
            proxy_code = _proxy_code(str(code))
            omega, local = (sum(units[key][proxy_code][unit] for unit in own) for key in ("losses", "local"))
            total += omega * segment_lost / (units["reference"] * local) if local > 0 else 0.0
        return total


def _nearest(text: str, columns: int, codes: Iterable[str]) -> str:
    """The code whose rate is nearest the format's mean one."""
    bits = sum(s.columns * s.code.index_bits for s in parse_format(text, columns)) / columns
    return min(codes, key=lambda code: (abs(CODES[code].index_bits - bits), code))


def _proxy_code(code: str) -> str:
    return str(PROXY_CODES[VQCode.parse(code).vector])


def _ratio(code: str) -> float:
    """A code's error over its proxy code's."""
    return GAUSSIAN_ERROR[code] / GAUSSIAN_ERROR[_proxy_code(code)]
