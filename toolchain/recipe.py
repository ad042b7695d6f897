"""Which parts of MGVQ are on: named in a method's name, so that every ablation is a method like any other.

`mgvq` is the default recipe; `-part` takes a part out and `+part` puts one in: `mgvq-drift`, `mgvq-mix-deal+tune`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace

from toolchain.errors import UsageError

NAME = "mgvq"
PATTERN = re.compile(r"([-+])([a-z]+)")


@dataclass(frozen=True)
class Recipe:
    """The parts of the method, each on or off."""

    overlap: bool = True  # codes with overlapping windows, chosen per group by a dry run
    mix: bool = True  # module 1: a code per group by sensitivity; one rate for all where off
    deal: bool = True  # columns dealt over vectors, the order folded into their producers
    # Inputs rotated by a block-diagonal Hadamard matrix where a dry run says that it pays. Off: of the demo's 50 groups
    # it pays for 20 as they come and for 2 once their columns are dealt, and KL at 2 bits came to 1.3 (0.9 to 2.5) of
    # what it was with them, and undealt to 1.1.
    rotate: bool = False
    # Rows and tokens weighted by the loss gradient: token masses, and S_o in descent and rounds. Off: a model that is
    # sure of its answers has four tokens of 2,777 carry a layer's whole mass, and the demo's answers get no better.
    fisher: bool = False
    drift: bool = True  # module 2, first order: targets shifted for the inputs that quantized layers really give
    # Coordinate descent after the sweep, gated on held-out gradients. Off: ungated it takes layer errors to about
    # 0.7, on fresh inputs too, and the demo's KL to between 0.6 and 5 of what it was, over three seeds.
    descent: bool = False
    rounds: bool = False  # Jacobi rounds over the whole model from a KL gradient; on the demo no step passes their gate
    # Module 1 inside layers: sorted columns cut into at most three codes where that pays. Off: over three seeds the
    # demo's KL came to 0.9 of what it was at 2.0 bits and 1.1 at 2.25, and the tables and scales of a cut cost bits.
    segments: bool = False
    caps: bool = False  # attention sinks count in H as the loudest ordinary token does
    bias: bool = True  # closed-form bias correction
    tune: bool = False  # end-to-end KL fine-tuning of tables, scales and norms

    def __str__(self) -> str:
        """The method's name that gives this recipe."""
        default = Recipe()
        changed = [f.name for f in fields(self) if getattr(self, f.name) != getattr(default, f.name)]
        return NAME + "".join(f"{'+' if getattr(self, name) else '-'}{name}" for name in changed)


PARTS = tuple(field.name for field in fields(Recipe))


def parse_recipe(name: str) -> Recipe:
    """The recipe of a method named "mgvq", followed by any number of "-part" and "+part".

    Raises:
        UsageError: another method's name, an unknown part, or a part that is named twice.
    """
    rest = name.removeprefix(NAME)
    found = PATTERN.findall(rest)
    if rest == name or "".join(sign + part for sign, part in found) != rest:
        raise UsageError(f"method {name!r}: expected mgvq, then any of -part or +part; parts are {', '.join(PARTS)}")
    parts = [part for _, part in found]
    for part in parts:
        if part not in PARTS:
            raise UsageError(f"method {name!r}: unknown part {part!r}; parts are {', '.join(PARTS)}")
        if parts.count(part) > 1:
            raise UsageError(f"method {name!r}: part {part!r} is named twice; name it once")
    return replace(Recipe(), **{part: sign == "+" for sign, part in found})
