"""Which K-segments a group may choose among: cuts of its columns, ordered by sensitivity, in codes of falling rate.

A candidate's loss is the sum of its units' (equation 17), each at the rate of the segment it falls in. A segmentation
is offered where a hull of all candidates has it, and the single codes' hull is beaten at its bits by LEAST_GAIN. No
framework.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations, pairwise

from toolchain.values import CODES, MOST_SEGMENTS, SEGMENT_STEP, VQCode, format_text, parse_format

WIDE_STEP = 256  # of layers of WIDE_COLUMNS and more: fewer units to measure, longer runs of one code for the kernel
WIDE_COLUMNS = 2048
LEAST_GAIN = 0.02  # of the loss of single codes at the same bits (mgvq-algorithm 3.5)

Losses = dict[str, float]
# (code, unit) → loss of the unit in that code.
UnitLoss = Callable[[str, int], float]


@dataclass(frozen=True)
class _Candidate:
    """A format, its index bits a weight, its loss."""

    text: str
    bits: float
    loss: float


def unit_widths(columns: int) -> list[int]:
    """Column counts of a layer's units, between which it may be cut; the last takes what is left."""
    step = WIDE_STEP if columns >= WIDE_COLUMNS else SEGMENT_STEP
    whole, left = divmod(columns, step)
    return [step] * whole + [left] * (left > 0)


def energy_spread(energies: Sequence[float]) -> float:
    """How many times the energy of a column in the lowest unit one in the highest has, from energies in falling
    order.
    """
    means, first = [], 0
    for width in unit_widths(len(energies)):
        means.append(sum(energies[first : first + width]) / width)
        first += width
    return max(means) / min(means) if min(means) > 0 else float("inf")


def segmented_losses(columns: int, codes: Iterable[str], loss: UnitLoss, single: Mapping[str, float]) -> Losses:
    """Format → loss of the segmentations worth offering beside the single codes.

    Args:
        columns: of the layers, in falling order of sensitivity.
        codes: to mix; earlier segments get the higher rate.
        loss: of every unit of `unit_widths`, in the unit of `single`.
        single: code → loss of the group in that code alone.
    """
    widths = unit_widths(columns)
    sums = {code: [0.0, *accumulate(loss(code, unit) for unit in range(len(widths)))] for code in codes}
    candidates = [_candidate(columns, widths, cut, sums) for cut in _cuts(len(widths), list(sums))]
    alone = [_Candidate(code, CODES[code].index_bits, value) for code, value in single.items()]
    known = _hull(alone)
    chosen = [one for one in _hull([*alone, *candidates]) if "+" in one.text]
    return {one.text: one.loss for one in chosen if one.loss <= (1 - LEAST_GAIN) * _at(known, one.bits)}


def _cuts(units: int, codes: list[str]) -> Iterator[list[tuple[str, int]]]:
    """Every choice of 2 to MOST_SEGMENTS codes of falling rate, each with the unit its segment ends before."""
    by_rate = sorted(codes, key=lambda code: -CODES[code].index_bits)
    for count in range(2, min(MOST_SEGMENTS, units) + 1):
        for chosen in combinations(by_rate, count):
            if len({CODES[code].index_bits for code in chosen}) < count:
                continue
            for ends in combinations(range(1, units), count - 1):
                yield list(zip(chosen, [*ends, units], strict=True))


def _candidate(
    columns: int, widths: Sequence[int], cut: Sequence[tuple[str, int]], sums: Mapping[str, Sequence[float]]
) -> _Candidate:
    first, loss, bits, segments = 0, 0.0, 0.0, []
    for code, end in cut:
        width = sum(widths[first:end])
        loss += sums[code][end] - sums[code][first]
        bits += width * CODES[code].index_bits
        segments.append((width, code))
        first = end
    return _Candidate(format_text(segments), bits / columns, loss)


def _hull(candidates: Iterable[_Candidate]) -> list[_Candidate]:
    """The lower convex hull of losses over bits, from the fewest bits to the least loss."""
    hull: list[_Candidate] = []
    for one in sorted(candidates, key=lambda x: (x.bits, x.loss, x.text)):
        if hull and one.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _bends_up(hull[-2], hull[-1], one):
            hull.pop()
        hull.append(one)
    return hull


def _bends_up(before: _Candidate, middle: _Candidate, after: _Candidate) -> bool:
    """Whether the middle lies on or above the line between the others."""
    across = (middle.loss - before.loss) * (after.bits - before.bits)
    return across >= (after.loss - before.loss) * (middle.bits - before.bits)


def _at(hull: Sequence[_Candidate], bits: float) -> float:
    """The hull's loss at a rate, between its points a line's; infinite below the first."""
    if not hull or bits < hull[0].bits:
        return float("inf")
    for before, after in pairwise(hull):
        if bits <= after.bits:
            share = (bits - before.bits) / (after.bits - before.bits)
            return before.loss + share * (after.loss - before.loss)
    return hull[-1].loss


def segment_units(text: str, columns: int) -> list[tuple[VQCode, range]]:
    """(code, units that fall in it) of every segment of a format."""
    starts = [0, *accumulate(unit_widths(columns))]
    found = []
    for segment in parse_format(text, columns):
        first, last = starts.index(segment.first), starts.index(segment.first + segment.columns)
        found.append((segment.code, range(first, last)))
    return found
