"""Second moments of layer inputs while a model is quantized: of the quantized prefix, and against full precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from toolchain.calibration.gradients import TOKEN_PARTS, layer_rows, split_token_weights
from toolchain.calibration.held_out import image_numbers
from toolchain.calibration.inputs import CalibrationInput
from toolchain.errors import InputDataError
from toolchain.values import SILENT, LayerSpec, Progress, groups_of
from toolchain.vq.curvature import capped_token_weights
from toolchain.vq.drift import Pair, PairMoments

TokenWeights = Mapping[str, list[Tensor]]


class _AllSeenError(Exception):
    """Ends a forward pass: every layer asked about has been reached."""


@dataclass(frozen=True)
class Survey:
    """One forward pass over all samples: group → token weights (`calibration`'s: every modality alike) and diag E[x
    xᵀ], float32[n], with those token weights; group → ‖x‖² float32[tokens] a sample, where token weights were capped by
    them.
    """

    token_weights: dict[str, list[Tensor]]
    energies: dict[str, Tensor]
    norms: dict[str, list[Tensor]] = field(default_factory=dict)

    def capped(self, token_weights: TokenWeights, quantile: float) -> dict[str, list[Tensor]]:
        """Other token weights, capped by the same norms (`curvature.capped_token_weights`)."""
        found = {}
        for group, norms in self.norms.items():
            own = capped_token_weights(torch.cat(list(token_weights[group])), torch.cat(norms), quantile)
            found[group] = list(own.split([len(part) for part in norms]))
        return found


@dataclass
class _Seen:
    """The inputs of one forward pass, group → float32[tokens, n]."""

    rows: dict[str, Tensor]


def collect_pairs(
    quantized: nn.Module,
    full: nn.Module | None,
    inputs: Sequence[CalibrationInput],
    specs: Sequence[LayerSpec],
    token_weights: TokenWeights,
) -> dict[str, PairMoments]:
    """Group → moments of its inputs x_q in the model as it stands, against x_f in the full-precision one.

    Sums are weighted by token weights, accumulated in float32, in two halves that `drift.gated_shift` holds against one
    another: the samples about every other image, so that no image is on both sides.

    Args:
        full: None where no drift is wanted: x_f is then x_q.
        token_weights: group → float32[tokens] a sample.

    Raises:
        InputDataError: a group sees other token counts than its token weights have, or a sample does not reach it.
    """
    first = {group: members[0] for group, members in groups_of(specs).items()}
    halves: dict[str, list[Pair | None]] = {group: [None, None] for group in first}
    images = image_numbers(inputs)
    for number, one in enumerate(inputs):
        side = images[number] % 2
        own = inputs_of(quantized, one, first)
        other = own if full is None else inputs_of(full, one, first)
        for group, rows in own.items():
            token_weight = token_weights[group][number].to(rows.device)
            if len(token_weight) != len(rows):
                raise InputDataError(
                    f"layer {first[group].name}: sample {number} gave {len(rows)} inputs, its token weights are of "
                    f"{len(token_weight)}; statistics and moments must be taken with the same samples"
                )
            found = Pair.of(rows, other[group], token_weight)
            halves[group][side] = found.added(halves[group][side])
    return {group: PairMoments.merged(pair) for group, pair in halves.items()}


def survey_inputs(
    model: nn.Module,
    inputs: Sequence[CalibrationInput],
    specs: Sequence[LayerSpec],
    progress: Progress = SILENT,
    norm_quantile: float | None = None,
) -> Survey:
    """Token weights with half for either modality in the decoder, and the energy of every input column.

    Args:
        norm_quantile: tokens of a larger norm lose weight (`curvature.capped_token_weights`), at the price of a
            second pass; None leaves all as they are.
    """
    first = {group: members[0] for group, members in groups_of(specs).items()}
    squares: dict[str, list[Tensor]] = {group: [] for group in first}
    counts: dict[str, list[Tensor]] = {group: [] for group in first}
    norms: dict[str, list[Tensor]] = {group: [] for group in first if norm_quantile is not None}
    for number, one in enumerate(inputs):
        for group, rows in inputs_of(model, one, first).items():
            image = one.is_image.to(rows.device)
            mixed = first[group].part in TOKEN_PARTS and len(rows) == len(image)
            kinds = [rows[image], rows[~image]] if mixed else [rows]
            squares[group].append(torch.stack([kind.square().sum(dim=0) for kind in kinds]))
            counts[group].append(torch.ones(len(rows)))
            if norm_quantile is not None:
                norms[group].append(rows.square().sum(dim=1).cpu())
        progress.step(number + 1, len(inputs), "survey")
    token_weights = {
        group: split_token_weights(counts[group], spec, inputs, power=0.0) for group, spec in first.items()
    }
    plain = Survey(
        token_weights, {group: _energies(squares[group], token_weights[group], inputs) for group in first}, norms
    )
    if norm_quantile is None:
        return plain
    capped = plain.capped(token_weights, norm_quantile)
    return Survey(capped, _weighted_energies(model, inputs, first, capped), norms)


def _weighted_energies(
    model: nn.Module, inputs: Sequence[CalibrationInput], first: Mapping[str, LayerSpec], token_weights: TokenWeights
) -> dict[str, Tensor]:
    """Group → Σ_t ω_t x_t², from a pass over all samples."""
    found: dict[str, Tensor] = {}
    for number, one in enumerate(inputs):
        for group, rows in inputs_of(model, one, first).items():
            own = token_weights[group][number].to(rows.device) @ rows.square()
            found[group] = found[group] + own if group in found else own
    return found


def _energies(squares: list[Tensor], token_weights: list[Tensor], inputs: Sequence[CalibrationInput]) -> Tensor:
    """Σ_t ω_t x_t² from sums a modality, whose tokens have one token weight each."""
    total = torch.stack(squares).sum(dim=0)
    flat = torch.cat(token_weights).to(total.device)
    if len(total) == 1:
        return total[0] * flat[0]
    marks = torch.cat([one.is_image for one in inputs]).to(total.device)
    own = torch.stack([flat[mark].max() if bool(mark.any()) else flat.new_zeros(()) for mark in (marks, ~marks)])
    return own @ total


def inputs_of(model: nn.Module, one: CalibrationInput, layers: Mapping[str, LayerSpec]) -> dict[str, Tensor]:
    """Group → float32[tokens, n], the inputs of one layer a group; the pass ends at the last one.

    Raises:
        InputDataError: the input does not reach one of the layers.
    """
    seen = _Seen({})

    def hook_for(group: str, spec: LayerSpec) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen.rows[group] = layer_rows(arguments[0], spec, module)
            if len(seen.rows) == len(layers):
                raise _AllSeenError

        return hook

    handles = [
        model.get_submodule(spec.name).register_forward_pre_hook(hook_for(group, spec))
        for group, spec in layers.items()
    ]
    try:
        with torch.no_grad():
            model(**one.tensors, use_cache=False, logits_to_keep=one.answer_tokens + 1)
    except _AllSeenError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    missed = [spec.name for group, spec in layers.items() if group not in seen.rows]
    if missed:
        raise InputDataError(f"layer {missed[0]}: a calibration input does not reach it; every line needs an image")
    return seen.rows
