"""Which way every weight of a quantized model should go: the gradient of KL(teacher ‖ quantized), as a Newton step.

Every layer's own step is N = S_o⁻¹ G S_i⁻¹, G the gradient at Ŵ (mgvq-algorithm 2.4 and 2.9). All of them together
promise to take ½ Σ ⟨G, N⟩ off a divergence that has no more than itself to give: layers answer the same error, and the
quadratic model is a poor one of a model that is sure of its answers. So all steps are shortened by one
u = KL / (½ Σ ⟨G, N⟩) where that is below 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from toolchain.calibration.gradients import answer_scores, draw_labels
from toolchain.calibration.inputs import CalibrationInput
from toolchain.checkpoint.modules import keep_decoded, vq_modules
from toolchain.values import LayerSpec
from toolchain.vq.curvature import newton_shift
from toolchain.vq.divergence import token_divergences


@dataclass
class KLGradients:
    """Layer → G of the mean divergence a token, `divergence` in nats, and the Fisher's trace Σ_b ‖g_b‖² / Σ_b T_b."""

    means: dict[str, Tensor]
    traces: dict[str, float]
    divergence: float


def teacher_scores(teacher: nn.Module, inputs: Sequence[CalibrationInput]) -> list[Tensor]:
    """Log-probabilities float32[t, v] of the teacher at a sample's answer tokens, taken once for all rounds."""
    found = []
    with torch.no_grad():
        for one in inputs:
            found.append(answer_scores(teacher, one))
    return found


@contextmanager
def decoded_leaves(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """While the context lasts, layers compute with leaf tensors Ŵ that gather gradients; name → leaf.

    A layer tied to a named one computes with the same leaf; other quantized layers with a decoded copy.
    """
    with keep_decoded(model):
        leaves = {}
        modules = vq_modules(model)
        for name in names:
            module = modules[name]
            leaf = module.dense(module.compute_dtype).detach().clone()
            leaves[name] = leaf.requires_grad_()
            for other in modules.values():
                if other is module or module in other._tied_to:
                    other._decoded = leaf
        yield leaves


def divergence_of(
    model: nn.Module, scores: Sequence[Tensor], inputs: Sequence[CalibrationInput], numbers: Sequence[int]
) -> float:
    """Mean KL(teacher ‖ model) in nats an answer token over the samples `numbers`."""
    with torch.no_grad():
        parts = [token_divergences(scores[n], answer_scores(model, inputs[n])) for n in numbers]
    return float(torch.cat(parts).mean(dtype=torch.float64))


def kl_gradients(
    model: nn.Module,
    scores: Sequence[Tensor],
    inputs: Sequence[CalibrationInput],
    numbers: Sequence[int],
    names: Sequence[str],
    generator: torch.Generator,
    after: Callable[[int], None] = lambda done: None,
) -> KLGradients:
    """G of Σ_t KL_t / Σ_b T_b for every named layer, and the trace of the Fisher in the same unit.

    Two backward passes a sample: of its summed divergence, and of −log p of answers drawn from the model, whose
    gradients g_b have the curvature Σ_b vec g_b vec g_bᵀ / Σ_b T_b (mgvq-algorithm 2.2, equation 5). The sum and two
    gradients of one sample are held of the named layers, and of no others: layers taken in several calls, with equal
    generators, get the gradients that they get in one. `after` is called with the number of samples done.
    """
    sums: dict[str, Tensor] = {}
    traces = dict.fromkeys(names, 0.0)
    tokens, divergence = 0, 0.0
    with decoded_leaves(model, names) as leaves:
        tensors = [leaves[name] for name in names]
        for done, number in enumerate(numbers, start=1):
            found = answer_scores(model, inputs[number])
            labels = draw_labels(found.detach(), 1, generator)
            drawn = torch.autograd.grad(-found.gather(1, labels).sum(), tensors, retain_graph=True)
            divergences = token_divergences(scores[number], found).sum()
            divergence += float(divergences.detach())
            given = torch.autograd.grad(divergences, tensors)
            for name, own, fisher in zip(names, given, drawn, strict=True):
                sums[name] = sums[name] + own if name in sums else own
                traces[name] += float(fisher.float().square().sum(dtype=torch.float64))
            tokens += len(found)
            after(done)
    return KLGradients(
        {name: total.float() / tokens for name, total in sums.items()},
        {name: trace / tokens for name, trace in traces.items()},
        divergence / tokens,
    )


def newton_step(
    gradients: KLGradients,
    spec: LayerSpec,
    moment: Tensor,
    row_factor: Tensor | None,
    dampings: tuple[float, float],
) -> Tensor:
    """−S_o⁻¹ G S_i⁻¹ float32[m, n] of a layer, with S_o ⊗ S_i of the Fisher's trace; S_o the identity where it is None.

    The scale is equation 6's with traces in place of inner products: that of a least-squares fit asks for every
    sample's S_o G_b S_i.
    """
    gradient = gradients.means[spec.name]
    rows = torch.eye(spec.rows, device=moment.device) if row_factor is None else row_factor
    scale = gradients.traces[spec.name] / float(rows.trace() * moment.trace())
    if scale == 0:  # no loss reaches the layer
        return torch.zeros_like(gradient)
    return -newton_shift(gradient, rows, scale * moment, dampings)


def inner_product(gradient: Tensor, shift: Tensor) -> float:
    """⟨G, N⟩ of a layer, below 0 where the shift goes down."""
    return float((gradient * shift).sum())


def step_unit(divergence: float, inner_products: Sequence[float]) -> float:
    """u, by which all layers' steps are shortened: what they promise together is no more than there is.

    On the demo at 2 bits u is 1e-6 to 1e-3, whatever the damping: the model is sure of its answers, and the Fisher at
    its own answers says little of where it errs. Without u the least step tried, 0.03, took the divergence from 0.02
    nats to above 8.
    """
    promised = -0.5 * sum(inner_products)
    return min(1.0, divergence / promised) if promised > 0 else 0.0
