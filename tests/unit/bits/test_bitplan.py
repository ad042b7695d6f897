from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain.bits.bitplan import DEFAULT_CODES, part_of_kept, plan, real_bits
from toolchain.errors import BudgetError, NumericGateError, UsageError
from toolchain.values import CODES, BitPlan, LayerSpec

SPECS = (
    LayerSpec("model.lm.embed", "embedding", "embedding", 512, 64, "model.lm.embed", 0),
    LayerSpec("model.vis.patch", "vision", "conv", 32, 100, "model.vis.patch", 1),
    LayerSpec("model.vis.fc", "vision", "linear", 64, 32, "model.vis.fc", 2, True),
    LayerSpec("model.lm.0.q", "language", "linear", 64, 64, "model.lm.0.qkv", 3, True),
    LayerSpec("model.lm.0.k", "language", "linear", 32, 64, "model.lm.0.qkv", 3, True),
    LayerSpec("model.lm.0.down", "language", "linear", 64, 256, "model.lm.0.down", 3),
    LayerSpec("head", "head", "linear", 512, 64, "head", 4, tied_to="model.lm.embed"),
)
KEPT = {"model.lm.norm.weight": 64, "model.lm.0.q.bias": 64, "model.vis.fc.bias": 64, "model.vis.norm.weight": 32}
GROUPS = ("model.lm.embed", "model.vis.patch", "model.vis.fc", "model.lm.0.qkv", "model.lm.0.down")
UNIFORM = {group: {"2,4,8": 1.0} for group in GROUPS}


def codes_of(bit_plan: BitPlan) -> dict[str, str]:
    return {layer.name: layer.code for layer in bit_plan.layers}


def test_without_bits_every_part_has_its_default():
    found = plan(SPECS, KEPT)
    for layer in found.layers:
        assert layer.code == DEFAULT_CODES[layer.part if not layer.tied_to else "embedding"]


def test_two_bits_is_quads_everywhere():
    found = plan(SPECS, KEPT, bits=2.0)
    assert set(codes_of(found).values()) == {"4,8,8"}
    assert found.index_bits() == 2.0


def test_four_bits_is_the_finest_code_everywhere():
    assert set(codes_of(plan(SPECS, KEPT, bits=4.0)).values()) == {"2,8,8"}


@settings(max_examples=50, deadline=None)
@given(st.floats(2.0, 4.0), st.lists(st.floats(0.0, 10.0), min_size=5, max_size=5))
def test_bits_are_kept_and_nothing_that_fits_is_left_unbought(bits, losses):
    found = plan(SPECS, KEPT, bits=bits, sensitivity=dict(zip(GROUPS, losses)))
    assert found.index_bits() <= bits + 1e-9
    stored = [layer for layer in found.layers if not layer.tied_to]
    total = sum(x.rows * x.columns for x in stored)
    spent = sum(x.rows * x.columns * x.vq_code.index_bits for x in stored)
    for group in GROUPS:
        members = [x for x in stored if x.group == group]
        if members[0].code != "2,8,8":
            assert spent + sum(x.rows * x.columns for x in members) > bits * total


def test_the_sensitive_group_is_raised_first():
    losses = {"model.lm.0.down": 50.0}
    found = codes_of(plan(SPECS, KEPT, bits=2.4, sensitivity=losses | {"model.vis.fc": 0.0, "model.lm.0.qkv": 0.0}))
    assert CODES[found["model.lm.0.down"]].index_bits > 2
    assert found["model.lm.0.q"] == "4,8,8"


def test_tied_and_fused_layers_share_code_and_codebook():
    found = {layer.name: layer for layer in plan(SPECS, KEPT, bits=2.5).layers}
    assert (found["head"].code, found["head"].table) == (found["model.lm.embed"].code, found["model.lm.embed"].table)
    assert (found["model.lm.0.q"].code, found["model.lm.0.q"].table) == (
        found["model.lm.0.k"].code,
        found["model.lm.0.k"].table,
    )
    assert sorted({layer.table for layer in found.values()}) == ["t0", "t1", "t2", "t3", "t4"]


def test_overrides_hold_and_the_last_one_wins():
    found = codes_of(plan(SPECS, KEPT, bits=2.6, overrides=[("model.vis.*", "2,6,6"), ("model.vis.fc", "2,8,8")]))
    assert (found["model.vis.patch"], found["model.vis.fc"]) == ("2,6,6", "2,8,8")
    assert plan(SPECS, KEPT, bits=2.6, overrides=[("model.vis.*", "2,6,6")]).index_bits() <= 2.6


def test_overrides_may_name_codes_with_overlapping_windows():
    found = plan(SPECS, KEPT, bits=2.2, overrides=[("model.vis.*", "2,3,8"), ("*.down", "2,5,8")])
    codes = codes_of(found)
    assert (codes["model.vis.fc"], codes["model.lm.0.down"]) == ("2,3,8", "2,5,8")
    assert found.index_bits() <= 2.2


@pytest.mark.parametrize("bits", [None, 2.0, 3.0, 4.0])
def test_overlapping_plans_have_the_bits_of_plain_ones(bits):
    plain, overlapping = (plan(SPECS, KEPT, bits=bits, overlapping=flag) for flag in (False, True))
    assert [x.vq_code.index_bits for x in plain.layers] == [x.vq_code.index_bits for x in overlapping.layers]
    assert all(x.vq_code.window > x.vq_code.shift for x in overlapping.layers)
    fixed = plan(SPECS, KEPT, bits=bits, overlapping=True, overrides=[("model.lm.0.*", "4,8,8")])
    assert codes_of(fixed)["model.lm.0.q"] == "4,8,8"


@pytest.mark.parametrize(("bits", "code"), [(1.5, "2,3,8"), (2, "2,4,8"), (2.5, "2,5,8"), (3, "2,6,8"), (4, "2,8,9")])
def test_every_rate_of_overlapping_codes_is_reached_everywhere(bits, code):
    assert set(codes_of(plan(SPECS, KEPT, bits=bits, overlapping=True)).values()) == {code}


@settings(max_examples=50, deadline=None)
@given(st.floats(1.5, 4.0), st.lists(st.floats(0.0, 10.0), min_size=5, max_size=5))
def test_overlapping_bits_are_kept_and_no_step_that_fits_is_left(bits, losses):
    found = plan(SPECS, KEPT, bits=bits, overlapping=True, sensitivity=dict(zip(GROUPS, losses)))
    assert found.index_bits() <= bits + 1e-9
    stored = [layer for layer in found.layers if not layer.tied_to]
    left = sum(x.rows * x.columns * (bits - x.vq_code.index_bits) for x in stored)
    for group in GROUPS:
        members = [x for x in stored if x.group == group]
        now = members[0].vq_code.index_bits
        if now < 4:
            assert left < sum(x.rows * x.columns for x in members) * (1.0 if now == 3 else 0.5)


CHOICES = ("2,3,8", "2,4,8", "2,6,8")
measured = st.lists(
    st.lists(st.floats(0.0, 10.0), min_size=len(CHOICES), max_size=len(CHOICES)),
    min_size=len(GROUPS),
    max_size=len(GROUPS),
)


def loss_of(bit_plan: BitPlan, losses) -> float:
    codes = {layer.group: layer.code for layer in bit_plan.layers if not layer.tied_to}
    return math.fsum(losses[group][codes[group]] for group in GROUPS)


def every_plan():
    """The plan of every combination of CHOICES, each group's given as an override."""
    patterns = ("*.embed", "*.patch", "*.fc", "*.[qk]", "*.down", "head")
    for codes in itertools.product(CHOICES, repeat=len(GROUPS)):
        yield plan(SPECS, KEPT, overrides=list(zip(patterns, (*codes, codes[0]))))


ALL_PLANS = [(one, one.index_bits(), real_bits(one)["total"].bytes) for one in every_plan()]


@settings(max_examples=40, deadline=None)
@given(measured, st.floats(1.5, 3.2))
def test_measured_losses_give_the_best_plan_of_all_under_an_average(values, bits):
    losses = {group: dict(zip(CHOICES, row)) for group, row in zip(GROUPS, values)}
    found = plan(SPECS, KEPT, bits=bits, losses=losses)
    best = min(loss_of(one, losses) for one, index, _ in ALL_PLANS if index <= bits + 1e-9)
    assert found.index_bits() <= bits + 1e-9
    assert loss_of(found, losses) == pytest.approx(best, rel=1e-12, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(measured, st.integers(0, 30_000))
def test_measured_losses_give_the_best_plan_of_all_under_a_budget(values, spare):
    losses = {group: dict(zip(CHOICES, row)) for group, row in zip(GROUPS, values)}
    budget = min(size for _, _, size in ALL_PLANS) + spare
    found = plan(SPECS, KEPT, budget_bytes=budget, losses=losses)
    best = min(loss_of(one, losses) for one, _, size in ALL_PLANS if size <= budget)
    assert real_bits(found)["total"].bytes <= budget
    assert loss_of(found, losses) == pytest.approx(best, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("overlapping", [False, True])
def test_a_budget_alone_is_spent_and_kept(overlapping):
    def size(one: BitPlan) -> int:
        return real_bits(one)["total"].bytes

    lowest, highest = (plan(SPECS, KEPT, bits=bits, overlapping=overlapping) for bits in (1.5 if overlapping else 2, 4))
    sizes = range(size(lowest), size(highest), 2_500)
    plans = [plan(SPECS, KEPT, budget_bytes=budget, overlapping=overlapping) for budget in sizes]
    assert all(size(one) <= budget for one, budget in zip(plans, sizes))
    assert codes_of(plan(SPECS, KEPT, budget_bytes=size(highest), overlapping=overlapping)) == codes_of(highest)
    losses = [sum(x.rows * x.columns * 4**-x.vq_code.index_bits for x in one.layers if not x.tied_to) for one in plans]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]


def test_the_smallest_plan_is_the_least_budget_and_one_byte_less_is_refused():
    least = real_bits(plan(SPECS, KEPT, bits=1.5, overlapping=True))["total"].bytes
    found = plan(SPECS, KEPT, budget_bytes=least, overlapping=True)
    assert (real_bits(found)["total"].bytes, found.requested_bits) == (least, None)
    with pytest.raises(BudgetError, match=f"takes {least:,} bytes .* 1 more than the budget of {least - 1:,}; raise"):
        plan(SPECS, KEPT, budget_bytes=least - 1, overlapping=True)


def test_overrides_hold_under_losses_and_budgets():
    losses = {group: {"2,3,8": 1.0, "2,8,9": 0.0} for group in GROUPS if group != "model.lm.0.down"}
    for limit in ({"bits": 3.5}, {"budget_bytes": 60_000}):
        found = codes_of(plan(SPECS, KEPT, losses=losses, overrides=[("*.down", "2,6,6")], **limit))
        assert found["model.lm.0.down"] == "2,6,6"
        assert set(found.values()) <= {"2,6,6", "2,3,8", "2,8,9"}


def test_a_group_keeps_to_the_codes_its_losses_name():
    losses = {group: {"2,4,8": 2.0, "2,6,8": 1.0} for group in GROUPS} | {"model.vis.fc": {"4,8,8": 5.0}}
    assert codes_of(plan(SPECS, KEPT, bits=4.0, losses=losses))["model.vis.fc"] == "4,8,8"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 1.9}, "bits 1.9: expected 2 to 4"),
        ({"bits": 4.1}, "bits 4.1: expected 2 to 4"),
        ({"overrides": [("nothing.*", "4,8,8")]}, "matches no layer"),
        ({"overrides": [("*", "2,7,8")]}, "unknown code; use one of 4,8,8 2,6,6 2,8,8 2,3,8"),
        ({"overrides": [("*.down", "2,7,8@64+2,4,8")]}, "unknown code; .* or segments of them such as 2,6,8@64"),
        (
            {"overrides": [("*.down", "2,6,8@256+2,4,8")]},
            r"layer model\.lm\.0\.down: format .* of a layer of 256 columns",
        ),
        ({"overrides": [("*.embed", "2,6,8@32+2,4,8")]}, r"layer model\.lm\.embed: only untied linears are cut"),
        ({"overrides": [("*.patch", "2,6,8@64+2,4,8")]}, r"layer model\.vis\.patch: only untied linears are cut"),
        ({"overrides": [("*.q", "2,8,8")]}, r"group model\.lm\.0\.qkv runs as one node"),
        ({"overrides": [("head", "2,8,8")]}, r"group model\.lm\.embed runs as one node"),
        ({"bits": 2.0, "overrides": [("model.vis.*", "2,8,8")]}, "the overrides alone come to"),
        ({"bits": 2.5, "sensitivity": {"nobody": 1.0}}, "groups that the model lacks: nobody"),
        ({"bits": 1.9}, "1.5 with codes of overlapping windows"),
        ({"bits": 1.4, "overlapping": True}, "bits 1.4: expected 1.5 to 4"),
        ({"bits": 2.0, "budget_bytes": 10**6}, "bits 2 and a budget of 1,000,000 bytes"),
        ({"bits": 2.0, "losses": UNIFORM, "sensitivity": {}}, "give one of them"),
        ({"losses": UNIFORM}, "give bits or budget_bytes"),
        ({"bits": 1.9, "losses": UNIFORM}, r"bits 1.9: the cheapest codes .* come to 2.000; ask for that or more"),
        ({"bits": 4.1, "losses": UNIFORM}, "bits 4.1: expected at most 4"),
        ({"bits": 2.0, "losses": {"model.lm.embed": {"2,4,8": 1.0}}}, "group model.vis.patch: expected the losses of"),
        ({"bits": 2.0, "losses": UNIFORM | {"nobody": {"2,4,8": 1.0}}}, "groups that the model lacks: nobody"),
        ({"bits": 2.0, "losses": UNIFORM | {"model.vis.fc": {"2,7,8": 1.0}}}, "unknown code 2,7,8"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        plan(SPECS, KEPT, **arguments)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -1.0])
def test_a_loss_that_is_none_is_named(loss):
    with pytest.raises(NumericGateError, match=r"group model\.vis\.fc, code 2,4,8: expected a finite loss"):
        plan(SPECS, KEPT, bits=2.0, losses=UNIFORM | {"model.vis.fc": {"2,4,8": loss}})


def test_kept_tensors_belong_to_the_part_around_them():
    layers = plan(SPECS, KEPT).layers
    assert part_of_kept("model.vis.norm.weight", layers) == "vision"
    assert part_of_kept("model.lm.norm.weight", layers) == "language"
    assert part_of_kept("model.lm.0.q.bias", layers) == "language"


def test_real_bits_by_hand():
    found = real_bits(plan(SPECS, KEPT, bits=2.0))
    # Vision: 32x100 padded to 128x112 and 64x32 padded to 128x32, at 2 bits; 96 scales, 2 codebooks of 1 KiB, 96 kept.
    size = (128 * 112 + 128 * 32) // 4 + 2 * 96 + 2 * 1024 + 2 * 96
    weights = 32 * 100 + 64 * 32 + 96
    assert (found["vision"].bytes, found["vision"].weights) == (size, weights)
    assert found["vision"].real == pytest.approx(8 * size / weights)
    assert found["vision"].index == 2.0
    assert "head" not in found
    assert found["total"].bytes == sum(count.bytes for part, count in found.items() if part != "total")
    assert found["total"].weights == sum(count.weights for part, count in found.items() if part != "total")


def test_real_bits_of_segments_by_hand():
    found = plan(SPECS, {}, bits=2.6, overrides=[("*.down", "2,6,8@64+2,4,8@128+2,3,8")])
    layer = found.layer("model.lm.0.down")
    # 64x256 padded to 128 rows: 64 columns of 3 bits, 128 of 2, 64 of 1.5; three codebooks of 1 KiB and 64 scales each.
    size = 128 * (64 * 3 + 128 * 2 + 64 * 1.5) / 8 + 3 * 1024 + 3 * 2 * 64
    alone = plan((SPECS[5],), {}, overrides=[("*", layer.code)])
    assert real_bits(alone)["total"].bytes == size
    assert real_bits(alone)["total"].index == (64 * 3 + 128 * 2 + 64 * 1.5) / 256
    assert found.index_bits() <= 2.6


def test_a_plan_may_choose_segments_and_counts_their_bytes():
    """Equal in loss to the finest code and cheaper: taken under either limit, and paid for in codebooks and scales."""
    text = "2,8,9@64+2,3,8"
    losses = {g: {"2,3,8": 1.0, "2,8,9": 0.1} for g in GROUPS} | {
        "model.lm.0.down": {"2,3,8": 1.0, text: 0.1, "2,8,9": 0.1}
    }
    by_bits = plan(SPECS, KEPT, bits=3.0, losses=losses)
    assert by_bits.layer("model.lm.0.down").code == text
    assert by_bits.index_bits() <= 3.0
    least = plan(SPECS, KEPT, bits=1.5, losses={g: {"2,3,8": 1.0} for g in GROUPS})
    more = 128 * 64 * (4 - 1.5) / 8 + 2048 + 2 * 64  # the segment's codes and codebook of 2 KiB, and its scales
    for spare, expected in ((more - 1, "2,3,8"), (more, text)):
        one = {g: x if g == "model.lm.0.down" else {"2,3,8": 1.0} for g, x in losses.items()}
        budget = real_bits(least)["total"].bytes + int(spare)
        found = plan(SPECS, KEPT, budget_bytes=budget, losses=one)
        assert found.layer("model.lm.0.down").code == expected
        assert real_bits(found)["total"].bytes <= budget


def test_real_bits_of_one_part_alone():
    bit_plan = plan(SPECS, KEPT)
    language = real_bits(bit_plan, ("language",))
    assert set(language) == {"language", "total"}
    assert language["total"] == language["language"] == real_bits(bit_plan)["language"]


@settings(max_examples=20, deadline=None)
@given(st.floats(2.0, 4.0))
def test_real_bits_exceed_index_bits(bits):
    total = real_bits(plan(SPECS, {}, bits=bits))["total"]
    assert total.real > total.index


def test_a_plan_survives_json():
    found = plan(SPECS, KEPT, bits=2.5)
    assert BitPlan.from_json(found.to_json()) == found


def test_planning_imports_no_framework():
    program = "import sys, toolchain.bits.bitplan, toolchain.files.folders; print(int('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"
