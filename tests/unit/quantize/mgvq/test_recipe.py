"""A recipe and its name: each gives back the other, and no other name is taken for one."""

from __future__ import annotations

from dataclasses import asdict
from itertools import product

import pytest

from toolchain.bits.codebook_sharing import CHOICES
from toolchain.errors import UsageError
from toolchain.quantize.mgvq.recipe import NAME, PARTS, Recipe, parse_recipe


def test_the_default_is_the_plain_name():
    assert str(Recipe()) == "mgvq"
    assert parse_recipe("mgvq") == Recipe()


def test_every_recipe_comes_back_from_its_name():
    names = set()
    for switches in product([False, True], repeat=len(PARTS)):
        recipe = Recipe(**dict(zip(PARTS, switches, strict=True)))
        names.add(str(recipe))
        assert parse_recipe(str(recipe)) == recipe
    assert len(names) == 2 ** len(PARTS)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("sign", "on"), [("-", False), ("+", True)])
def test_a_sign_switches_its_part_alone(part, sign, on):
    assert asdict(parse_recipe(f"{NAME}{sign}{part}")) == asdict(Recipe()) | {part: on}


@pytest.mark.parametrize("codebooks", CHOICES)
def test_whose_the_codebooks_are_is_named(codebooks):
    found = parse_recipe(f"{NAME}-mix+codebooks={codebooks}+tune")
    assert found == Recipe(mix=False, tune=True, codebooks=codebooks)
    assert parse_recipe(str(found)) == found
    assert found.shares_codebooks == (codebooks != "group")
    assert str(Recipe(codebooks="universal")) == "mgvq+codebooks=universal"


@pytest.mark.parametrize("name", ["mgvq+codebooks", "mgvq-codebooks=part", "mgvq+codebooks=each"])
def test_other_choices_of_codebooks_are_refused(name):
    with pytest.raises(
        UsageError, match=r"expected \+codebooks= and one of group, part, universal, found [-+]codebooks"
    ):
        parse_recipe(name)


def test_a_switch_takes_no_value():
    with pytest.raises(UsageError, match=r"part 'tune' is on or off, found '=yes'; write \+tune or -tune"):
        parse_recipe("mgvq+tune=yes")


def test_the_order_of_parts_is_no_matter():
    first, second = parse_recipe("mgvq-mix-interleave+tune"), parse_recipe("mgvq+tune-interleave-mix")
    assert first == second
    assert str(first) == str(second) == "mgvq-mix-interleave+tune"


def test_what_a_name_says_twice_over_is_not_in_the_name():
    assert str(parse_recipe("mgvq+drift-tune")) == "mgvq"


@pytest.mark.parametrize(
    "name",
    ["", "gptvq", "MGVQ", "mgvq ", " mgvq", "mgvqdrift", "mgvq-", "mgvq+", "mgvq--drift", "mgvq-Drift", "mgvq-drift2",
     "mgvq drift", "mgvqmgvq", "mgvq+codebooks=", "mgvq+codebooks=part=part", "mgvq-drift,", "-drift"],
)  # fmt: skip
def test_other_names_are_refused(name):
    with pytest.raises(UsageError, match="expected mgvq, then any of -part or") as caught:
        parse_recipe(name)
    assert repr(name) in str(caught.value)
    assert all(part in str(caught.value) for part in PARTS)


def test_unknown_parts_are_refused_by_name():
    with pytest.raises(UsageError, match="unknown part 'drfit'; parts are overlap, mix") as caught:
        parse_recipe("mgvq-mix-drfit")
    assert "'mgvq-mix-drfit'" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["mgvq-drift-drift", "mgvq-drift+drift", "mgvq+tune-mix+tune", "mgvq+codebooks=part+codebooks=part"]
)
def test_a_part_named_twice_is_refused(name):
    with pytest.raises(UsageError, match="is named twice; name it once"):
        parse_recipe(name)
