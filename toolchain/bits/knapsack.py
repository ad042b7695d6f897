"""Which choice every unit gets, so that the losses add up to the least that a budget allows. NumPy only.

The multiple-choice knapsack: of every unit's choices (cost, loss) take one; costs add up to the budget or less. A
choice that costs as much as another and loses as much or more is never taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from toolchain.errors import BudgetError, NumericGateError, ShapeError

# Cells (units × cost quanta) of the table of the dynamic programme, a byte each: 32 MiB, and 0.2 s on one core for 112
# units of five choices. Below LEAST_QUANTA the rounding of costs loses more than the exact search gains.
TABLE_CELLS = 1 << 25
LEAST_QUANTA = 1000


@dataclass(frozen=True)
class Choice:
    """One thing a unit can have: what it costs, in any whole unit, and the loss it leaves."""

    cost: int
    loss: float


@dataclass(frozen=True)
class Allocation:
    """The index of every unit's choice, what they cost and lose together, and how they were found.

    `how` is "exact" (no allocation within the budget loses less), "rounded" (none would if costs were whole quanta,
    rounded up) or "hull" (greedy on the lower convex hull, then what still fits).
    """

    chosen: tuple[int, ...]
    cost: int
    loss: float
    how: str


@dataclass(frozen=True)
class _Option:
    """A choice that is worth having, by its index among all of the unit's."""

    index: int
    cost: int
    loss: float


def allocate(units: Sequence[Sequence[Choice]], budget: int, *, cells: int = TABLE_CELLS) -> Allocation:
    """The allocation of least loss within `budget`: exact where a table of at most `cells` cells holds the problem.

    Costs are counted in their greatest common divisor where that fits the table, else in the finest quantum that does
    and rounded up, and the better of that and the hull is taken; the hull alone where fewer than LEAST_QUANTA fit. More
    budget never gives more loss.

    Raises:
        BudgetError: not even the cheapest choices fit; it says by how much.
        NumericGateError: a loss is not finite.
        ShapeError: a unit without choices, or a negative cost.
    """
    options = _worthwhile(units, budget)
    step = _common_step(options)
    room = cells // max(1, len(units))
    span = sum(unit[-1].cost - unit[0].cost for unit in options)
    if span // step <= room:
        return _exact(options, budget, step, "exact")
    hull = _hull(options, budget)
    if room < LEAST_QUANTA:
        return hull
    rounded = _exact(options, budget, -(-span // room), "rounded")
    return rounded if rounded.loss <= hull.loss else hull


def _worthwhile(units: Sequence[Sequence[Choice]], budget: int) -> list[list[_Option]]:
    """Every unit's choices from cheapest to dearest, without those that a cheaper one equals or betters."""
    kept = []
    for number, choices in enumerate(units):
        _check_choices(number, choices)
        options: list[_Option] = []
        for index in sorted(range(len(choices)), key=lambda i: (choices[i].cost, choices[i].loss, i)):
            if not options or choices[index].loss < options[-1].loss:
                options.append(_Option(index, choices[index].cost, choices[index].loss))
        kept.append(options)
    least = sum(options[0].cost for options in kept)
    if least > budget:
        raise BudgetError(
            f"budget {budget:,}: the cheapest choice of all {len(units)} units costs {least:,}, {least - budget:,} too "
            "much; raise the budget or offer cheaper choices"
        )
    return kept


def _check_choices(number: int, choices: Sequence[Choice]) -> None:
    if not choices:
        raise ShapeError(f"unit {number}: expected at least one choice, found none")
    for choice in choices:
        if choice.cost < 0:
            raise ShapeError(f"unit {number}: expected costs of 0 or more, found {choice.cost}")
        if not math.isfinite(choice.loss):
            raise NumericGateError(
                f"unit {number}: expected a finite loss at cost {choice.cost:,}, found {choice.loss}; look at the "
                "metric that measured it"
            )


def _common_step(options: list[list[_Option]]) -> int:
    """Greatest common divisor of what choices cost above the cheapest; 1 where nothing can be chosen."""
    return math.gcd(*(option.cost - unit[0].cost for unit in options for option in unit)) or 1


def _exact(options: list[list[_Option]], budget: int, quantum: int, how: str) -> Allocation:
    """Dynamic programming over the cost above that of the cheapest choices, in steps of `quantum`, rounded up.

    best_u(q) = min over choices c of best_{u-1}(q − cost_c) + loss_c: units · choices · quanta operations, and a byte
    of memory for each unit and quantum.
    """
    steps = [[-(-(option.cost - unit[0].cost) // quantum) for option in unit] for unit in options]
    spare = budget - sum(unit[0].cost for unit in options)
    quanta = min(spare // quantum, sum(costs[-1] for costs in steps))
    best = np.zeros(quanta + 1)  # best[q]: least loss of the units so far for q quanta or fewer
    taken = np.zeros((len(options), quanta + 1), dtype=np.min_scalar_type(max(map(len, options), default=1)))
    for row, unit, costs in zip(taken, options, steps):
        found = best + unit[0].loss
        for place, (option, cost) in enumerate(zip(unit[1:], costs[1:]), start=1):
            if cost > quanta:
                break
            offered = best[: quanta + 1 - cost] + option.loss
            better = offered < found[cost:]
            np.copyto(found[cost:], offered, where=better)
            row[cost:][better] = place
        best = found
    chosen: list[_Option] = []
    for row, unit, costs in zip(reversed(taken), reversed(options), reversed(steps)):
        place = int(row[quanta])
        quanta -= costs[place]
        chosen.insert(0, unit[place])
    return _allocation(chosen, how)


def _hull(options: list[list[_Option]], budget: int) -> Allocation:
    """Greedy: every unit starts at its cheapest choice; the step of most loss per cost that fits is taken, and again.

    Steps run along the lower convex hull of a unit's choices, and go to any choice once the next of the hull no longer
    fits. Its loss is above the least by less than one step's worth. Among equal steps the cheapest goes first, then
    the first unit.
    """
    places = [0] * len(options)
    left = budget - sum(unit[0].cost for unit in options)
    while True:
        steps = [
            step for n, (unit, place) in enumerate(zip(options, places)) for step in _steps_from(n, unit, place, left)
        ]
        if not steps:
            return _allocation([unit[place] for unit, place in zip(options, places)], "hull")
        _, negative_cost, negative_number, place = max(steps)
        left += negative_cost
        places[-negative_number] = place


def _steps_from(number: int, unit: list[_Option], place: int, left: int) -> list[tuple[float, int, int, int]]:
    """(loss taken per cost, −cost, −unit number, new place) of every step from here that fits: the greatest is best.

    While the whole unit fits, the greatest is the next of the convex hull.
    """
    here = unit[place]
    found = []
    for later in range(place + 1, len(unit)):
        cost = unit[later].cost - here.cost
        if cost <= left:
            found.append(((here.loss - unit[later].loss) / cost, -cost, -number, later))
    return found


def _allocation(taken: list[_Option], how: str) -> Allocation:
    loss = math.fsum(option.loss for option in taken)
    return Allocation(tuple(option.index for option in taken), sum(option.cost for option in taken), loss, how)
