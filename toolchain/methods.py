"""The methods a user can name: recipes of mgvq, and baselines, each a function of one group of layers."""

from __future__ import annotations

from toolchain.baselines import gptq, gptvq, nearest, rotated, rtn, vptq
from toolchain.baselines.compared import ComparedMethod
from toolchain.errors import UsageError
from toolchain.mgvq.recipe import NAME, Recipe, parse_recipe
from toolchain.vq.weights import Method

# (weights, moment, code, options, generator) -> VQGroup, whose result a checkpoint can hold.
METHODS: dict[str, Method] = {
    "gptvq": gptvq.quantize_group,
    "gptq": gptq.quantize_group,
    "nearest": nearest.quantize_group,
    "rtn": rtn.quantize_group,
}

# Their codes fit no checkpoint: `toolchain.compare` alone takes them.
COMPARED: dict[str, ComparedMethod] = {"vptq": vptq.quantize_group, "gptq-rotated": rotated.quantize_group}


def method_named(name: str) -> Method | Recipe:
    """The method of that name, whose result a checkpoint can hold: a recipe of mgvq, or a baseline.

    Raises:
        UsageError: there is none.
    """
    if name.startswith(NAME):
        return parse_recipe(name)
    if name in COMPARED:
        raise UsageError(
            f"method {name!r} is for mgvq compare alone, no checkpoint can hold its codes; use one of "
            f"{NAME}, {', '.join(METHODS)}"
        )
    if name not in METHODS:
        raise UsageError(f"method {name!r} is not known; use one of {NAME}, {', '.join(METHODS)}")
    return METHODS[name]
