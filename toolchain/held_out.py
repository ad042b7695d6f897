"""Calibration pictures held out: all questions about a picture are on one side, so that nothing is judged on a picture
that it was fitted to.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from toolchain.calibration import CalibrationInput, picture_digest
from toolchain.errors import InputDataError

GATED = 4  # every so many-th picture weighs the groups and gates descent
FEWEST_PICTURES = 5  # with fewer, what a drawn share holds out would say nothing


def picture_numbers(inputs: Sequence[CalibrationInput]) -> list[int]:
    """Which picture every sample is about: 0, 1, … in the order in which they first come."""
    order: dict[bytes, int] = {}
    return [order.setdefault(picture_digest(one), len(order)) for one in inputs]


def parted(owners: Sequence[int], apart: Collection[int]) -> tuple[list[int], list[int]]:
    """(places of the samples about other pictures, places of those about the pictures `apart`)."""
    sides: tuple[list[int], list[int]] = ([], [])
    for place, owner in enumerate(owners):
        sides[owner in apart].append(place)
    return sides


def every_nth_picture(inputs: Sequence[CalibrationInput], every: int) -> tuple[list[int], list[int]]:
    """(samples fitted to, samples held out): every so many-th picture is held out.

    Raises:
        InputDataError: there are too few pictures to hold one out.
    """
    owners = picture_numbers(inputs)
    count = len(set(owners))
    if count < every:
        raise InputDataError(
            f"a Jacobi round holds every {every}th calibration picture out: expected at least {every} different "
            f"pictures, found {count}; add pictures, or leave rounds out"
        )
    return parted(owners, range(every - 1, count, every))


def gate_samples(inputs: Sequence[CalibrationInput]) -> list[int]:
    """Places of the samples about every GATED-th picture, from the second on: their gradients weigh the groups, gate
    descent, and are in no output curvature.

    With fewer than GATED pictures, all samples: gradients of one or two pictures say less of the others than all of
    them say of themselves. What is weighed is then weighed on the training data, and no S_o can be fitted.
    """
    owners = picture_numbers(inputs)
    pictures = len(set(owners))
    return list(range(len(owners))) if pictures < GATED else parted(owners, range(1, pictures, GATED))[1]


def drawn_pictures(inputs: Sequence[CalibrationInput], share: float, seed: int) -> tuple[list[int], list[int], int]:
    """(samples trained on, samples held out, pictures held out), a share of the pictures drawn by the seed.

    With fewer than FEWEST_PICTURES pictures, or a share of 0, both are all of the samples and no picture is held out.
    """
    owners = picture_numbers(inputs)
    pictures = len(set(owners))
    if pictures < FEWEST_PICTURES or share == 0:
        return list(range(len(owners))), list(range(len(owners))), 0
    count = max(1, round(share * pictures))
    order = torch.randperm(pictures, generator=torch.Generator().manual_seed(seed)).tolist()
    return *parted(owners, set(order[:count])), count
