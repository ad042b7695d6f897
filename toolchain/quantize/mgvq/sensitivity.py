"""Stage 3: what every group's bits are worth, by proxy quantizations in cheap codes and by loss gradients of
held-out samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from toolchain.calibration.activations import TokenWeights, collect_pairs
from toolchain.calibration.gradients import (
    IMAGE,
    MODALITIES,
    GradientSample,
    answer_scores,
    collect_loss_statistics,
    lone_modality,
    marks_of,
    of_modality,
)
from toolchain.calibration.held_out import gate_samples
from toolchain.calibration.inputs import CalibrationInput
from toolchain.quantize.driver.sequence import dense_weight, group_generator, layer_batches
from toolchain.quantize.mgvq.proxy import GAUSSIAN_ERROR, PROXY_CODES, quick, row_weights_of
from toolchain.quantize.mgvq.run import MgvqRun
from toolchain.values import SILENT, LayerSpec, Progress, VQCode, groups_of
from toolchain.vq.divergence import token_divergences
from toolchain.vq.sensitivity import worst_modality
from toolchain.vq.solve import quantize_group
from toolchain.vq.weights import AVERAGE, Options

STATISTICS_BYTES = 4 << 30  # of second moments held at a time


# (layer, its weight float32[m, n]) → what an error in each row counts, float32[m].
RowWeights = Callable[[LayerSpec, Tensor], Tensor]


@dataclass(frozen=True)
class MeasuredGroup:
    """A group as the model has it, and the statistics that it was measured with.

    weights: float32[m_i, n] a layer. moments: modality → its part of H float32[n, n]. gradient_samples: a list a layer,
    all of the same sequences.
    """

    group: str
    weights: list[Tensor]
    moments: Mapping[str, Tensor]
    gradient_samples: Sequence[Sequence[GradientSample]]


# (group, nats a sequence that a relative error of 1 comes to) → what its columns lose unit by unit, JSON-clean.
UnitMeasure = Callable[[MeasuredGroup, float], dict[str, Any] | None]


@dataclass(frozen=True)
class Sensitivity:
    """Of every group coded alone, by a proxy quantization in its most accurate proxy code.

    measured: group → KL(full precision ‖ model with that group coded) on the held-out samples, nats a sequence: the
        loss itself, of which ½ E⟨G, E⟩² (equation 16, `fisher`) is the second-order part.
    fisher: the same by held-out gradients.
    local: group → code → share of the group's output energy that is lost (equation 15).
    modal: group → "text" or "image" → {"local", "fisher"}, with the statistics of that modality's tokens alone.
    units: group → `unit_losses.UnitLosses` of its columns, of the groups that may be cut into segments.
    segmented: group → segments → loss, in the unit of `losses`: what planning has offered and confirmed.
    """

    measured: dict[str, float]
    fisher: dict[str, float]
    local: dict[str, dict[str, float]]
    modal: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    units: dict[str, dict[str, Any]] = field(default_factory=dict)
    segmented: dict[str, dict[str, float]] = field(default_factory=dict)

    def losses(self, rule: str = AVERAGE) -> dict[str, dict[str, float]]:
        """Group → code → loss: the group's total from the global metric, split over codes by the local one."""
        found, totals = {}, self.totals(rule)
        for group, local in self.local.items():
            reference = min(self.reference(group).values())
            share = totals[group] / reference if reference > 0 else 0.0
            found[group] = {code: share * loss for code, loss in local.items()}
        return found

    def totals(self, rule: str = AVERAGE) -> dict[str, float]:
        """Group → its loss: as measured, or what its worst modality asks for (section 3.4, `worst_modality`).

        A modality has of what is measured its share of the Fisher losses.
        """
        if rule == AVERAGE:
            return dict(self.measured)
        groups = list(self.measured)
        parts = {
            kind: torch.tensor([self.measured[g] * self.modal_shares(g).get(kind, 0.0) for g in groups])
            for kind in MODALITIES
        }
        return dict(zip(groups, worst_modality(parts).tolist(), strict=True))

    def modal_shares(self, group: str) -> dict[str, float]:
        """Modality → α, its share of the group's Fisher loss; alike where that is 0."""
        fisher = {kind: one["fisher"] for kind, one in self.modal[group].items()}
        total = sum(fisher.values())
        return {kind: value / total if total > 0 else 1 / len(fisher) for kind, value in fisher.items()}

    def reference(self, group: str) -> dict[str, float]:
        """Proxy code → local loss of the proxy quantizations, as `local` scales them."""
        return {
            str(proxy_code): loss * GAUSSIAN_ERROR[str(proxy_code)] / GAUSSIAN_ERROR[code]
            for code, loss in self.local[group].items()
            for proxy_code in [PROXY_CODES[VQCode.parse(code).vector]]
        }


@dataclass(frozen=True)
class _Proxy:
    """Proxy code, decoded weights of the group's layers, and the local loss (equation 15)."""

    code: VQCode
    decoded: list[Tensor]
    local: float


def weigh_groups(
    run: MgvqRun, token_weights: TokenWeights, codes: Sequence[str], measure_units: UnitMeasure | None = None
) -> Sensitivity | None:
    """Losses to plan by, kept in the store; None where nothing is left to choose."""
    request = run.request
    if not run.has_choice:
        return None

    def make() -> tuple[dict[str, Tensor], dict]:
        found = measure_sensitivity(
            request.model,
            request.inputs,
            request.specs,
            token_weights,
            codes,
            held_out=gate_samples(request.inputs),
            row_weights=row_weights_of,
            measure_units=measure_units,
            seed=request.seed,
            options=request.options,
            progress=run.progress,
        )
        return {}, vars(found)

    return Sensitivity(**run.store.get_or_make("sensitivity", make)[1])


def measure_sensitivity(
    model: nn.Module,
    inputs: Sequence[CalibrationInput],
    specs: Sequence[LayerSpec],
    token_weights: TokenWeights,
    codes: Sequence[str],
    *,
    held_out: Sequence[int],
    row_weights: RowWeights,
    measure_units: UnitMeasure | None = None,
    draws: int = 2,
    seed: int = 0,
    options: Options | None = None,
    progress: Progress = SILENT,
) -> Sensitivity:
    """Local and global losses of every group, from one proxy quantization a vector length.

    Layers are taken in layer batches whose second moments fit STATISTICS_BYTES; each layer batch costs one pass over
    the samples a modality and `draws` backward passes over the held-out ones, and each group a forward pass over the
    held-out ones with its proxy quantization in place.

    Args:
        model: full precision, columns interleaved already if they will be; every weight is put back.
        codes: what the plan will choose among.
        held_out: the samples the losses are measured on.
        row_weights: what an error in each row of a layer counts, float32[m].
        measure_units: asked about every group, for what `Sensitivity.units` holds of it.
    """
    chosen = quick(options or Options())
    own = [inputs[number] for number in held_out]
    found = Sensitivity({}, {}, {})
    with torch.inference_mode():
        expected = [answer_scores(model, one) for one in own]
    done = 0
    for layer_batch in moment_batches(specs):
        moments = _moments(model, inputs, layer_batch, token_weights)
        gradient_samples = collect_loss_statistics(
            model, own, layer_batch, held_out=range(len(own)), draws=draws, seed=seed
        ).gradient_samples
        for group, members in groups_of(layer_batch).items():
            stored = [spec for spec in members if not spec.tied_to]
            given = moments.get(group) or {lone_modality(members[0]): torch.eye(stored[0].columns)}
            whole = torch.stack(list(given.values())).sum(dim=0)
            runs = _proxies(model, stored, whole, codes, chosen, seed, row_weights)
            best = min(runs, key=lambda run: run.local)
            found.local[group] = _local_losses(runs, codes)
            found.measured[group] = _measured_loss(model, own, expected, stored, best)
            found.fisher[group] = _fisher_loss(model, members, stored, best, gradient_samples)
            found.modal[group] = _modal_losses(model, members, stored, best, gradient_samples, given)
            if measure_units:
                case = MeasuredGroup(group, _weights(model, stored), given, [gradient_samples[s.name] for s in stored])
                total = found.measured[group] / best.local if best.local > 0 else 0.0
                if (units := measure_units(case, total)) is not None:
                    found.units[group] = units
            done += len(members)
            progress.step(done, len(specs), "sensitivity")
    return found


def _weights(model: nn.Module, stored: Sequence[LayerSpec]) -> list[Tensor]:
    return [dense_weight(model, spec) for spec in stored]


def _moments(
    model: nn.Module, inputs: Sequence[CalibrationInput], layer_batch: Sequence[LayerSpec], token_weights: TokenWeights
) -> dict[str, dict[str, Tensor]]:
    """Group → modality → its part of the second moment, float32[n, n]: the parts add up to H."""
    found: dict[str, dict[str, Tensor]] = {}
    linears = [spec for spec in layer_batch if spec.kind != "embedding"]
    for kind in MODALITIES:
        parts = {
            spec.group: [
                token_weight * _belongs(spec, len(token_weight), one, kind).to(token_weight)
                for token_weight, one in zip(token_weights[spec.group], inputs, strict=True)
            ]
            for spec in linears
        }
        asked = [spec for spec in linears if any(bool(part.any()) for part in parts[spec.group])]
        pairs = collect_pairs(model, None, inputs, asked, parts) if asked else {}
        for group, pair in pairs.items():
            found.setdefault(group, {})[kind] = pair.whole.moment
    return found


def _belongs(spec: LayerSpec, tokens: int, one: CalibrationInput, kind: str) -> Tensor:
    """bool[tokens]: which of a layer's inputs are of a modality."""
    marks = marks_of(spec, tokens, one)
    if marks is None:
        return torch.full((tokens,), lone_modality(spec) == kind)
    return marks if kind == IMAGE else ~marks


def moment_batches(specs: Sequence[LayerSpec]) -> Iterator[list[LayerSpec]]:
    """Whole groups, in order, while their second moments fit STATISTICS_BYTES."""
    return layer_batches(specs, STATISTICS_BYTES, lambda members: 4 * members[0].columns ** 2)


def _proxies(
    model: nn.Module,
    stored: Sequence[LayerSpec],
    moment: Tensor,
    codes: Sequence[str],
    options: Options,
    seed: int,
    row_weights: RowWeights,
) -> list[_Proxy]:
    """One for every vector length among the codes."""
    weights = _weights(model, stored)
    counts = [row_weights(spec, w) for spec, w in zip(stored, weights)]
    runs = []
    for vector in sorted({VQCode.parse(code).vector for code in codes}):
        generator = group_generator(seed, stored[0].group)
        group = quantize_group(weights, moment, PROXY_CODES[vector], options, generator, counts)
        decoded = [layer.decode().to(w) for layer, w in zip(group.layers, weights)]
        reference = sum(weighted_error(w, moment, r) for w, r in zip(weights, counts))
        lost = sum(weighted_error(w - d, moment, r) for w, d, r in zip(weights, decoded, counts))
        runs.append(_Proxy(PROXY_CODES[vector], decoded, lost / reference if reference > 0 else 0.0))
    return runs


def weighted_error(difference: Tensor, moment: Tensor, row_weights: Tensor) -> float:
    """Σ_i r_i e_i H e_iᵀ."""
    rows = ((difference @ moment) * difference).sum(dim=1, dtype=torch.float64)
    return float((rows * row_weights).sum())


def _local_losses(runs: Sequence[_Proxy], codes: Sequence[str]) -> dict[str, float]:
    """Code → local loss, the proxy quantization's of the same vector length scaled by the codes' Gaussian errors."""
    by_vector = {run.code.vector: run.local / GAUSSIAN_ERROR[str(run.code)] for run in runs}
    return {code: by_vector[VQCode.parse(code).vector] * GAUSSIAN_ERROR[code] for code in codes}


def _measured_loss(
    model: nn.Module,
    own: Sequence[CalibrationInput],
    expected: Sequence[Tensor],
    stored: Sequence[LayerSpec],
    run: _Proxy,
) -> float:
    """KL(full precision ‖ model with the proxy quantization in place), nats a sequence; the weights are put back."""
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


def _modal_losses(
    model: nn.Module,
    members: Sequence[LayerSpec],
    stored: Sequence[LayerSpec],
    run: _Proxy,
    gradient_samples: Mapping[str, list[GradientSample]],
    moments: Mapping[str, Tensor],
) -> dict[str, dict[str, float]]:
    """Modality → {"local", "fisher"} of the proxy quantization: what it costs that modality's tokens."""
    weights = _weights(model, stored)
    found = {}
    for kind, moment in moments.items():
        ones = [torch.ones(len(w), device=w.device) for w in weights]
        whole = sum(weighted_error(w, moment, r) for w, r in zip(weights, ones))
        lost = sum(weighted_error(w - d, moment, r) for w, d, r in zip(weights, run.decoded, ones))
        own = {
            name: [of_modality(gradient_sample, kind) for gradient_sample in given]
            for name, given in gradient_samples.items()
        }
        kept = own if len(moments) > 1 else gradient_samples
        found[kind] = {
            "local": lost / whole if whole > 0 else 0.0,
            "fisher": _fisher_loss(model, members, stored, run, kept),
        }
    return found


def _fisher_loss(
    model: nn.Module,
    members: Sequence[LayerSpec],
    stored: Sequence[LayerSpec],
    run: _Proxy,
    gradient_samples: Mapping[str, list[GradientSample]],
) -> float:
    """½ E_b⟨G_b, E⟩² over the held-out gradients; a tied head adds its own to those of its embedding."""
    error = {spec.name: dense_weight(model, spec) - decoded for spec, decoded in zip(stored, run.decoded)}
    error |= {spec.name: error[spec.tied_to] for spec in members if spec.tied_to}
    products = [
        torch.tensor(
            [gradient_sample.product(error[spec.name]) for gradient_sample in gradient_samples[spec.name]],
            dtype=torch.float64,
        )
        for spec in members
        if gradient_samples.get(spec.name)
    ]
    return 0.5 * float(torch.stack(products).sum(dim=0).square().mean()) if products else 0.0
