"""Orders for segments: columns of most energy first, interleaved inside bands, folded where the model's outputs do
not change.
"""

from __future__ import annotations

import copy

import pytest
import torch

from toolchain.bits.bitplan import plan as plan_bits
from toolchain.calibration.activations import survey_inputs
from toolchain.calibration.inputs import calibration_inputs
from toolchain.calibration.manifest import read_manifest
from toolchain.checkpoint.loading import load_model
from toolchain.checkpoint.permuted import permute_model
from toolchain.models.configs import read_config
from toolchain.models.registry import family_for
from toolchain.quantize.mgvq.permutation import measured_permutations
from toolchain.quantize.refine.segment_permutations import (
    Ranking,
    composed,
    groups_to_cut,
    permuted_energies,
    rank_columns,
    segment_permutations,
)

DOWN = "mlp.down_proj"


class Case:
    """A tiny model whose decoder has hidden channels of high and low energy, interleaved; energies before and after."""

    def __init__(self, folder, manifest) -> None:
        self.config = read_config(folder)
        self.family = family_for(self.config)
        self.specs = self.family.layers(self.config)
        self.before = load_model(folder).requires_grad_(False).double()
        for spec in self.specs:
            if spec.name.endswith("up_proj"):
                self.before.get_parameter(f"{spec.name}.weight").mul_(torch.logspace(-1, 1, spec.rows)[:, None])
        self.inputs = calibration_inputs(self.family.load_processor(folder), read_manifest(manifest)[:2])
        linears = [spec for spec in self.specs if spec.kind != "embedding"]
        energies = survey_inputs(self.before, self.inputs, linears).energies
        self.permutations = measured_permutations(self.family, self.config, self.specs, energies)
        self.model = copy.deepcopy(self.before)
        permute_model(self.model, self.family, self.config, self.permutations)
        self.now = permuted_energies(self.family, self.config, self.specs, energies, self.permutations)
        self.measured = survey_inputs(self.model, self.inputs, linears).energies
        self.ranks = rank_columns(self.model, self.family, self.config, self.specs, self.now)

    def logits(self, model):
        with torch.no_grad():
            return [model(**one.tensors).logits for one in self.inputs]


@pytest.fixture(scope="module", params=["tiny_qwen2_vl", "tiny_internvl"])
def case(request, tiny_manifest):
    return Case(request.getfixturevalue(request.param), tiny_manifest)


def test_energies_follow_the_columns(case):
    assert set(case.now) == set(case.measured)
    for group, energies in case.now.items():
        torch.testing.assert_close(energies, case.measured[group], rtol=1e-4, atol=1e-8)


def test_columns_are_ranked_by_what_the_output_loses_with_them(case):
    """H_jj ‖W_:j‖² where one layer reads the order alone."""
    found = {
        name: ranking for name, ranking in case.ranks.items() if ranking.readers and ranking.readers[0].endswith(DOWN)
    }
    assert len(found) == sum(spec.name.endswith(DOWN) for spec in case.specs)
    for ranking in found.values():
        spec = next(spec for spec in case.specs if spec.name == ranking.readers[0])
        weight = case.model.get_parameter(f"{spec.name}.weight")
        falling = (case.now[spec.group] * weight.float().square().sum(dim=0))[ranking.order]
        assert bool((falling[1:] <= falling[:-1] * (1 + 1e-5)).all())


def test_only_what_may_go_anywhere_is_ranked(case):
    for free in case.family.free_permutations(case.config):
        assert (free.name in case.ranks) == (free.unit == free.size)


def test_bands_hold_their_ranks_and_deal_them(case):
    ranking = Ranking(torch.arange(127, -1, -1), torch.arange(128.0), ("x",))
    found = ranking.banded([64, 64])
    assert sorted(found[:64].tolist()) == list(range(64, 128))
    assert sorted(found[64:].tolist()) == list(range(64))
    assert torch.equal(ranking.banded([64, 64], interleaves=False), ranking.order)
    # Interleaved: the first vector of a band holds its highest-energy column and one from every quarter of the band.
    assert sorted((127 - found[:4]).tolist()) == [0, 16, 32, 48]


def test_uneven_groups_are_cut_and_even_or_tied_ones_are_not(case):
    found = groups_to_cut(case.specs, case.ranks, case.now)
    wanted = {spec.group for spec in case.specs if spec.name.endswith(DOWN)}
    assert wanted <= set(found)
    tied = {spec.group for spec in case.specs if spec.tied_to} | {s.group for s in case.specs if s.kind != "linear"}
    assert not tied & set(found)


def test_orders_for_segments_fold_and_compose(case):
    name = next(spec.name for spec in case.specs if spec.name.endswith(f"layers.0.{DOWN}"))
    plan = plan_bits(case.specs, {}, overrides=[(name, "2,6,8@64+2,4,8")])
    then = segment_permutations(case.ranks, plan, interleaves=True)
    (order,) = [free for free, ranking in case.ranks.items() if name in ranking.readers]
    assert set(then) == {order}
    assert set(then[order][:64].tolist()) == set(case.ranks[order].order[:64].tolist())
    twice, once = copy.deepcopy(case.model), copy.deepcopy(case.before)
    permute_model(twice, case.family, case.config, then)
    permute_model(once, case.family, case.config, composed(case.permutations, then))
    for (key, parameter), other in zip(twice.named_parameters(), once.parameters(), strict=True):
        assert torch.equal(parameter, other), key
    for found, expected in zip(case.logits(twice), case.logits(case.before)):
        assert float((found - expected).abs().max()) <= 1e-5 * float(
            expected.abs().max()
        )  # 8e-7 is seen; norms and rotations are float32


def test_without_segments_nothing_is_ordered_again(case):
    assert segment_permutations(case.ranks, plan_bits(case.specs, {}), interleaves=True) == {}
