"""Which parts of MGVQ are on: named in a method's name, so that every ablation is a method like any other.

`mgvq` is the default recipe; `-part` takes a part out and `+part` puts one in: `mgvq-drift`,
`mgvq-mix-interleave+tune`.
Whose the codebooks are has three values, so it is named with one: `mgvq+codebooks=part`, `mgvq+codebooks=universal`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Any

from toolchain.bits.codebook_sharing import CHOICES, GROUP, check_choice
from toolchain.errors import UsageError

NAME = "mgvq"
PATTERN = re.compile(r"([-+])([a-z]+)(=[a-z]+)?")
CODEBOOKS = "codebooks"


@dataclass(frozen=True)
class Recipe:
    """The parts of the method, each on or off."""

    overlap: bool = True  # codes with overlapping windows, chosen per group by a proxy quantization
    mix: bool = True  # module 1: a code per group by sensitivity; one rate for all where off
    interleave: bool = True  # columns interleaved over vectors, the order folded into their producers
    # Inputs rotated by a block-diagonal Hadamard matrix where a proxy quantization says that it pays. Off: of the
    # demo's 50 groups it pays for 20 as they come and for 2 once their columns are interleaved, and KL at 2 bits came
    # to 1.3 (0.9 to 2.5) of what it was with them, and not interleaved to 1.1.
    rotate: bool = False
    # Rows and tokens weighted by the loss gradient: token weights, and S_o in descent and rounds. Off: a model that is
    # sure of its answers has four tokens of 2,777 carry a layer's whole token weight, and the demo's answers get no
    # better.
    fisher: bool = False
    drift: bool = True  # module 2, first order: targets shifted for the inputs that quantized layers really give
    # Coordinate descent after the sweep, gated on held-out gradients. Off: ungated it takes layer errors to about
    # 0.7, on fresh inputs too, and the demo's KL to between 0.6 and 5 of what it was, over three seeds.
    descent: bool = False
    rounds: bool = False  # Jacobi rounds over the whole model from a KL gradient; on the demo no step passes their gate
    # Module 1 inside layers: sorted columns cut into at most three codes where that pays. Off: over three seeds the
    # demo's KL came to 0.9 of what it was at 2.0 bits and 1.1 at 2.25, and the codebooks and scales of a cut cost bits.
    segments: bool = False
    sinkcap: bool = False  # attention sinks count in H as the highest-energy ordinary token does
    bias: bool = True  # closed-form bias correction
    tune: bool = False  # end-to-end KL fine-tuning of codebooks, scales and norms
    # One of `codebook_sharing.CHOICES`. Shared codebooks lose more: on the demo at 2.0 index bits (one seed, 400
    # questions of 100 other images) KL 0.0015 with codebooks of groups, 0.0032 of parts, 0.0033 universal, 2.1 and
    # 2.2 times as much (paired 95 % intervals 0.9 to 4.9 and 0.9 to 5.2), for 2.21, 2.13 and 2.11 real bits; layer
    # errors on those questions 1.25 and 1.6 times as large. Universal with the bytes saved spent on index bits, 2.10
    # and 2.21 real: 0.0033 still. To a large model the bytes are nothing. Universal codebooks break on heavy tails
    # without a rotation.
    codebooks: str = GROUP

    def __post_init__(self) -> None:
        check_choice(self.codebooks)

    @property
    def shares_codebooks(self) -> bool:
        """Whether groups use codebooks that are not theirs to change."""
        return self.codebooks != GROUP

    def __str__(self) -> str:
        """The method's name that gives this recipe."""
        default = Recipe()
        changed = [name for name in PARTS if getattr(self, name) != getattr(default, name)]
        switches = "".join(f"{'+' if getattr(self, name) else '-'}{name}" for name in changed)
        return NAME + switches + (f"+{CODEBOOKS}={self.codebooks}" if self.codebooks != default.codebooks else "")


PARTS = tuple(field.name for field in fields(Recipe) if field.name != CODEBOOKS)


def parse_recipe(name: str) -> Recipe:
    """The recipe of a method named "mgvq", followed by any number of "-part" and "+part", "+codebooks=CHOICE" among
    them.

    Raises:
        UsageError: another method's name, an unknown part or choice, or a part that is named twice.
    """
    rest = name.removeprefix(NAME)
    found = PATTERN.findall(rest)
    if rest == name or "".join(sign + part + value for sign, part, value in found) != rest:
        raise UsageError(
            f"method {name!r}: expected mgvq, then any of -part or +part, or +{CODEBOOKS}=CHOICE; parts are "
            f"{', '.join(PARTS)}, choices of {CODEBOOKS} {', '.join(CHOICES)}"
        )
    parts = [part for _, part, _ in found]
    chosen: dict[str, Any] = {}
    for sign, part, value in found:
        if part not in (*PARTS, CODEBOOKS):
            raise UsageError(
                f"method {name!r}: unknown part {part!r}; parts are {', '.join(PARTS)}, and {CODEBOOKS}=CHOICE"
            )
        if parts.count(part) > 1:
            raise UsageError(f"method {name!r}: part {part!r} is named twice; name it once")
        chosen[part] = _value(name, sign, part, value)
    return replace(Recipe(), **chosen)


def _value(name: str, sign: str, part: str, value: str) -> bool | str:
    """On or off, or whose the codebooks are."""
    if part != CODEBOOKS and value:
        raise UsageError(f"method {name!r}: part {part!r} is on or off, found {value!r}; write +{part} or -{part}")
    if part != CODEBOOKS:
        return sign == "+"
    if sign != "+" or value[1:] not in CHOICES:
        raise UsageError(
            f"method {name!r}: expected +{CODEBOOKS}= and one of {', '.join(CHOICES)}, found {sign}{part}{value}"
        )
    return value[1:]
