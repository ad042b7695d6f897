"""Columns ranked by sensitivity, and the permutations that K-segments need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from toolchain.models.configs import Config
from toolchain.models.family import Family
from toolchain.models.permutations import column_permutation, combined_energies
from toolchain.quantize.driver.sequence import dense_weight
from toolchain.quantize.refine.segmentation import energy_spread
from toolchain.values import BitPlan, LayerSpec, parse_format
from toolchain.vq.interleave import VECTOR, interleaved_permutation
from toolchain.vq.weights import Options


def permuted_energies(
    family: Family,
    config: Config,
    specs: Sequence[LayerSpec],
    energies: Mapping[str, Tensor],
    permutations: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Group → energies float32[n] of the columns as `permutations` have put them, from those of the columns as they
    were.
    """
    group_of = {spec.name: spec.group for spec in specs if spec.kind != "embedding"}
    found = dict(energies)
    for free in family.free_permutations(config):
        for reader in free.readers:
            group = group_of.get(reader)
            if group is not None and free.name in permutations and group in energies:
                found[group] = energies[group][column_permutation(free, reader, permutations[free.name])]
    return found


@dataclass(frozen=True)
class Ranking:
    """A free permutation by sensitivity: `order[new] = now` int64[size], most energy first; `energies` float32[size],
    as now.

    `readers` are the layers whose columns it is, one to one.
    """

    order: Tensor
    energies: Tensor
    readers: tuple[str, ...]

    def banded(self, widths: Sequence[int], interleaves: bool = True) -> Tensor:
        """int64[size], `order[new] = now`: the columns of most energy first, interleaved over vectors inside each
        band.
        """
        bands = self.order.split(list(widths))
        if not interleaves:
            return self.order
        return torch.cat([band[interleaved_permutation(self.energies[band], VECTOR)] for band in bands])


def rank_columns(
    model: nn.Module, family: Family, config: Config, specs: Sequence[LayerSpec], energies: Mapping[str, Tensor]
) -> dict[str, Ranking]:
    """Free permutation → its ranking, of those whose columns may go anywhere.

    A column's sensitivity is H_jj ‖W_:j‖², what the layer's output loses with it; divided by a reader's mean, then
    averaged over readers (`permutations.combined_energies`).

    Args:
        energies: group → float32[n], diag H, columns as the model has them.
    """
    importance = {}
    for spec in specs:
        if spec.kind == "linear" and spec.group in energies:
            weight = dense_weight(model, spec)
            importance[spec.name] = energies[spec.group] * weight.square().sum(dim=0)
    found = {}
    for free in family.free_permutations(config):
        if free.unit != free.size or free.size % VECTOR:
            continue
        readers = {reader: float(reader in importance) for reader in free.readers}
        if any(readers.values()):
            combined = combined_energies(free, importance, readers)
            order = combined.argsort(descending=True, stable=True)
            direct = tuple(r for r, used in readers.items() if used and free.reader_place(r).repeats == 1)
            found[free.name] = Ranking(order, combined, direct)
    return found


def groups_to_cut(
    specs: Sequence[LayerSpec],
    rankings: Mapping[str, Ranking],
    energies: Mapping[str, Tensor],
    least_spread: float = Options.segment_spread,
) -> dict[str, Ranking]:
    """Group → its ranking, of the groups of linears whose energies inside are `least_spread` apart and more."""
    tied = {spec.group for spec in specs if spec.tied_to} | {spec.tied_to for spec in specs if spec.tied_to}
    group_of = {spec.name: spec.group for spec in specs if spec.kind == "linear"}
    found = {}
    for ranking in rankings.values():
        for group in dict.fromkeys(group_of[reader] for reader in ranking.readers if reader in group_of):
            untied = group not in tied and not any(spec.name in tied for spec in specs if spec.group == group)
            if untied and energy_spread(energies[group][ranking.order].tolist()) >= least_spread:
                found[group] = ranking
    return found


def segment_permutations(rankings: Mapping[str, Ranking], plan: BitPlan, interleaves: bool) -> dict[str, Tensor]:
    """Free permutation → `order[new] = now`, of those that some reader's segments need sorted; bands at all
    boundaries.
    """
    found = {}
    for name, ranking in rankings.items():
        cuts = set()
        for reader in ranking.readers:
            layer = plan.layer(reader)
            if layer.segments:
                cuts |= {segment.first for segment in parse_format(layer.code, layer.columns)}
        if cuts:
            ends = [*sorted(cuts - {0}), len(ranking.order)]
            found[name] = ranking.banded([b - a for a, b in zip([0, *ends], ends)], interleaves)
    return found


def composed(permutations: Mapping[str, Tensor], then: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Free permutation → the order that `permutations` and, after them, `then` come to."""
    return dict(permutations) | {
        name: permutations[name][order] if name in permutations else order for name, order in then.items()
    }
