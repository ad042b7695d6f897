"""What runs of columns of a group cost when they are coded: on its own outputs, on the model's loss, and both at once.

The columns are taken in falling order of sensitivity and cut into units (`segmentation.unit_widths`). A proxy
quantization codes each unit as a segment; the error is then asked about unit by unit, for text and image tokens apart
(mgvq-algorithm 3.2 to 3.4, equations 15 to 17). With one codebook and scale for all columns the demo's losses came out
twice those that segments really have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toolchain.calibration.gradients import GradientSample, of_modality
from toolchain.quantize.refine.segmentation import unit_widths
from toolchain.values import Segment, VQCode
from toolchain.vq.factor import Factors, factor_moment
from toolchain.vq.segments import damped_square, quantize_segments
from toolchain.vq.sensitivity import average_modality, combine, local_losses_from_error, worst_modality
from toolchain.vq.weights import AVERAGE, Options


@dataclass(frozen=True)
class RankedGroup:
    """A group as the model has it, and its columns by units of falling sensitivity: `order[new] = now`, int64[n].

    weights: float32[m_i, n] a layer. moments: modality → its part of H float32[n, n]. gradient_samples: a list a layer,
    all of the same sequences.
    """

    weights: list[Tensor]
    moments: Mapping[str, Tensor]
    gradient_samples: Sequence[Sequence[GradientSample]]
    order: Tensor


@dataclass(frozen=True)
class UnitLosses:
    """Proxy code → what each unit of columns loses in it.

    local: tr(η_c D_c η_cᵀ) / tr(W S Wᵀ) over the unit's blocks (equation 15), S the damped moment; they add up to the
        group's relative error. `reference` is that tr(W S Wᵀ).
    losses: Ω (equation 17), nats a sequence as `Sensitivity.measured`.
    """

    local: dict[str, list[float]]
    losses: dict[str, list[float]]
    reference: float


def measure_units(
    case: RankedGroup,
    proxy_codes: Sequence[VQCode],
    scale: float,
    options: Options,
    generator: Callable[[], torch.Generator],
) -> UnitLosses:
    """Losses of every unit, from one proxy quantization a proxy code that codes each unit with a codebook and scales of
    its own.

    Args:
        scale: nats a sequence that a relative error tr(E H Eᵀ) / tr(W H Wᵀ) of 1 comes to, by the global metric.
        options: of the proxy quantizations.
        generator: makes a generator for each, so that they do not depend on one another.
    """
    order = case.order
    weights = [weight[:, order] for weight in case.weights]
    stacked, moments = torch.cat(weights), {kind: h[order][:, order] for kind, h in case.moments.items()}
    whole = torch.stack(list(moments.values())).sum(dim=0)
    reference = damped_square(stacked, whole, options.damping)
    widths = unit_widths(len(order))
    firsts = [sum(widths[:number]) for number in range(len(widths))]
    local, losses = {}, {}
    for proxy_code in proxy_codes:
        units = [Segment(first, width, proxy_code) for first, width in zip(firsts, widths, strict=True)]
        group = quantize_segments(weights, whole, units, options, generator())
        error = stacked - torch.cat([layer.decode().to(stacked) for layer in group.layers])
        total = scale * group.loss / max(sum(group.references), torch.finfo(torch.float32).tiny)
        omega = _combined(case, error, stacked, moments, proxy_code, total, options)
        local[str(proxy_code)] = [lost / reference for lost in group.losses] if reference > 0 else [0.0] * len(units)
        losses[str(proxy_code)] = omega.tolist()
    return UnitLosses(local, losses, reference)


def _factors(moment: Tensor, code: VQCode, options: Options) -> Factors:
    return factor_moment(moment, len(moment), code.vector, options.damping)


def _combined(
    case: RankedGroup,
    error: Tensor,
    stacked: Tensor,
    moments: Mapping[str, Tensor],
    code: VQCode,
    total: float,
    options: Options,
) -> Tensor:
    """Ω float32[units], which add up to `total`: each modality's split by both metrics, then put together."""
    widths = unit_widths(error.shape[1])
    fisher, split = {}, {}
    for kind, moment in moments.items():
        alone = len(moments) == 1
        fisher[kind] = fisher_units(case, error, widths, None if alone else kind)
        local = local_losses_from_error(error, _factors(moment, code, options), stacked, widths)
        has_shares = bool((fisher[kind].sqrt() * local.sqrt()).sum() > 0)
        split[kind] = combine(fisher[kind], local, total, 0.5 if has_shares else 0.0)
    shares = {kind: float(value.sum()) for kind, value in fisher.items()}
    if not sum(shares.values()) > 0:
        shares = dict.fromkeys(shares, 1.0)
    if options.modalities == AVERAGE:
        return average_modality(split, shares)
    whole = sum(shares.values())
    worst = worst_modality({kind: value * (shares[kind] / whole) for kind, value in split.items()})
    return total * worst / worst.sum().clamp_min(torch.finfo(worst.dtype).tiny)


def fisher_units(case: RankedGroup, error: Tensor, widths: Sequence[int], kind: str | None) -> Tensor:
    """float32[units]: ½ E_b⟨G_b, E_c⟩² of each unit (equation 16), over one modality's tokens, or over all.

    Args:
        error: E float32[m, n] of all layers, columns in the case's order.
    """
    back = torch.empty_like(error)
    back[:, case.order] = error
    parts = back.split([len(weight) for weight in case.weights])
    products = []
    for number in range(len(case.gradient_samples[0])):
        columns = torch.zeros(error.shape[1], dtype=torch.float64, device=error.device)
        for part, gradient_samples in zip(parts, case.gradient_samples, strict=True):
            gradient_sample = gradient_samples[number] if kind is None else of_modality(gradient_samples[number], kind)
            columns += gradient_sample.by_column(part)
        products.append(torch.stack([unit.sum() for unit in columns[case.order].split(list(widths))]))
    return 0.5 * torch.stack(products).square().mean(dim=0).float()
