"""What the loss asks of every layer: token weights, output curvature and held-out gradients, from backward passes.

The loss is the cross entropy of answers drawn from the model itself, so that its gradients have mean zero and their
second moment is the curvature of KL(model ‖ quantized model).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from toolchain.calibration.inputs import CalibrationInput
from toolchain.checkpoint.modules import patch_rows
from toolchain.errors import InputDataError
from toolchain.values import SILENT, LayerSpec, Progress, groups_of
from toolchain.vq.curvature import balanced_token_weights, unit_mean

# Parts of the decoder, where image and text tokens stand side by side.
TOKEN_PARTS = ("language", "head")
TEXT, IMAGE = MODALITIES = ("text", "image")
ROWS_UP_TO = 4_096  # layers of more outputs take S_o = I: S_o alone would be 64 MiB and more


@dataclass(frozen=True)
class GradientSample:
    """One sequence's gradient of one layer in factors, G_b = δᵀ x: δ float32[t, m] and x float32[t, n].

    Of an embedding x is the ids int64[t] and δ float32[t, n]: row `id` of G_b is the sum of its tokens' δ.
    `is_image` bool[t] says which tokens are an image's, where the layer sees both kinds; else None.
    """

    outputs: Tensor
    inputs: Tensor
    is_image: Tensor | None = None

    def of_tokens(self, wanted: Tensor) -> GradientSample:
        """What the tokens bool[t] give of the gradient; G_b is the sum of what all give."""
        return GradientSample(self.outputs[wanted], self.inputs[wanted])

    def product(self, difference: Tensor) -> float:
        """⟨G_b, E⟩ for E float32[m, n], without G_b ever being whole."""
        if not self.inputs.is_floating_point():
            return float((difference[self.inputs] * self.outputs).sum(dtype=torch.float64))
        return float(self.by_column(difference).sum())

    def by_column(self, difference: Tensor) -> Tensor:
        """float64[n]: each column's part of ⟨G_b, E⟩ for E float32[m, n] of a linear."""
        return ((self.outputs @ difference) * self.inputs).sum(dim=0, dtype=torch.float64)


@dataclass
class LossStatistics:
    """Of the layers asked about, on the samples given.

    token_weights: group → float32[tokens] a sample, summing to 1 over all samples: how much each token counts in S_i.
    rows: layer → S_o float32[m, m] of mean diagonal 1, for the layers whose S_o was asked for.
    gradient_samples: layer → gradients of the held-out sequences.
    """

    token_weights: dict[str, list[Tensor]] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    gradient_samples: dict[str, list[GradientSample]] = field(default_factory=dict)


@dataclass
class _Sums:
    """Of one layer while samples pass."""

    norms: list[Tensor] = field(default_factory=list)
    rows: Tensor | None = None
    gradient_samples: list[GradientSample] = field(default_factory=list)


def layer_rows(x: Tensor, spec: LayerSpec, module: nn.Module) -> Tensor:
    """float32[tokens, n]: what a layer's weight multiplies, from the input of its module; ids int64[tokens] of an
    embedding.
    """
    if spec.kind == "embedding":
        return x.detach().reshape(-1)
    if spec.kind == "conv":
        kernel: Any = getattr(module, "kernel_size", None) or module.kernel
        x = patch_rows(x, tuple(kernel))
    return x.detach().reshape(-1, spec.columns).float()


def marks_of(spec: LayerSpec, tokens: int, one: CalibrationInput) -> Tensor | None:
    """bool[tokens], which inputs of a layer stand at an image's positions; None where it sees one kind alone."""
    mixed = spec.part in TOKEN_PARTS and tokens == len(one.is_image)
    return one.is_image if mixed else None


def lone_modality(spec: LayerSpec) -> str:
    """What a layer sees that does not see both: all before the decoder is of an image, all else of text."""
    return IMAGE if spec.part in ("vision", "projector") else TEXT


def of_modality(gradient_sample: GradientSample, kind: str) -> GradientSample:
    """What one modality's tokens give of a gradient; all of it where the layer sees one kind alone."""
    if gradient_sample.is_image is None:
        return gradient_sample
    marks = gradient_sample.is_image.to(gradient_sample.outputs.device)
    return gradient_sample.of_tokens(marks if kind == IMAGE else ~marks)


def output_rows(y: Tensor, spec: LayerSpec) -> Tensor:
    """float32[tokens, m] from a layer's output, or from its gradient."""
    if spec.kind == "conv":
        y = y.movedim(1, -1)
    return y.detach().reshape(-1, spec.columns if spec.kind == "embedding" else spec.rows).float()


@contextmanager
def watched_layers(
    model: nn.Module, specs: Iterable[LayerSpec], see: Callable[[LayerSpec, Tensor, Tensor], None]
) -> Iterator[None]:
    """While the context lasts, `see(spec, x [tokens, n], δ [tokens, m])` is called for layers a backward reaches."""
    handles = []

    def hook_for(spec: LayerSpec) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            rows = layer_rows(arguments[0], spec, module)
            if not output.requires_grad:
                output.requires_grad_(True)
            # A copy: the gradient of a first layer's output is what a second backward pass adds its own into.
            output.register_hook(lambda gradient: see(spec, rows, output_rows(gradient, spec).clone()))

        return hook

    try:
        for spec in specs:
            handles.append(model.get_submodule(spec.name).register_forward_hook(hook_for(spec)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def collect_loss_statistics(
    model: nn.Module,
    inputs: Sequence[CalibrationInput],
    specs: Sequence[LayerSpec],
    *,
    held_out: Sequence[int] = (),
    rows_up_to: int = 0,
    draws: int = 1,
    seed: int = 0,
    power: float = 1.0,
    progress: Progress = SILENT,
    what: str = "gradients",
) -> LossStatistics:
    """Statistics of `specs` from `draws` drawn answers a sample: one forward and `draws` backward passes each.

    Args:
        model: with parameters that need no gradient; gradients flow from the first layers' outputs on.
        specs: linears and convolutions; an embedding gives gradient samples alone.
        held_out: samples whose gradients are kept as gradient samples, and stay out of the S_o.
        rows_up_to: layers of at most so many outputs get an S_o.
        power: of the gradient norm in a token's weight (`curvature.balanced_token_weights`).
        what: the passes are called, in progress.

    Raises:
        InputDataError: the loss of some sample does not reach a layer, or reaches it more than once.
    """
    sums = {spec.name: _Sums() for spec in specs}
    apart = set(held_out)
    generator = torch.Generator().manual_seed(seed)
    state = {"sample": 0, "draw": 0}

    def see(spec: LayerSpec, x: Tensor, delta: Tensor) -> None:
        own = sums[spec.name]
        norms = delta.square().mean(dim=1)
        if state["draw"] == 0:
            own.norms.append(norms / draws)
        else:
            own.norms[-1] += norms / draws
        if state["sample"] in apart:
            own.gradient_samples.append(GradientSample(delta, x, marks_of(spec, len(x), inputs[state["sample"]])))
        elif spec.rows <= rows_up_to and spec.kind != "embedding":
            # G_b G_bᵀ = δᵀ (x xᵀ) δ, G_b never formed where a sequence has fewer tokens than the layer columns.
            rows = delta.T @ ((x @ x.T) @ delta) if len(x) <= spec.columns else _outer(delta.T @ x)
            own.rows = rows if own.rows is None else own.rows + rows

    with watched_layers(model, specs, see):
        for number, one in enumerate(inputs):
            state["sample"] = number
            log_probabilities = answer_scores(model, one)
            labels = draw_labels(log_probabilities.detach(), draws, generator)
            for draw in range(draws):
                state["draw"] = draw
                loss = -log_probabilities.gather(1, labels[:, draw : draw + 1]).mean()
                loss.backward(retain_graph=draw + 1 < draws)
            progress.step(number + 1, len(inputs), what)
    return _statistics(specs, sums, inputs, power)


def _outer(gradient: Tensor) -> Tensor:
    return gradient @ gradient.T


def answer_scores(model: nn.Module, one: CalibrationInput) -> Tensor:
    """float32[t, v]: log-probabilities of each answer token given what is before it, or of the next token."""
    tokens = one.answer_tokens
    logits = model(**one.tensors, use_cache=False, logits_to_keep=tokens + 1).logits[0]
    return torch.log_softmax((logits[:-1] if tokens else logits).float(), dim=-1)


def draw_labels(log_probabilities: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """int64[t, draws]: tokens drawn from the model's own distribution."""
    return torch.multinomial(log_probabilities.exp().cpu(), draws, replacement=True, generator=generator).to(
        log_probabilities.device
    )


def _statistics(
    specs: Sequence[LayerSpec], sums: dict[str, _Sums], inputs: Sequence[CalibrationInput], power: float
) -> LossStatistics:
    found = LossStatistics()
    for spec in specs:
        own = sums[spec.name]
        if own.rows is not None:
            found.rows[spec.name] = unit_mean(own.rows)
        if own.gradient_samples:
            found.gradient_samples[spec.name] = own.gradient_samples
    for group, members in groups_of(spec for spec in specs if spec.kind != "embedding").items():
        rows = sum(spec.rows for spec in members)
        for spec in members:
            if len(sums[spec.name].norms) != len(inputs):
                raise InputDataError(
                    f"layer {spec.name}: the loss of {len(sums[spec.name].norms)} of {len(inputs)} calibration inputs "
                    "reaches it, expected every one; every line needs an image, and a layer must run once a pass"
                )
        shares = [[norms * (spec.rows / rows) for norms in sums[spec.name].norms] for spec in members]
        norms = [torch.stack(parts).sum(dim=0) for parts in zip(*shares, strict=True)]
        found.token_weights[group] = split_token_weights(norms, members[0], inputs, power)
    return found


def split_token_weights(
    norms: list[Tensor], spec: LayerSpec, inputs: Sequence[CalibrationInput], power: float
) -> list[Tensor]:
    """float32[tokens] a sample, summing to 1 over all: `balanced_token_weights` of a layer's inputs from all samples
    together.

    Outside the decoder, and where a layer is asked about some positions only, all tokens are of one kind.
    """
    marks = [one.is_image for one in inputs]
    mixed = spec.part in TOKEN_PARTS and all(len(a) == len(b) for a, b in zip(norms, marks, strict=True))
    kinds = torch.cat(marks).to(norms[0].device) if mixed else None
    token_weights = balanced_token_weights(torch.cat(norms), kinds, power)
    return list(token_weights.split([len(part) for part in norms]))
