"""Calibration pictures held out: all questions about a picture are on one side, so that nothing is judged on a picture
that it was fitted to.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from toolchain.calibration.inputs import CalibrationInput

GATED = 4  # every so many-th picture weighs the groups and gates descent
JUDGED = 4  # every so many-th picture judges what is fitted after the sweep


def picture_numbers(inputs: Sequence[CalibrationInput]) -> list[int]:
    """Which picture every sample is about: 0, 1, … in the order in which they first come."""
    order: dict[bytes, int] = {}
    return [order.setdefault(one.picture_digest, len(order)) for one in inputs]


def parted(owners: Sequence[int], apart: Collection[int]) -> tuple[list[int], list[int]]:
    """(places of the samples about other pictures, places of those about the pictures `apart`)."""
    sides: tuple[list[int], list[int]] = ([], [])
    for place, owner in enumerate(owners):
        sides[owner in apart].append(place)
    return sides


def gate_samples(inputs: Sequence[CalibrationInput]) -> list[int]:
    """Places of the samples about every GATED-th picture, from the second on: their gradients weigh the groups, gate
    descent, and are in no output curvature.

    With fewer than GATED pictures, all samples: gradients of one or two pictures say less of the others than all of
    them say of themselves. What is weighed is then weighed on the training data, and no S_o can be fitted.
    """
    owners = picture_numbers(inputs)
    pictures = len(set(owners))
    return list(range(len(owners))) if pictures < GATED else parted(owners, range(1, pictures, GATED))[1]


def refinement_split(inputs: Sequence[CalibrationInput]) -> tuple[list[int], list[int], int]:
    """(samples fitted to, samples that judge, pictures held out) of all that is fitted to a whole quantized model:
    every JUDGED-th picture judges Jacobi rounds and fine-tuning alike.

    One split for both, since they follow each other: what the one was fitted to cannot say what the other is worth.
    With fewer than JUDGED pictures both parts are all of the samples, and no picture is held out.
    """
    owners = picture_numbers(inputs)
    pictures = len(set(owners))
    if pictures < JUDGED:
        return list(range(len(owners))), list(range(len(owners))), 0
    apart = range(JUDGED - 1, pictures, JUDGED)
    return *parted(owners, apart), len(apart)
