"""What each unit of a layer costs when it is coded: on the layer's own outputs, on the model's loss, and both at once.

A unit is a range of input columns of a layer, or the whole layer: `widths` are the units' column counts, first to last,
and add up to n. Everything is per code: E is what one code leaves, so a table of units × codes is one call for each
code. Symbols as in `toolchain.vq`, and

    η   float32[m, n]        E U, the error after feedback (`vq.factor`): tr(E H Eᵀ) = Σ_k tr(η_k D_k η_kᵀ)
    S_o float32[m, m]        second moment of the gradients at the layer's outputs
    G_b float32[m, n]        gradient of one sequence's loss by W; the mean of g gᵀ over sequences is the Fisher matrix

Equations are those of the project's note mgvq-algorithm.md, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from toolchain.errors import NumericGateError, ShapeError, UsageError
from toolchain.vq.factor import Factors


def feedback_losses(
    feedback: Tensor, pivots: Tensor, widths: Sequence[int], output_moment: Tensor | None = None
) -> Tensor:
    """float32[units]: Σ over the blocks k of each unit of tr(S_o η_k D_k η_kᵀ), S_o = I where absent.

    The units add up to tr(S_o E S Eᵀ) of the layer, S = U D Uᵀ: nothing between two units is lost or counted twice.

    Args:
        feedback: η float32[m, n], what the sweep pays: its targets minus what it decodes them to, or E @ U.
        pivots: D float32[n / V, V, V].
        widths: columns of each unit, multiples of V.
        output_moment: S_o float32[m, m].

    Raises:
        ShapeError: widths do not add up to n, or cut a block.
    """
    vector = pivots.shape[-1]
    _check_widths(widths, feedback.shape[1], vector)
    blocks = feedback.reshape(len(feedback), -1, vector)
    if blocks.shape[1] != len(pivots):
        raise ShapeError(f"feedback of {feedback.shape[1]} columns: expected {len(pivots)} pivots of {vector}")
    weighted = feedback if output_moment is None else output_moment @ feedback
    pulled = torch.einsum("mbv,bvw->mbw", weighted.reshape(blocks.shape), pivots)
    losses = (pulled * blocks).sum(dim=(0, 2))
    return _sums(losses, [width // vector for width in widths])


def local_losses(feedback: Tensor, pivots: Tensor, reference: float, widths: Sequence[int]) -> Tensor:
    """float32[units]: share of the layer's output energy lost in each unit after feedback (equation 15).

    loc_c = Σ_{k∈c} tr(η_k D_k η_kᵀ) / tr(W S Wᵀ). The units add up to the layer's relative error; any common scale of W
    and E, or of S, leaves it as it is. Comparable inside a layer, not across layers.

    Args:
        feedback, pivots, widths: as for `feedback_losses`.
        reference: tr(W S Wᵀ) with the S that the pivots are of.

    Raises:
        ShapeError: as `feedback_losses`.
        NumericGateError: the reference is not positive: the layer puts out nothing that could be lost.
    """
    if not reference > 0:
        raise NumericGateError(
            f"output energy tr(W S Wᵀ): expected a positive number, found {reference:g}; look for a layer of zeros or "
            "inputs that never reach it, and leave it out of the sensitivity"
        )
    return feedback_losses(feedback, pivots, widths) / reference


def local_losses_from_error(error: Tensor, factors: Factors, weight: Tensor, widths: Sequence[int]) -> Tensor:
    """float32[units]: `local_losses` of E = W − Ŵ: η = E U, reference tr(W S Wᵀ), S being the factors' damped moment.

    Args:
        error, weight: float32[m, n], n as wide as the factors (padding included).

    Raises:
        As `local_losses`.
    """
    reference = float(((weight @ factors.damped) * weight).sum())
    return local_losses(error @ factors.unit, factors.pivots, reference, widths)


def kronecker_losses(error: Tensor, output_moment: Tensor, input_moment: Tensor, widths: Sequence[int]) -> Tensor:
    """float32[units]: ½ tr(S_o E_c S_i[c, c] E_cᵀ), in the loss's own unit (equation 16, first line, without G).

    What a unit costs alone: the terms between units are left out, so units add up to the layer only where S_i is block
    diagonal. `feedback_losses` with S_o, halved, is the form that adds up.

    Args:
        error: E float32[m, n].
        output_moment: S_o float32[m, m].
        input_moment: S_i float32[n, n].
        widths: columns of each unit.

    Raises:
        ShapeError: widths do not add up to n.
    """
    _check_widths(widths, error.shape[1], 1)
    losses, first = [], 0
    for width in widths:
        unit = slice(first, first + width)
        part = error[:, unit]
        losses.append(((output_moment @ part) * (part @ input_moment[unit, unit])).sum() / 2)
        first += width
    return torch.stack(losses)


def fisher_losses(error: Tensor, gradients: Tensor, widths: Sequence[int]) -> Tensor:
    """float32[units]: ½ E_b[⟨G_b, E⟩²] over each unit's columns, in nats a sequence (equation 16, second line).

    Exact for the Fisher of the given sequences, no factors between: ½ vec(E)ᵀ E_b[vec(G_b) vec(G_b)ᵀ] vec(E).
    Comparable across layers. Take gradients of sequences that no code was fitted on, labels drawn from the model.

    Args:
        error: E float32[m, n].
        gradients: float32[B, m, n], one of each sequence.
        widths: columns of each unit; [n] is the whole layer.

    Raises:
        ShapeError: widths do not add up to n, or there is no gradient.
    """
    _check_widths(widths, error.shape[1], 1)
    if not len(gradients) or gradients.shape[1:] != error.shape:
        raise ShapeError(f"gradients: expected [B, {', '.join(map(str, error.shape))}], found {list(gradients.shape)}")
    by_column = (gradients * error).sum(dim=1)
    return _sums(by_column, widths).square().mean(dim=0) / 2


def combine(global_losses: Tensor, local_losses: Tensor, layer_total: Tensor | float, weight: float = 0.5) -> Tensor:
    """float32[..., units]: Ω, the layer's loss split over its units by both metrics at once (equation 17).

    Ω_c = total · ĝ_c^λ l̂_c^(1−λ) / Σ_c' ĝ_c'^λ l̂_c'^(1−λ), ĝ and l̂ being shares of the layer: a unit has to be
    unimportant in both to count for little. λ = 0 splits by the local metric alone, 1 by the global one.

    Args:
        global_losses, local_losses: float32[..., units], not negative; leading dimensions (codes) are independent.
        layer_total: loss of the whole layer in the global metric, float32[...].
        weight: λ, 0 to 1.

    Raises:
        UsageError: λ outside 0 to 1.
        ShapeError: the metrics have different shapes.
        NumericGateError: a negative or non-finite loss, or a total above zero that no unit has a share in.
    """
    if not 0 <= weight <= 1:
        raise UsageError(f"weight of the global metric: expected 0 to 1, found {weight:g}")
    if global_losses.shape != local_losses.shape:
        raise ShapeError(
            f"global losses {list(global_losses.shape)}, local losses {list(local_losses.shape)}: expected one shape"
        )
    shares = _shares(global_losses, "global") ** weight * _shares(local_losses, "local") ** (1 - weight)
    total = torch.as_tensor(layer_total, dtype=shares.dtype, device=shares.device)
    sums = shares.sum(dim=-1)
    if bool(((sums == 0) & (total != 0)).any()):
        raise NumericGateError(
            "combined sensitivity: the layer has a loss, but no unit has a share in both metrics; measure with more "
            "samples, or set the weight to 0 or 1"
        )
    return total[..., None] * shares / torch.where(sums > 0, sums, 1.0)[..., None]


def worst_modality(losses: Mapping[str, Tensor]) -> Tensor:
    """float32[...]: max over modalities μ of Ω^μ / Ω̄^μ, Ω̄^μ being the mean over all entries (section 3.4).

    A unit that one modality needs keeps its bits however little the others need it. A modality's scale does not
    matter; one that loses nothing anywhere asks for nothing.

    Args:
        losses: modality → float32[...], the same units (and codes) in the same order, all layers together: the means
            are over everything that shares a budget.

    Raises:
        UsageError: no modality.
        ShapeError: they differ in shape.
        NumericGateError: a negative or non-finite loss.
    """
    stacked = _stacked(losses)
    means = stacked.flatten(1).mean(dim=1).reshape(-1, *[1] * (stacked.ndim - 1))
    return (stacked / torch.where(means > 0, means, 1.0)).amax(dim=0)


def average_modality(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """float32[...]: Σ_μ α_μ Ω^μ, the expected loss where modality μ has the weight α_μ (equation 2, section 3.4).

    Args:
        losses: as for `worst_modality`.
        weights: modality → α, not negative; divided by their sum.

    Raises:
        UsageError: weights name other modalities than losses, are negative, or all zero.
        ShapeError, NumericGateError: as `worst_modality`.
    """
    if set(weights) != set(losses):
        raise UsageError(f"weights of {sorted(weights)}: expected one for each of {sorted(losses)}")
    total = sum(weights.values())
    if min(weights.values(), default=0.0) < 0 or not total > 0:
        raise UsageError(f"weights {dict(weights)}: expected numbers of 0 or more with a positive sum")
    stacked = _stacked(losses)
    alpha = torch.tensor([weights[name] / total for name in losses], dtype=stacked.dtype, device=stacked.device)
    return torch.tensordot(alpha, stacked, dims=1)


def _check_widths(widths: Sequence[int], columns: int, vector: int) -> None:
    if not widths or min(widths) < 1 or sum(widths) != columns:
        raise ShapeError(f"unit widths {list(widths)}: expected positive column counts that add up to {columns}")
    for width in widths:
        if width % vector:
            raise ShapeError(f"unit of {width} columns: expected a multiple of the vector length {vector}")


def _sums(values: Tensor, counts: Sequence[int]) -> Tensor:
    """[..., units]: sums of runs of `counts` values along the last dimension."""
    return torch.stack([part.sum(dim=-1) for part in values.split(list(counts), dim=-1)], dim=-1)


def _check_losses(losses: Tensor, name: str) -> None:
    if not bool(torch.isfinite(losses).all()) or bool((losses < 0).any()):
        raise NumericGateError(
            f"{name} losses: expected finite numbers of 0 or more, found {float(losses.min()):g} to "
            f"{float(losses.max()):g}; look for overflow in the moments or gradients they are from"
        )


def _shares(losses: Tensor, name: str) -> Tensor:
    """Losses over their sum along the last dimension; zeros where all are zero."""
    _check_losses(losses, name)
    sums = losses.sum(dim=-1, keepdim=True)
    return losses / torch.where(sums > 0, sums, 1.0)


def _stacked(losses: Mapping[str, Tensor]) -> Tensor:
    """float32[modalities, ...] in the order of the mapping."""
    if not losses:
        raise UsageError("losses by modality: expected at least one modality, found none")
    shapes = {tuple(one.shape) for one in losses.values()}
    if len(shapes) > 1:
        raise ShapeError(f"losses by modality: expected one shape, found {sorted(shapes)}")
    for name, one in losses.items():
        _check_losses(one, name)
    return torch.stack(list(losses.values()))
