"""Plans whose groups share codebooks: what the codebooks are called, how often they count, and that budgets are
kept.
"""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published_models import bit_plan, qwen2_vl_2b

from toolchain.bits.bitplan import plan, real_bits
from toolchain.bits.codebook_sharing import CHOICES, GROUP, PART, UNIVERSAL
from toolchain.errors import BudgetError, UsageError
from toolchain.plan.advice import with_code
from toolchain.plan.memory import Workload, plan_memory
from toolchain.plan.target import load_target
from toolchain.values import CODES, BitPlan, LayerSpec, parse_format

SPECS = (
    LayerSpec("embed", "embedding", "embedding", 512, 64, "embed", 0),
    LayerSpec("vis.fc", "vision", "linear", 64, 32, "vis.fc", 1),
    LayerSpec("vis.out", "vision", "linear", 64, 64, "vis.out", 2),
    LayerSpec("lm.q", "language", "linear", 64, 64, "lm.qkv", 3),
    LayerSpec("lm.k", "language", "linear", 32, 64, "lm.qkv", 3),
    LayerSpec("lm.down", "language", "linear", 64, 256, "lm.down", 3),
    LayerSpec("head", "head", "linear", 512, 64, "embed", 4, tied_to="embed"),
)
KEPT = {"lm.norm.weight": 64}
GROUPS = ("embed", "vis.fc", "vis.out", "lm.qkv", "lm.down")
OFFERED = ("2,3,8", "2,4,8", "4,8,9", "2,8,9")
SEGMENTS = "2,6,8@64+2,3,8"


def planned(codebooks: str, **limits) -> BitPlan:
    return plan(SPECS, KEPT, codebooks=codebooks, **limits)


def size_of(found: BitPlan) -> int:
    return real_bits(found)["total"].bytes


def code_of(found: BitPlan, group: str) -> str:
    return next(layer.code for layer in found.layers if layer.group == group)


def loss_of(found: BitPlan, losses) -> float:
    return math.fsum(losses[group][code_of(found, group)] for group in GROUPS)


def test_ids_name_the_owner_and_the_code():
    limits = {"overrides": [("*", "2,4,8"), ("vis.fc", "2,6,8")]}
    assert set(planned(GROUP, **limits).codebooks()) == {"t0", "t1", "t2", "t3", "t4"}
    assert planned(PART, **limits).codebooks() == {
        "embedding_2_4_8": CODES["2,4,8"],
        "vision_2_6_8": CODES["2,6,8"],
        "vision_2_4_8": CODES["2,4,8"],
        "language_2_4_8": CODES["2,4,8"],
    }
    assert planned(UNIVERSAL, **limits).codebooks() == {
        "universal_2_4_8": CODES["2,4,8"],
        "universal_2_6_8": CODES["2,6,8"],
    }


@pytest.mark.parametrize("codebooks", CHOICES)
def test_a_tied_head_has_its_embeddings_codebook(codebooks):
    found = planned(codebooks, bits=2.5, overlapping=True)
    assert found.layer("head").table == found.layer("embed").table


@pytest.mark.parametrize("codebooks", [PART, UNIVERSAL])
def test_every_segment_has_the_codebook_of_its_code(codebooks):
    found = planned(codebooks, overrides=[("*", "2,3,8"), ("lm.down", SEGMENTS)])
    owner = "language" if codebooks == PART else "universal"
    again = BitPlan.from_json(json.loads(json.dumps(found.to_json())))
    pieces = again.layer("lm.down").pieces
    assert [piece.table for piece in pieces] == [f"{owner}_2_6_8", f"{owner}_2_3_8"]
    assert again.layer("lm.q").table == pieces[1].table


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([*CODES, SEGMENTS]), min_size=5, max_size=5), st.sampled_from([PART, UNIVERSAL]))
def test_real_bytes_fall_by_every_codebook_but_one_of_each(codes, codebooks):
    codes = [code if "+" not in code or group == "lm.down" else "2,4,8" for code, group in zip(codes, GROUPS)]
    patterns = ("embed", "vis.fc", "vis.out", "lm.[qk]", "lm.down", "head")
    overrides = list(zip(patterns, (*codes, codes[0])))
    own, shared = planned(GROUP, overrides=overrides), planned(codebooks, overrides=overrides)
    columns = {spec.group: spec.columns for spec in SPECS}
    used = [
        ("" if codebooks == UNIVERSAL else next(s.part for s in SPECS if s.group == group), segment.code)
        for group, code in zip(GROUPS, codes)
        for segment in parse_format(code, columns[group])
    ]
    saved = sum(code.codebook_bytes for _, code in used) - sum(code.codebook_bytes for _, code in set(used))
    assert size_of(own) - size_of(shared) == saved
    assert real_bits(own)["total"].index == real_bits(shared)["total"].index


losses_of_groups = st.lists(
    st.lists(st.floats(0.0, 10.0), min_size=len(OFFERED), max_size=len(OFFERED)), min_size=5, max_size=5
)


@settings(max_examples=60, deadline=None)
@given(losses_of_groups, st.integers(0, 20_000), st.sampled_from([PART, UNIVERSAL]))
def test_a_budget_is_kept_and_spent_with_shared_codebooks(values, spare, codebooks):
    """No worse than the best plan of groups' own codebooks that leaves room for every shared one."""
    losses = {group: dict(zip(OFFERED, row)) for group, row in zip(GROUPS, values)}
    least = size_of(planned(codebooks, overrides=[("*", "2,3,8")]))
    found = planned(codebooks, budget_bytes=least + spare, losses=losses)
    assert size_of(found) <= least + spare
    every_codebook = sum(CODES[code].codebook_bytes for code in OFFERED) * (1 if codebooks == UNIVERSAL else 3)
    # All codes of this plan of groups' own codebooks fit beside every shared codebook.
    own = size_of(planned(GROUP, overrides=[("*", "2,3,8")]))
    if least + spare - every_codebook >= own:
        best = planned(GROUP, budget_bytes=least + spare - every_codebook, losses=losses)
        assert loss_of(found, losses) <= loss_of(best, losses) * (1 + 1e-9)


@pytest.mark.parametrize("codebooks", [PART, UNIVERSAL])
def test_the_smallest_shared_plan_is_the_least_budget(codebooks):
    least = size_of(planned(codebooks, bits=1.5, overlapping=True))
    assert size_of(planned(codebooks, budget_bytes=least, overlapping=True)) == least
    with pytest.raises(BudgetError, match=f"takes {least:,} bytes .* 1 more than the budget of {least - 1:,}; raise"):
        planned(codebooks, budget_bytes=least - 1, overlapping=True)


def test_a_codebooks_room_is_not_kept_free_for_nobody():
    """With one group to gain, the bytes of codebooks that no group takes go to it."""
    losses = {group: {"2,3,8": 1.0, "2,4,8": 1.0} for group in GROUPS} | {"lm.down": {"2,3,8": 9.0, "2,8,9": 0.0}}
    wanted = planned(UNIVERSAL, overrides=[("*", "2,3,8"), ("lm.down", "2,8,9")])
    found = planned(UNIVERSAL, budget_bytes=size_of(wanted) + 1024, losses=losses)
    assert code_of(found, "lm.down") == "2,8,9"
    assert size_of(found) <= size_of(wanted) + 1024


def test_another_choice_is_refused():
    with pytest.raises(UsageError, match="codebooks 'each': expected one of group, part, universal"):
        planned("each", bits=2.0)


@pytest.mark.parametrize("codebooks", [PART, UNIVERSAL])
def test_advice_shares_the_codebooks_of_the_code_it_tries(codebooks):
    mixed = planned(codebooks, overrides=[("*", "2,4,8"), ("vis.fc", "2,6,8"), ("lm.down", SEGMENTS)])
    assert with_code(mixed, "2,3,8").layers == planned(codebooks, overrides=[("*", "2,3,8")]).layers
    own = planned(GROUP, overrides=[("*", "2,4,8"), ("lm.down", SEGMENTS)])
    assert with_code(own, "2,3,8").layers == planned(GROUP, overrides=[("*", "2,3,8")]).layers


def test_the_largest_block_is_one_groups_codes_whoever_shares_its_codebook():
    geometry, target = qwen2_vl_2b(), load_target("orin-nano-8gb")
    apart = bit_plan(geometry, "4,8,8", "4,8,8")
    shared = dataclasses.replace(
        apart, layers=tuple(dataclasses.replace(layer, table="universal_4_8_8") for layer in apart.layers)
    )
    blocks = [
        plan_memory(one, geometry, target, Workload(64, None, 1, prompt_tokens=0)).largest_block
        for one in (apart, shared)
    ]
    assert blocks[0] == blocks[1]
    assert blocks[0] == ("codes of model.language_model.embed_tokens", shared.layers[0].codes_bytes)
