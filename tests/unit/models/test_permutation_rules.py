"""Energies, interleaving and refusals of column permutations, on permutations written by hand."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from toolchain.errors import NumericGateError, ShapeError
from toolchain.models.permutations import (
    FreePermutation,
    Place,
    apply_permutations,
    column_permutation,
    combined_energies,
    interleaved,
)

SHARED = FreePermutation(
    "attention", 4, 2, ("o",), (Place("o.weight", 1, 0, 2), Place("v.weight", 0), Place("v.bias", 0))
)  # two KV heads of two columns, two query heads each
STREAM = FreePermutation("stream", 2, 2, ("a", "merger"), (Place("a.weight", 1), Place("merger.weight", 1, 0, 2)))


def test_energies_of_shared_columns_worked_by_hand():
    # Means over the two query heads of each KV head: (2, 4 | 6, 8), of mean 5.
    diagonal = torch.tensor([1.0, 3, 3, 5, 6, 9, 6, 7])
    found = combined_energies(SHARED, {"o": diagonal})
    torch.testing.assert_close(found, torch.tensor([2.0, 4, 6, 8]) / 5)


def test_readers_weigh_alike_whatever_their_scale():
    diagonals = {"a": torch.tensor([1.0, 3.0]), "merger": 1000 * torch.tensor([2.0, 0, 1, 1])}
    torch.testing.assert_close(combined_energies(STREAM, diagonals), torch.tensor([1.0, 1.0]))
    weighted = combined_energies(STREAM, diagonals, {"merger": 3.0})
    torch.testing.assert_close(weighted, (torch.tensor([0.5, 1.5]) + 3 * torch.tensor([1.5, 0.5])) / 4)
    only = combined_energies(STREAM, {"a": diagonals["a"]}, {"merger": 0.0})
    torch.testing.assert_close(only, torch.tensor([0.5, 1.5]))


def test_dealing_stays_inside_units():
    energies = torch.tensor([1.0, 2.0, 4.0, 3.0])
    assert interleaved(SHARED, energies, 2).tolist() == [1, 0, 2, 3]
    assert interleaved(replace(SHARED, unit=4), energies, 2).tolist() == [2, 1, 3, 0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: combined_energies(STREAM, {"a": torch.ones(2)}), ShapeError, "4 energies for merger, found none"),
        (lambda: combined_energies(SHARED, {"o": torch.ones(4)}), ShapeError, r"8 energies for o, found \[4\]"),
        (lambda: combined_energies(SHARED, {"o": torch.zeros(8)}), NumericGateError, "layer o: .* found 0"),
        (lambda: combined_energies(SHARED, {}, {"o": 0.0}), ShapeError, "expected weights of at least 0"),
        (lambda: interleaved(SHARED, torch.ones(3), 2), ShapeError, r"expected 4 energies, found shape \[3\]"),
        (lambda: interleaved(SHARED, torch.ones(4), 4), ShapeError, "multiple of V = 4"),
        (lambda: column_permutation(SHARED, "v", torch.arange(4)), ShapeError, r"readers \['o'\], found 'v'"),
    ],
)
def test_wrong_energies_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


class Attention(torch.nn.Module):
    def __init__(self, rows=4):
        super().__init__()
        self.v, self.o = torch.nn.Linear(3, rows), torch.nn.Linear(8, 3)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (torch.tensor([1, 2, 0, 3]), "permutation inside every unit of 2"),
        (torch.tensor([0, 0, 2, 3]), "permutation inside every unit of 2"),
        (torch.arange(4).int(), r"expected int64\[4\], found torch.int32\[4\]"),
        (torch.arange(8), r"found torch.int64\[8\]"),
    ],
)
def test_what_is_not_an_order_is_refused(order, message):
    with pytest.raises(ShapeError, match=message):
        apply_permutations(Attention(), {"attention": order}, [SHARED])


@pytest.mark.parametrize(
    ("free", "rows", "message"),
    [
        (SHARED, 6, r"v\.weight: expected 4 along axis 0, found \[6, 3\]"),
        (replace(SHARED, places=SHARED.places[:2]), 4, r"v\.weight: its rows move but v\.bias would stay"),
        (replace(SHARED, places=(*SHARED.places, Place("w.bias", 0))), 4, r"w\.bias: expected it in the model"),
    ],
)
def test_a_model_that_does_not_fit_is_left_as_it_was(free, rows, message):
    model = Attention(rows)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ShapeError, match=message):
        apply_permutations(model, {"attention": torch.tensor([1, 0, 2, 3])}, [free])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_an_unknown_order_is_refused():
    with pytest.raises(ShapeError, match=r"expected permutations among \['attention'\], found \['mlp'\]"):
        apply_permutations(Attention(), {"mlp": torch.arange(4)}, [SHARED])
