"""Allocation under a budget, against every combination tried one by one."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain.bits.knapsack import Choice, allocate
from toolchain.errors import BudgetError, NumericGateError, ShapeError

choices = st.builds(Choice, st.integers(0, 60), st.floats(0.0, 100.0))
problems = st.lists(st.lists(choices, min_size=1, max_size=4), min_size=1, max_size=5)


def hull(units, budget):
    """By the hull alone: no cell is left for anything else."""
    return allocate(units, budget, cells=0)


SOLVERS = (allocate, hull, lambda u, b: allocate(u, b, cells=len(u) * 1000))


def least_cost(units) -> int:
    return sum(min(choice.cost for choice in unit) for unit in units)


def brute_force(units, budget: int) -> float:
    """Least loss over all combinations within the budget."""
    totals = [(sum(c.cost for c in one), math.fsum(c.loss for c in one)) for one in itertools.product(*units)]
    return min(loss for cost, loss in totals if cost <= budget)


def rising(seed: int, units: int) -> list[list[Choice]]:
    """Units of uneven sizes whose losses fall with bits, as trials would give them."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(units):
        size, sensitivity = int(rng.integers(500, 5_000)), float(rng.lognormal(0, 2))
        made.append([Choice(int(size * bits) + 7, sensitivity * 4**-bits) for bits in (1.5, 2, 2.5, 3, 4)])
    return made


@settings(max_examples=200, deadline=None)
@given(problems, st.integers(0, 150))
def test_the_exact_allocation_is_the_best_of_all(units, spare):
    budget = least_cost(units) + spare
    found = allocate(units, budget)
    assert found.how == "exact"
    assert found.loss == pytest.approx(brute_force(units, budget), rel=1e-12, abs=1e-12)


@settings(max_examples=150, deadline=None)
@given(problems, st.integers(0, 150))
def test_what_is_said_is_what_was_chosen_and_fits(units, spare):
    budget = least_cost(units) + spare
    for found in [solve(units, budget) for solve in SOLVERS]:
        taken = [unit[index] for unit, index in zip(units, found.chosen, strict=True)]
        assert found.cost == sum(choice.cost for choice in taken) <= budget
        assert found.loss == math.fsum(choice.loss for choice in taken)


@settings(max_examples=150, deadline=None)
@given(problems, st.integers(0, 150), st.integers(0, 40))
def test_more_budget_never_gives_more_loss(units, spare, more):
    budget = least_cost(units) + spare
    for solve in SOLVERS:
        assert solve(units, budget + more).loss <= solve(units, budget).loss * (1 + 1e-12)


@settings(max_examples=150, deadline=None)
@given(problems, st.integers(0, 150))
def test_exact_is_never_worse_than_the_hull(units, spare):
    budget = least_cost(units) + spare
    assert allocate(units, budget).loss <= hull(units, budget).loss * (1 + 1e-12)


def test_where_greedy_goes_wrong_by_hand():
    # Greedy takes the 6 for 7 (1.17 per cost) and then nothing fits; the two fives take 10.
    units = [[Choice(0, 7.0), Choice(6, 0.0)], [Choice(0, 5.0), Choice(5, 0.0)], [Choice(0, 5.0), Choice(5, 0.0)]]
    assert (hull(units, 10).chosen, hull(units, 10).loss) == ((1, 0, 0), 10.0)
    assert (allocate(units, 10).chosen, allocate(units, 10).loss) == ((0, 1, 1), 7.0)


def test_the_hull_spends_what_is_left_on_choices_off_the_hull():
    # (2, 8) lies above the line from (0, 10) to (10, 0): nothing of the hull fits a budget of 5, and it does.
    units = [[Choice(0, 10.0), Choice(2, 8.5), Choice(10, 0.0)]]
    assert hull(units, 5).chosen == (1,)
    assert hull(units, 10).chosen == (2,)


def test_equal_steps_go_to_the_cheapest_then_to_the_first():
    units = [[Choice(0, 4.0), Choice(4, 0.0)], [Choice(0, 2.0), Choice(2, 0.0)], [Choice(0, 2.0), Choice(2, 0.0)]]
    assert hull(units, 2).chosen == (0, 1, 0)


def test_a_choice_that_costs_more_for_nothing_is_not_taken():
    units = [[Choice(5, 1.0), Choice(3, 1.0), Choice(9, 2.0)]]
    for solve in SOLVERS:
        assert solve(units, 100).chosen == (1,)


def test_the_common_divisor_of_costs_makes_large_problems_exact():
    unit = 1 << 22
    units = [[Choice(bits * unit * (1 + n % 3) + n, 4.0**-bits) for bits in (2, 3, 4)] for n in range(40)]
    found = allocate(units, 3 * sum(choices[0].cost for choices in units) // 2)
    assert found.how == "exact"
    assert allocate(units, 10**12).how == "exact"


def test_rounded_costs_are_near_the_exact_ones_and_the_result_says_so():
    units = rising(0, 40)
    budget = int(1.4 * least_cost(units))
    exact, rounded = allocate(units, budget), allocate(units, budget, cells=1 << 21)
    assert (exact.how, rounded.how) == ("exact", "rounded")
    assert allocate(units, budget, cells=100) == hull(units, budget)
    assert exact.loss <= rounded.loss <= hull(units, budget).loss
    assert rounded.loss <= 1.001 * exact.loss


@pytest.mark.parametrize("solve", SOLVERS)
def test_what_does_not_fit_is_refused_with_the_difference(solve):
    units = [[Choice(1_000, 1.0), Choice(2_000, 0.5)], [Choice(500, 1.0)]]
    assert solve(units, 1_500).chosen == (0, 0)
    with pytest.raises(BudgetError, match=r"budget 1,400: .* costs 1,500, 100 too much"):
        solve(units, 1_400)


def test_broken_problems_are_named():
    with pytest.raises(NumericGateError, match="unit 1: expected a finite loss at cost 3, found nan"):
        allocate([[Choice(0, 0.0)], [Choice(3, math.nan)]], 10)
    with pytest.raises(ShapeError, match="unit 0: expected at least one choice"):
        allocate([[]], 10)
    with pytest.raises(ShapeError, match="unit 0: expected costs of 0 or more, found -1"):
        allocate([[Choice(-1, 0.0)]], 10)
