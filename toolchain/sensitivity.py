"""How much every group's bits are worth: dry runs in cheap codes, weighed by the loss gradients of held-out samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from toolchain.calibration import CalibrationInput
from toolchain.kl import token_divergences
from toolchain.moments import Masses, collect_pairs
from toolchain.sequence import group_generator, groups_of
from toolchain.statistics import Probe, answer_scores, collect_loss_statistics
from toolchain.values import LayerSpec, VQCode
from toolchain.vq.solve import quantize_group
from toolchain.vq.weights import Options

# Mean squared error of each code on Gaussian weights, closed chunks, measured (`vq.codebook.arrange_windows` and
# DESIGN 3), and the memoryless code of the same vector that stands in for it in a dry run. Error after feedback goes
# with it: on the demo model (2,4,8) over (4,8,8) was 0.68 to 0.85 where the figures say 0.84.
STAND_INS = {2: VQCode(2, 4, 4), 4: VQCode(4, 8, 8)}
GAUSSIAN_ERROR = {
    "2,4,4": 0.1082,
    "2,3,8": 0.157,
    "2,4,8": 0.0823,
    "2,5,8": 0.0431,
    "2,6,6": 0.031,
    "2,6,8": 0.0234,
    "2,8,8": 0.0086,
    "2,8,9": 0.0073,
    "4,8,8": 0.098,
    "4,8,9": 0.089,
}
STATISTICS_BYTES = 4 << 30  # of second moments held at a time
DRY_RUN = {"rounds": 1, "lloyd_rounds": 4, "samples": 8_192}


# (layer, its weight float32[m, n]) → what an error in each row counts, float32[m].
RowWeights = Callable[[LayerSpec, Tensor], Tensor]


@dataclass(frozen=True)
class Sensitivity:
    """Of every group coded alone, by a dry run in its most accurate stand-in.

    measured: group → KL(full precision ‖ model with that group coded) on the held-out samples, nats a sequence: the
        loss itself, of which ½ E⟨G, E⟩² (equation 16, `fisher`) is the second-order part.
    fisher: the same by held-out gradients.
    local: group → code → share of the group's output energy that is lost (equation 15).
    """

    measured: dict[str, float]
    fisher: dict[str, float]
    local: dict[str, dict[str, float]]

    def losses(self) -> dict[str, dict[str, float]]:
        """Group → code → loss: the group's total from the global metric, split over codes by the local one."""
        found = {}
        for group, local in self.local.items():
            reference = min(self.reference(group).values())
            share = self.measured[group] / reference if reference > 0 else 0.0
            found[group] = {code: share * loss for code, loss in local.items()}
        return found

    def reference(self, group: str) -> dict[str, float]:
        """Stand-in → local loss of the dry runs, as `local` scales them."""
        return {
            str(stand_in): loss * GAUSSIAN_ERROR[str(stand_in)] / GAUSSIAN_ERROR[code]
            for code, loss in self.local[group].items()
            for stand_in in [STAND_INS[VQCode.parse(code).vector]]
        }


@dataclass(frozen=True)
class _DryRun:
    """Stand-in code, decoded weights of the group's layers, and the local loss (equation 15)."""

    code: VQCode
    decoded: list[Tensor]
    local: float


def measure_sensitivity(
    model: nn.Module,
    inputs: Sequence[CalibrationInput],
    specs: Sequence[LayerSpec],
    masses: Masses,
    codes: Sequence[str],
    *,
    held_out: Sequence[int],
    row_weights: RowWeights,
    draws: int = 2,
    seed: int = 0,
    options: Options | None = None,
    watch: Callable[[int, int], None] | None = None,
) -> Sensitivity:
    """Local and global losses of every group, from one dry run a vector length.

    Layers are taken in stretches whose second moments fit STATISTICS_BYTES; each stretch costs one pass over the
    samples and `draws` backward passes over the held-out ones, and each group a forward pass over the held-out ones
    with its dry run in place.

    Args:
        model: full precision, columns dealt already if they will be; every weight is put back.
        codes: what the plan will choose among.
        held_out: the samples the losses are measured on.
        row_weights: what an error in each row of a layer counts, float32[m].
    """
    chosen = replace(options or Options(), **DRY_RUN)
    own = [inputs[number] for number in held_out]
    found = Sensitivity({}, {}, {})
    with torch.inference_mode():
        expected = [answer_scores(model, one) for one in own]
    done = 0
    for stretch in _stretches(specs):
        linears = [spec for spec in stretch if spec.kind != "embedding"]
        pairs = collect_pairs(model, None, inputs, linears, masses) if linears else {}
        probes = collect_loss_statistics(model, own, stretch, held_out=range(len(own)), draws=draws, seed=seed).probes
        for group, members in groups_of(stretch).items():
            stored = [spec for spec in members if not spec.tied_to]
            moment = pairs[group].whole.moment if group in pairs else torch.eye(stored[0].columns)
            runs = _dry_runs(model, stored, moment, codes, chosen, seed, row_weights)
            best = min(runs, key=lambda run: run.local)
            found.local[group] = _local_losses(runs, codes)
            found.measured[group] = _measured_loss(model, own, expected, stored, best)
            found.fisher[group] = _fisher_loss(model, members, stored, best, probes)
            done += len(members)
            if watch:
                watch(done, len(specs))
    return found


def _stretches(specs: Sequence[LayerSpec]) -> Iterator[list[LayerSpec]]:
    """Whole groups, in order, while their second moments fit."""
    stretch: list[LayerSpec] = []
    size = 0
    for members in groups_of(specs).values():
        own = 4 * members[0].columns ** 2
        if stretch and size + own > STATISTICS_BYTES:
            yield stretch
            stretch, size = [], 0
        stretch, size = [*stretch, *members], size + own
    if stretch:
        yield stretch


def _dry_runs(
    model: nn.Module,
    stored: Sequence[LayerSpec],
    moment: Tensor,
    codes: Sequence[str],
    options: Options,
    seed: int,
    row_weights: RowWeights,
) -> list[_DryRun]:
    """One for every vector length among the codes."""
    weights = [model.get_parameter(f"{spec.name}.weight").detach().flatten(1).float() for spec in stored]
    counts = [row_weights(spec, w) for spec, w in zip(stored, weights)]
    runs = []
    for vector in sorted({VQCode.parse(code).vector for code in codes}):
        generator = group_generator(seed, stored[0].group)
        group = quantize_group(weights, moment, STAND_INS[vector], options, generator, counts)
        decoded = [layer.decode().to(w) for layer, w in zip(group.layers, weights)]
        reference = sum(weighted_error(w, moment, r) for w, r in zip(weights, counts))
        lost = sum(weighted_error(w - d, moment, r) for w, d, r in zip(weights, decoded, counts))
        runs.append(_DryRun(STAND_INS[vector], decoded, lost / reference if reference > 0 else 0.0))
    return runs


def expected_loss(weight: Tensor, moment: Tensor, code: VQCode, options: Options, generator: torch.Generator) -> float:
    """tr(E H Eᵀ) that coding W float32[m, n] leaves, from a dry run in the code's stand-in, scaled to its rate."""
    stand_in = STAND_INS[code.vector]
    group = quantize_group([weight], moment, stand_in, replace(options, **DRY_RUN), generator)
    return group.loss * GAUSSIAN_ERROR[str(code)] / GAUSSIAN_ERROR[str(stand_in)]


def weighted_error(difference: Tensor, moment: Tensor, row_weights: Tensor) -> float:
    """Σ_i r_i e_i H e_iᵀ."""
    rows = ((difference @ moment) * difference).sum(dim=1, dtype=torch.float64)
    return float((rows * row_weights).sum())


def _local_losses(runs: Sequence[_DryRun], codes: Sequence[str]) -> dict[str, float]:
    """Code → local loss, the dry run's of the same vector length scaled by the codes' Gaussian errors."""
    by_vector = {run.code.vector: run.local / GAUSSIAN_ERROR[str(run.code)] for run in runs}
    return {code: by_vector[VQCode.parse(code).vector] * GAUSSIAN_ERROR[code] for code in codes}


def _measured_loss(
    model: nn.Module,
    own: Sequence[CalibrationInput],
    expected: Sequence[Tensor],
    stored: Sequence[LayerSpec],
    run: _DryRun,
) -> float:
    """KL(full precision ‖ model with the dry run in place), nats a sequence; the weights are put back."""
    parameters = [model.get_parameter(f"{spec.name}.weight") for spec in stored]
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.inference_mode():
            for parameter, decoded in zip(parameters, run.decoded):
                parameter.copy_(decoded.reshape(parameter.shape))
            divergences = [token_divergences(e, answer_scores(model, one)).sum() for e, one in zip(expected, own)]
    finally:
        with torch.no_grad():
            for parameter, weight in zip(parameters, kept):
                parameter.copy_(weight)
    return float(torch.stack(divergences).mean().clamp_min(0))


def _fisher_loss(
    model: nn.Module,
    members: Sequence[LayerSpec],
    stored: Sequence[LayerSpec],
    run: _DryRun,
    probes: Mapping[str, list[Probe]],
) -> float:
    """½ E_b⟨G_b, E⟩² over the held-out gradients; a tied head adds its own to those of its embedding."""
    error = {
        spec.name: model.get_parameter(f"{spec.name}.weight").detach().flatten(1).float() - decoded
        for spec, decoded in zip(stored, run.decoded)
    }
    error |= {spec.name: error[spec.tied_to] for spec in members if spec.tied_to}
    products = [
        torch.tensor([probe.product(error[spec.name]) for probe in probes[spec.name]], dtype=torch.float64)
        for spec in members
        if probes.get(spec.name)
    ]
    return 0.5 * float(torch.stack(products).sum(dim=0).square().mean()) if products else 0.0
