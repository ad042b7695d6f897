"""Pictures held out: none is on both sides, and too few are said."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from toolchain.errors import InputDataError
from toolchain.held_out import GATED, drawn_pictures, every_nth_picture, gate_samples


def of_picture(number):
    return SimpleNamespace(tensors={"pixel_values": torch.full((2, 2), float(number)), "input_ids": torch.ones(1)})


def test_no_picture_is_split():
    pictures = [0, 1, 2, 3, 0, 3, 4, 5, 6, 7, 7, 1]
    fit, apart = every_nth_picture([of_picture(number) for number in pictures], 4)
    assert sorted(fit + apart) == list(range(12))
    assert {pictures[number] for number in apart} == {3, 7}
    assert not {pictures[number] for number in apart} & {pictures[number] for number in fit}


def test_refuses_too_few_pictures():
    with pytest.raises(InputDataError, match="at least 4 different pictures, found 2"):
        every_nth_picture([of_picture(number % 2) for number in range(10)], 4)


def test_a_gates_pictures_are_on_one_side_however_the_questions_come():
    pictures = [0, 1, 1, 2, 0, 3, 4, 5, 2, 5, 6, 1]
    held = gate_samples([of_picture(number) for number in pictures])
    assert {pictures[place] for place in held} == {1, 5}
    assert not {pictures[place] for place in held} & {p for place, p in enumerate(pictures) if place not in held}


def test_with_one_question_a_picture_the_gate_takes_every_fourth_sample():
    for count in (4, 5, 9, 12):
        assert gate_samples([of_picture(number) for number in range(count)]) == list(range(1, count, GATED))


def test_a_gate_with_too_few_pictures_takes_all_samples():
    assert gate_samples([of_picture(number % 3) for number in range(10)]) == list(range(10))


def test_a_drawn_picture_is_never_on_both_sides():
    owners = [0, 1, 2, 3, 4, 5] * 2
    inputs = [of_picture(number) for number in owners]
    for seed in range(5):
        train, held, pictures = drawn_pictures(inputs, 0.4, seed)
        assert sorted(train + held) == list(range(12))
        sides = [{owners[place] for place in part} for part in (train, held)]
        assert not sides[0] & sides[1]
        assert len(sides[1]) == pictures == 2
    assert drawn_pictures(inputs, 0.4, 0) == drawn_pictures(inputs, 0.4, 0)
    assert len({tuple(drawn_pictures(inputs, 0.4, seed)[1]) for seed in range(9)}) > 1


def test_too_few_pictures_are_all_trained_on():
    everything = list(range(8))
    assert drawn_pictures([of_picture(number % 4) for number in range(8)], 0.2, 0) == (everything, everything, 0)
    assert drawn_pictures([of_picture(number) for number in range(8)], 0.0, 0) == (everything, everything, 0)
