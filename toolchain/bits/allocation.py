"""Which code every group of layers gets for an average of index bits or for a size. No framework.

Index bits are counted in quarters, which every code has whole; sizes in bytes, as `bitplan.real_bits` counts them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from toolchain.bits.codebook_sharing import shared_codebook_id
from toolchain.errors import BudgetError, NumericGateError, UsageError
from toolchain.values import CODE_NAMES, CODES, parse_format

CODES_BY_BITS: dict[float, str] = {2: "4,8,8", 3: "2,6,6", 4: "2,8,8"}
# Less error for the same bits and a longer search, and rates that plain codes lack.
OVERLAPPING_BY_BITS: dict[float, str] = {1.5: "2,3,8", 2: "2,4,8", 2.5: "2,5,8", 3: "2,6,8", 4: "2,8,9"}
LOWEST_BITS, LOWEST_PLAIN_BITS = min(OVERLAPPING_BY_BITS), min(CODES_BY_BITS)
HIGHEST_BITS = max(CODES_BY_BITS)
DEFAULT_BITS = 2.0  # asked for where a command names neither bits nor a budget
SCALE_BYTES = 2  # a row scale is float16
QUARTERS = 4

Losses = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Group:
    """Layers that share code and codebook: (rows, columns) of those that store codes; `code` where an override says;
    `owner` of the codebooks where other groups use them too (`codebook_sharing`).
    """

    shapes: tuple[tuple[int, int], ...]
    code: str | None = None
    owner: str | None = None

    @property
    def weights(self) -> int:
        return sum(rows * columns for rows, columns in self.shapes)

    def index_quarters(self, code: str) -> int:
        """Index bits, in quarters of a bit, of a code or of segments (`values.parse_format`)."""
        return sum(
            rows * segment.columns * segment.code.shift * QUARTERS // segment.code.vector
            for rows, columns in self.shapes
            for segment in parse_format(code, columns)
        )

    def bytes(self, code: str) -> int:
        """Codes with their padding, row scales and the one codebook, unless it is shared; all three of every
        segment.
        """
        codes = sum(
            segment.code.codes_bytes(rows, segment.columns) + SCALE_BYTES * rows
            for rows, columns in self.shapes
            for segment in parse_format(code, columns)
        )
        own = () if self.owner else parse_format(code, self.shapes[0][1])
        return codes + sum(segment.code.codebook_bytes for segment in own)

    def shared_codebooks(self, code: str) -> dict[str, int]:
        """Id → bytes of the codebooks that it shares with other groups; none where it has its own."""
        shared = [segment.code for segment in parse_format(code, self.shapes[0][1])] if self.owner else []
        return {shared_codebook_id(str(self.owner), one): one.codebook_bytes for one in shared}


def codes_for_average(
    groups: Mapping[str, Group], bits: float, sensitivity: Mapping[str, float], overlapping: bool
) -> dict[str, str]:
    """Group → code, with index bits at or below `bits` on average, bought greedily.

    All start at the lowest rate, and the upgrade that takes most loss per bit is bought while one fits, the loss at b
    bits taken as sensitivity · 4⁻ᵇ. Among equals the smallest group goes first, so that as many as possible are raised.

    Raises:
        UsageError: bits out of range, a sensitivity of an unknown group, or overrides that alone exceed `bits`.
    """
    ladder = OVERLAPPING_BY_BITS if overlapping else CODES_BY_BITS
    rates = sorted(ladder)
    if not rates[0] <= bits <= rates[-1]:
        more = "" if overlapping or bits > HIGHEST_BITS else f"; {LOWEST_BITS:g} with codes of overlapping windows"
        raise UsageError(
            f"bits {bits:g}: expected {rates[0]:g} to {rates[-1]:g}, the range that the codes "
            f"{' '.join(ladder.values())} span{more}; an override may name any code"
        )
    allowed = _quarters_allowed(groups, bits)
    level = {name: 0 for name, group in groups.items() if group.code is None}
    spent = sum(group.index_quarters(group.code or ladder[rates[0]]) for group in groups.values())
    if spent > allowed:
        least = spent / QUARTERS / _weights(groups)
        raise UsageError(
            f"bits {bits:g}: the overrides alone come to {least:.3f} with all else at {rates[0]:g}; ask for more, or "
            "override less"
        )
    per_weight = _loss_per_weight(groups, sensitivity)
    order = {name: index for index, name in enumerate(groups)}

    def price(name: str) -> int:
        step = ladder[rates[level[name] + 1]], ladder[rates[level[name]]]
        return groups[name].index_quarters(step[0]) - groups[name].index_quarters(step[1])

    def worth(name: str) -> tuple[float, int, int]:
        low, high = rates[level[name]], rates[level[name] + 1]
        return per_weight[name] * (4**-low - 4**-high) / (high - low), -price(name), -order[name]

    while open_groups := [n for n in level if level[n] + 1 < len(rates) and spent + price(n) <= allowed]:
        best = max(open_groups, key=worth)
        spent += price(best)
        level[best] += 1
    return {name: group.code or ladder[rates[level[name]]] for name, group in groups.items()}


def codes_for_losses(groups: Mapping[str, Group], losses: Losses, bits: float) -> dict[str, str]:
    """Group → code of those its losses name, so that they add up to the least with index bits at or below `bits`.

    Raises:
        UsageError: losses miss a group or name an unknown one, `bits` is above the finest rate, or below what the
            cheapest codes come to.
        NumericGateError: a loss is negative or not finite.
    """
    offered = _offered(groups, losses)
    if bits > HIGHEST_BITS:
        raise UsageError(f"bits {bits:g}: expected at most {HIGHEST_BITS:g}, the bits of the finest codes")
    costs = {name: {c: groups[name].index_quarters(c) for c in codes} for name, codes in offered.items()}
    allowed, least = _quarters_allowed(groups, bits), sum(min(c.values()) for c in costs.values())
    if least > allowed:
        raise UsageError(
            f"bits {bits:g}: the cheapest codes that overrides and losses leave come to "
            f"{least / QUARTERS / _weights(groups):.3f}; ask for that or more, override less, or offer coarser codes"
        )
    return _cheapest_loss(offered, costs, allowed)


def codes_for_bytes(groups: Mapping[str, Group], losses: Losses, budget_bytes: int, kept_bytes: int) -> dict[str, str]:
    """Group → code of those its losses name, so that they add up to the least and the model fits `budget_bytes`.

    Room is set aside for every shared codebook that a code on offer uses, and the codes whose codebooks no group then
    takes are off the offer the next time, until all that is set aside is used. Where not all codebooks fit, every
    group's dearest code goes first: such a plan need not be the very best.

    Args:
        kept_bytes: what the tensors outside the groups take of the budget.

    Raises:
        BudgetError: the smallest codes are too large.
        UsageError, NumericGateError: as `codes_for_losses`, of losses.
    """
    offered = _offered(groups, losses)
    while True:
        costs = {name: {c: groups[name].bytes(c) for c in codes} for name, codes in offered.items()}
        codebooks = shared_codebooks(groups, offered)
        room = budget_bytes - kept_bytes - sum(codebooks.values())
        least = sum(min(c.values()) for c in costs.values())
        if least <= room:
            chosen = _cheapest_loss(offered, costs, room)
            used = shared_codebooks(groups, {name: [code] for name, code in chosen.items()})
            if used == codebooks:
                return chosen
            offered = {name: _of_codebooks(codes, groups[name], used) for name, codes in offered.items()}
        elif codebooks and any(len(codes) > 1 for codes in offered.values()):
            offered = {name: _without_dearest(codes, costs[name]) for name, codes in offered.items()}
        else:
            raise BudgetError(
                f"the smallest plan takes {least + budget_bytes - room:,} bytes ({kept_bytes:,} of them stay in 16 "
                f"bits), {least - room:,} more than the budget of {budget_bytes:,}; raise the budget to that, override "
                "less, or choose a smaller model"
            )


def shared_codebooks(groups: Mapping[str, Group], codes: Mapping[str, Iterable[str]]) -> dict[str, int]:
    """Id → bytes of all codebooks that groups share and that any of the codes given for them uses."""
    return {
        codebook: size
        for name, own in codes.items()
        for code in own
        for codebook, size in groups[name].shared_codebooks(code).items()
    }


def _of_codebooks(losses: Mapping[str, float], group: Group, codebooks: Mapping[str, int]) -> dict[str, float]:
    """The codes whose shared codebooks are all among these."""
    return {code: loss for code, loss in losses.items() if group.shared_codebooks(code).keys() <= codebooks.keys()}


def _without_dearest(losses: Mapping[str, float], costs: Mapping[str, int]) -> dict[str, float]:
    """The codes but the one that takes most bytes; the last one stays."""
    dearest = max(losses, key=costs.__getitem__)
    return {code: loss for code, loss in losses.items() if code != dearest or len(losses) == 1}


def modelled_losses(groups: Mapping[str, Group], sensitivity: Mapping[str, float], overlapping: bool) -> Losses:
    """Group → code → sensitivity · 4⁻ᵇ for the rates b there are; an average one of its size where it has none.

    Raises:
        UsageError: a sensitivity of an unknown group.
    """
    ladder = OVERLAPPING_BY_BITS if overlapping else CODES_BY_BITS
    per_weight = _loss_per_weight(groups, sensitivity)
    return {
        name: {code: per_weight[name] * group.weights * 4**-rate for rate, code in ladder.items()}
        for name, group in groups.items()
    }


def is_known_format(text: str) -> bool:
    """Whether every code of a format, one or those of segments, is one that is decoded everywhere."""
    return all(part.partition("@")[0] in CODES for part in text.split("+"))


def _cheapest_loss(offered: Losses, costs: Mapping[str, Mapping[str, int]], budget: int) -> dict[str, str]:
    from toolchain.bits.knapsack import Choice, allocate  # NumPy, which nothing else here needs

    units = [[Choice(costs[name][code], loss) for code, loss in codes.items()] for name, codes in offered.items()]
    chosen = allocate(units, budget).chosen
    return {name: list(codes)[index] for (name, codes), index in zip(offered.items(), chosen)}


def _offered(groups: Mapping[str, Group], losses: Losses) -> dict[str, dict[str, float]]:
    """Group → code → loss that it may choose from: the one its override says, at no loss, or those its losses name."""
    if unknown := sorted(set(losses) - set(groups)):
        raise UsageError(f"losses name groups that the model lacks: {', '.join(unknown[:3])}")
    offered = {}
    for name, group in groups.items():
        codes = {group.code: 0.0} if group.code else dict(losses.get(name, {}))
        if not codes:
            raise UsageError(
                f"group {name}: expected the losses of at least one code, found none; measure or override it"
            )
        for code, loss in codes.items():
            if not is_known_format(code):
                raise UsageError(f"losses of group {name}: unknown code {code}; use any of {' '.join(CODE_NAMES)}")
            if not (math.isfinite(loss) and loss >= 0):
                raise NumericGateError(
                    f"group {name}, code {code}: expected a finite loss of 0 or more, found {loss}; look at the "
                    "moments or gradients that measured it"
                )
        offered[name] = codes
    return offered


def _weights(groups: Mapping[str, Group]) -> int:
    return sum(group.weights for group in groups.values())


def _quarters_allowed(groups: Mapping[str, Group], bits: float) -> int:
    # A rate such as 2.1 has no exact binary form: the millionth keeps it from costing a group the last quarter bit.
    return math.floor(QUARTERS * bits * _weights(groups) + 1e-6)


def _loss_per_weight(groups: Mapping[str, Group], sensitivity: Mapping[str, float]) -> dict[str, float]:
    """Group → sensitivity per weight; those without one have the average of the others."""
    if unknown := sorted(set(sensitivity) - set(groups)):
        raise UsageError(f"sensitivity names groups that the model lacks: {', '.join(unknown[:3])}")
    known = {name: sensitivity[name] / groups[name].weights for name in sensitivity}
    average = sum(known.values()) / len(known) if known else 1.0
    return {name: known.get(name, average) for name in groups}
