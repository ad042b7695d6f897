"""Stage 2: columns interleaved by energy through a whole model, permutations folded into what produces the columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from toolchain.calibration.activations import Survey
from toolchain.checkpoint.permuted import permute_model
from toolchain.models.configs import Config
from toolchain.models.family import Family
from toolchain.models.permutations import combined_energies, interleaved
from toolchain.quantize.mgvq.run import MgvqRun
from toolchain.values import LayerSpec
from toolchain.vq.interleave import VECTOR


def permute_columns(run: MgvqRun, survey: Survey) -> dict[str, Tensor]:
    """Free permutation → its permutation, folded into the model; none without the recipe's part."""
    if not run.recipe.interleave:
        return {}
    request = run.request
    permutations = measured_permutations(request.family, request.config, request.specs, survey.energies)
    permute_model(request.model, request.family, request.config, permutations)
    return permutations


def measured_permutations(
    family: Family, config: Config, specs: Sequence[LayerSpec], energies: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Free permutation → int64[size], interleaved by the energies of the layers that read it.

    An order whose unit is no multiple of VECTOR, or that only an embedding reads, is left out: those columns stay.

    Args:
        energies: group → float32[columns], diag H.
    """
    by_layer = {spec.name: energies[spec.group] for spec in specs if spec.kind != "embedding"}
    permutations = {}
    for free in family.free_permutations(config):
        weights = {reader: float(reader in by_layer) for reader in free.readers}
        if free.unit % VECTOR == 0 and any(weights.values()):
            permutations[free.name] = interleaved(free, combined_energies(free, by_layer, weights), VECTOR)
    return permutations
