"""Interleaving: a permutation in which position j of every vector holds the same band of ranks, highest-energy
vectors first.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toolchain.errors import NumericGateError, ShapeError
from toolchain.vq.interleave import interleave_units, interleaved_permutation

# Ranks, most energy first: columns 1, 7, 0, 5, 3, 2, 6, 4.
ENERGIES = torch.tensor([5.0, 9.0, 2.0, 3.0, 0.0, 4.0, 1.0, 8.0])

PLACES = {1: (0,), 2: (0, 1), 3: (0, 1, 2), 4: (0, 2, 1, 3)}


@st.composite
def columns(draw):
    """(energies float32[n] with ties, V)."""
    vector, vectors = draw(st.sampled_from([1, 2, 3, 4])), draw(st.integers(1, 12))
    values = draw(st.lists(st.integers(0, 9), min_size=vector * vectors, max_size=vector * vectors))
    return torch.tensor(values, dtype=torch.float32), vector


def test_pairs_worked_by_hand():
    assert interleaved_permutation(ENERGIES, 2).tolist() == [1, 3, 7, 2, 0, 6, 5, 4]


def test_quads_worked_by_hand():
    assert interleaved_permutation(ENERGIES, 4).tolist() == [1, 3, 0, 6, 7, 2, 5, 4]


@given(columns())
def test_rank_q_is_where_the_formula_puts_it(problem):
    energies, vector = problem
    size = len(energies)
    order = interleaved_permutation(energies, vector).tolist()
    assert sorted(order) == list(range(size))
    ranked = sorted(range(size), key=lambda column: (-float(energies[column]), column))
    for rank, column in enumerate(ranked):
        place = (rank % (size // vector)) * vector + PLACES[vector][rank * vector // size]
        assert order[place] == column


@given(columns())
def test_a_position_holds_one_band_of_ranks_and_vectors_get_quieter(problem):
    energies, vector = problem
    interleaved = energies[interleaved_permutation(energies, vector)].reshape(-1, vector)
    bands = energies.sort(descending=True).values.reshape(vector, -1)
    assert torch.equal(interleaved.T[list(PLACES[vector])], bands)


@given(st.lists(st.integers(0, 9), min_size=16, max_size=16))
def test_the_halves_of_interleaved_quads_are_interleaved_pairs(values):
    energies = torch.tensor(values, dtype=torch.float32)
    pairs = energies[interleaved_permutation(energies, 4)].reshape(-1, 2)
    louder, quieter = energies.sort(descending=True).values.reshape(2, -1)
    assert float(pairs[:, 0].min()) >= float(louder.min())
    assert float(pairs[:, 1].max()) <= float(quieter.max())


def test_units_are_interleaved_on_their_own():
    energies = torch.stack([ENERGIES, ENERGIES.flip(0), torch.zeros(8)])
    found = interleave_units(energies, 4)
    assert torch.equal(found, torch.stack([interleaved_permutation(row, 4) for row in energies]))
    assert found[2].tolist() == [0, 4, 2, 6, 1, 5, 3, 7], "ties go by index"


@pytest.mark.parametrize(("shape", "vector"), [((6,), 4), ((8,), 0), ((2, 4), 2)])
def test_what_cannot_be_interleaved_is_refused(shape, vector):
    with pytest.raises(ShapeError, match=r"expected energies float\[.*found shape \["):
        interleaved_permutation(torch.ones(shape), vector)


def test_energies_that_are_not_numbers_are_refused():
    with pytest.raises(NumericGateError, match="found 2 of 4 that are not"):
        interleaved_permutation(torch.tensor([1.0, float("nan"), 2.0, float("inf")]), 2)
