"""The methods a user can name, read once: recipes of mgvq, and baselines (`quantize.baselines.registry`). No torch."""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.bits.codebook_sharing import GROUP
from toolchain.errors import UsageError
from toolchain.quantize.mgvq.recipe import NAME, Recipe, parse_recipe

STORED = ("gptvq", "gptq", "nearest", "rtn")  # baselines whose codes a checkpoint can hold
COMPARED = ("vptq", "gptq-rotated")  # for `mgvq compare` alone
SEEDLESS = ("rtn", "gptq")  # draw nothing at random


@dataclass(frozen=True)
class Method:
    """A method's name, and its recipe where it is mgvq's."""

    name: str
    recipe: Recipe | None = None

    @property
    def fits_checkpoint(self) -> bool:
        return self.name not in COMPARED

    @property
    def draws(self) -> bool:
        """Whether anything depends on the seed."""
        return self.name not in SEEDLESS

    @property
    def overlaps(self) -> bool:
        """Whether its codes have overlapping windows (`bitplan.plan`): mgvq's unless told otherwise, no baseline's."""
        return self.recipe is not None and self.recipe.overlap

    @property
    def codebooks(self) -> str:
        """Whose its codebooks are (`codebook_sharing.CHOICES`): what a recipe says, the groups' of a baseline."""
        return self.recipe.codebooks if self.recipe is not None else GROUP


def parse_method(name: str) -> Method:
    """The method of that name.

    Raises:
        UsageError: there is none; or it begins like mgvq and names parts that there are none of.
    """
    if name.startswith(NAME):
        return Method(name, parse_recipe(name))
    if name not in (*STORED, *COMPARED):
        raise UsageError(f"method {name!r} is not known; use one of {', '.join((NAME, *STORED, *COMPARED))}")
    return Method(name)


def stored_method(name: str) -> Method:
    """The method of that name, whose result a checkpoint can hold.

    Raises:
        UsageError: there is none.
    """
    method = parse_method(name)
    if not method.fits_checkpoint:
        raise UsageError(
            f"method {name!r} is for mgvq compare alone, no checkpoint can hold its codes; use one of "
            f"{NAME}, {', '.join(STORED)}"
        )
    return method
