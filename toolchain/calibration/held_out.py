"""Calibration images held out: all questions about an image are on one side, so that nothing is judged on an image
that it was fitted to.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from toolchain.calibration.inputs import CalibrationInput

GATED = 4  # every so many-th image weighs the groups and gates descent
JUDGED = 4  # every so many-th image judges what is fitted after the sweep


def image_numbers(inputs: Sequence[CalibrationInput]) -> list[int]:
    """Which image every sample is about: 0, 1, … in the order in which they first come."""
    order: dict[bytes, int] = {}
    return [order.setdefault(one.image_digest, len(order)) for one in inputs]


def parted(owners: Sequence[int], apart: Collection[int]) -> tuple[list[int], list[int]]:
    """(places of the samples about other images, places of those about the images `apart`)."""
    sides: tuple[list[int], list[int]] = ([], [])
    for place, owner in enumerate(owners):
        sides[owner in apart].append(place)
    return sides


def gate_samples(inputs: Sequence[CalibrationInput]) -> list[int]:
    """Places of the samples about every GATED-th image, from the second on: their gradients weigh the groups, gate
    descent, and are in no output curvature.

    With fewer than GATED images, all samples: gradients of one or two images say less of the others than all of
    them say of themselves. What is weighed is then weighed on the training data, and no S_o can be fitted.
    """
    owners = image_numbers(inputs)
    images = len(set(owners))
    return list(range(len(owners))) if images < GATED else parted(owners, range(1, images, GATED))[1]


def refinement_split(inputs: Sequence[CalibrationInput]) -> tuple[list[int], list[int], int]:
    """(samples fitted to, samples that judge, images held out) of all that is fitted to a whole quantized model:
    every JUDGED-th image judges Jacobi rounds and fine-tuning alike.

    One split for both, since they follow each other: what the one was fitted to cannot say what the other is worth.
    With fewer than JUDGED images both parts are all of the samples, and no image is held out.
    """
    owners = image_numbers(inputs)
    images = len(set(owners))
    if images < JUDGED:
        return list(range(len(owners))), list(range(len(owners))), 0
    apart = range(JUDGED - 1, images, JUDGED)
    return *parted(owners, apart), len(apart)
