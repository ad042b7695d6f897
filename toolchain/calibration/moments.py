"""Second moments of the inputs that layers see, over calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from toolchain.calibration.inputs import CalibrationInput
from toolchain.checkpoint.modules import patch_rows
from toolchain.errors import InputDataError
from toolchain.values import LayerSpec

# A tied matrix is read twice: as the head, where the head's inputs weigh columns, and as the embedding, where none
# counts more than another. Half of the metric for each.
EMBEDDING_SHARE = 0.5


@dataclass(frozen=True)
class Moments:
    """second_moment float32[n, n], E[x xᵀ] of a layer's inputs, modalities balanced; tokens that went into it."""

    second_moment: Tensor
    tokens: int


@dataclass
class _Sums:
    """Running Σ x xᵀ and token counts, one pair a modality."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def add(self, modality: str, rows: Tensor) -> None:
        if len(rows):
            self.sums[modality] = self.sums.get(modality, 0) + rows.T @ rows
            self.tokens[modality] = self.tokens.get(modality, 0) + len(rows)

    def moments(self) -> Moments:
        """Every modality that is present has equal token weight, however many tokens it has."""
        means = [self.sums[name] / self.tokens[name] for name in self.sums]
        return Moments(torch.stack(means).mean(dim=0), sum(self.tokens.values()))


class _AllSeenError(Exception):
    """Ends a forward pass: every layer asked about has been reached."""


def collect_moments(
    model: nn.Module, inputs: Iterable[CalibrationInput], layers: Iterable[LayerSpec]
) -> dict[str, Moments]:
    """Layer name → moments of its input over all forward passes, accumulated in float32.

    Layers of one group read the same input and share one `Moments`. A forward pass stops at the last layer asked
    about, which is not run itself. In decoder layers image and text tokens have half of the token weight each; the
    head is asked about text positions only, because what it says at an image's is never read.

    Raises:
        InputDataError: no input reaches a layer.
    """
    layers = tuple(layers)
    first: dict[str, LayerSpec] = {}
    for spec in layers:
        first.setdefault(spec.group, spec)
    sums = {group: _Sums() for group in first}
    seen: set[str] = set()
    state: dict[str, Tensor] = {}

    def hook_for(spec: LayerSpec, kernel: tuple[int, ...] | None) -> Callable[..., None]:
        def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            _accumulate(sums[spec.group], spec, arguments[0].detach(), kernel, state["is_image"])
            seen.add(spec.group)
            if len(seen) == len(first):
                raise _AllSeenError

        return hook

    handles = []
    for spec in first.values():
        module = model.get_submodule(spec.name)
        kernel = _kernel_of(module) if spec.kind == "conv" else None
        handles.append(module.register_forward_pre_hook(hook_for(spec, kernel)))
    try:
        for one in inputs:
            seen.clear()
            state["is_image"] = one.is_image
            _run(model, one.tensors)
    finally:
        for handle in handles:
            handle.remove()
    for group, found in sums.items():
        if not found.tokens:
            raise InputDataError(f"layer {first[group].name}: no calibration input reaches it; add images")
    moments = {group: found.moments() for group, found in sums.items()}
    return {spec.name: moments[spec.group] for spec in layers}


def _run(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    try:
        with torch.no_grad():
            model(**tensors, use_cache=False)
    except _AllSeenError:
        return


def _kernel_of(module: nn.Module) -> tuple[int, ...]:
    kernel: Any = getattr(module, "kernel_size", None) or module.kernel
    return tuple(kernel)


def _accumulate(sums: _Sums, spec: LayerSpec, x: Tensor, kernel: tuple[int, ...] | None, is_image: Tensor) -> None:
    rows = (patch_rows(x, kernel) if kernel else x).reshape(-1, spec.columns).float()
    if spec.part not in ("language", "head") or len(rows) != len(is_image):
        sums.add("all", rows)
        return
    sums.add("text", rows[~is_image])
    if spec.part == "language":
        sums.add("image", rows[is_image])


def tied_moment(moment: Tensor) -> Tensor:
    """H float32[n, n] of a table that is head and embedding at once, from the second moment of the head's inputs."""
    identity = torch.eye(len(moment), device=moment.device)
    return (1 - EMBEDDING_SHARE) * moment + EMBEDDING_SHARE * moment.diagonal().mean() * identity


def layer_moments(
    model: nn.Module, inputs: Sequence[CalibrationInput], step: Sequence[LayerSpec], specs: Sequence[LayerSpec]
) -> dict[str, Tensor]:
    """Layer name → H float32[n, n]. An embedding's is the identity, half of it the head's where they are tied."""
    heads = {spec.tied_to: spec for spec in specs if spec.tied_to}
    asked = [spec for spec in step if spec.kind != "embedding"]
    asked += [heads[spec.name] for spec in step if spec.kind == "embedding" and spec.name in heads]
    collected = collect_moments(model, inputs, asked) if asked else {}
    found = {}
    for spec in step:
        if spec.kind != "embedding":
            found[spec.name] = collected[spec.name].second_moment
            continue
        found[spec.name] = torch.eye(spec.columns)
        if spec.name in heads:
            found[spec.name] = tied_moment(collected[heads[spec.name].name].second_moment)
    return found
