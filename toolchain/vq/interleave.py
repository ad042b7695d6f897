"""Interleaving: the column permutation that a vector code gains from. High-energy columns are spread over all vectors,
not gathered in a few.

A vector spends its bits on its high-energy columns by itself, if every vector has some; and one codebook serves all
vectors best if position j means the same energy in each (mgvq-algorithm 3.6). So columns are
interleaved by their rank:

    rank by energy   0 1 2 3 4 5 6 7      V = 2, n/V = 4 vectors
    vectors          (0 4) (1 5) (2 6) (3 7)

Quads take the bands in the order 0 2 1 3, so that each of their halves is an interleaved pair too: one permutation
then serves layers of either vector length.

High-energy vectors come first because the sweep visits them in order, and an error can only be fed to columns still to
come.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toolchain.errors import NumericGateError, ShapeError

# Band of ranks → place in a vector, for the lengths the format has; any other length takes bands as they come.
PLACE_OF_BAND = {4: (0, 2, 1, 3)}
VECTOR = 4  # columns interleaved for quads are interleaved for pairs too


def interleaved_permutation(energies: Tensor, vector: int) -> Tensor:
    """The interleaved permutation int64[n] of n columns: `order[new] = old`.

    Rank q by energy, largest first and ties by index, goes to vector q mod (n / V), at the place of its band ⌊q V / n⌋.

    Args:
        energies: float[n], diag H of the layer or layers that read the columns.
        vector: V, weights a lookup.

    Raises:
        ShapeError: n is not a multiple of V; vectors that cross its end have no partner to be interleaved with.
        NumericGateError: an energy is not finite.
    """
    if energies.ndim != 1:
        raise ShapeError(
            f"expected energies float[n], found shape {list(energies.shape)}; units go to interleave_units"
        )
    return interleave_units(energies[None], vector)[0]


def interleave_units(energies: Tensor, vector: int) -> Tensor:
    """The interleaved permutations int64[units, size] of columns that must stay in their unit, such as a head: old
    places in it.

    Args:
        energies: float[units, size].
        vector: V, weights a lookup.

    Raises:
        ShapeError: `size` is not a multiple of V.
        NumericGateError: an energy is not finite.
    """
    if energies.ndim != 2 or vector < 1 or energies.shape[1] % vector:
        raise ShapeError(
            f"expected energies float[units, size] with size a multiple of V = {vector}, found shape "
            f"{list(energies.shape)}; leave these columns in their order or use a smaller V"
        )
    if not bool(torch.isfinite(energies).all()):
        raise NumericGateError(
            f"expected finite energies, found {int((~torch.isfinite(energies)).sum())} of {energies.numel()} that are "
            "not; look for overflow in the activations"
        )
    units, size = energies.shape
    ranked = energies.argsort(dim=1, descending=True, stable=True)
    bands = ranked.reshape(units, vector, size // vector)
    return bands[:, list(PLACE_OF_BAND.get(vector, range(vector)))].mT.reshape(units, size)
