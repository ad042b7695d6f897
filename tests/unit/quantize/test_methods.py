"""Methods by name: read once, without torch, and those that there are."""

from __future__ import annotations

import pytest

from toolchain.errors import UsageError
from toolchain.quantize import methods
from toolchain.quantize.baselines import registry
from toolchain.quantize.methods import parse_method
from toolchain.quantize.mgvq.recipe import parse_recipe


def test_names_are_those_of_the_registry():
    assert set(methods.STORED) == set(registry.METHODS)
    assert set(methods.COMPARED) == set(registry.COMPARED)
    assert set(methods.SEEDLESS) < set(methods.STORED)


@pytest.mark.parametrize("name", [*methods.STORED, *methods.COMPARED])
def test_a_baseline_has_no_recipe(name):
    method = parse_method(name)
    assert (method.recipe, method.overlaps, method.codebooks) == (None, False, "group")
    assert method.fits_checkpoint == (name in methods.STORED)


@pytest.mark.parametrize("name", ["mgvq", "mgvq-overlap", "mgvq-mix+codebooks=part"])
def test_a_recipe_says_what_its_method_does(name):
    method = parse_method(name)
    assert method.recipe == parse_recipe(name)
    assert (method.overlaps, method.codebooks) == (method.recipe.overlap, method.recipe.codebooks)
    assert method.fits_checkpoint
    assert method.draws


def test_unknown_parts_are_refused():
    with pytest.raises(UsageError, match="unknown part 'nothing'"):
        parse_method("mgvq-nothing")
