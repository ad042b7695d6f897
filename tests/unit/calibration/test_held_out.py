"""Images held out: none is on both sides, and with too few all are on both."""

from __future__ import annotations

import torch

from toolchain.calibration.held_out import GATED, gate_samples, refinement_split
from toolchain.calibration.inputs import CalibrationInput
from toolchain.quantize.refine import finetune, rounds


def of_image(number):
    tensors = {"pixel_values": torch.full((2, 2), float(number)), "input_ids": torch.ones(1)}
    return CalibrationInput(tensors, torch.ones(1, dtype=torch.bool))


def test_rounds_and_tuning_have_one_split_and_no_image_on_both_sides():
    images = [0, 1, 2, 3, 0, 3, 4, 5, 6, 7, 7, 1]
    fit, apart, count = refinement_split([of_image(number) for number in images])
    assert sorted(fit + apart) == list(range(12))
    assert {images[number] for number in apart} == {3, 7}
    assert count == 2
    assert not {images[number] for number in apart} & {images[number] for number in fit}
    for module in (finetune, rounds):
        assert module.refinement_split is refinement_split


def test_with_too_few_images_all_are_fitted_to_and_judge():
    everything = list(range(8))
    assert refinement_split([of_image(number % 3) for number in range(8)]) == (everything, everything, 0)
    assert refinement_split([of_image(number % 4) for number in range(8)])[2] == 1


def test_a_gates_images_are_on_one_side_however_the_questions_come():
    images = [0, 1, 1, 2, 0, 3, 4, 5, 2, 5, 6, 1]
    held = gate_samples([of_image(number) for number in images])
    assert {images[place] for place in held} == {1, 5}
    assert not {images[place] for place in held} & {p for place, p in enumerate(images) if place not in held}


def test_with_one_question_a_image_the_gate_takes_every_fourth_sample():
    for count in (4, 5, 9, 12):
        assert gate_samples([of_image(number) for number in range(count)]) == list(range(1, count, GATED))


def test_a_gate_with_too_few_images_takes_all_samples():
    assert gate_samples([of_image(number % 3) for number in range(10)]) == list(range(10))
