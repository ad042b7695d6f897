"""Second moments of layer inputs while a model is quantized: of the quantized prefix, and against full precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from toolchain.calibration import CalibrationInput
from toolchain.errors import InputDataError
from toolchain.statistics import layer_rows
from toolchain.values import LayerSpec
from toolchain.vq.drift import Pair, PairMoments

Masses = Mapping[str, list[Tensor]]


class _AllSeenError(Exception):
    """Ends a forward pass: every layer asked about has been reached."""


@dataclass
class _Seen:
    """The inputs of one forward pass, group → float32[tokens, n]."""

    rows: dict[str, Tensor]


def collect_pairs(
    quantized: nn.Module,
    full: nn.Module | None,
    inputs: Sequence[CalibrationInput],
    specs: Sequence[LayerSpec],
    masses: Masses,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, PairMoments]:
    """Group → moments of its inputs x_q in the model as it stands, against x_f in the full-precision one.

    Sums are weighted by token masses, accumulated in float32, in two halves of the samples (even, odd) that
    `drift.gated_shift` holds against one another.

    Args:
        full: None where no drift is wanted: x_f is then x_q.
        masses: group → float32[tokens] a sample.

    Raises:
        InputDataError: a group sees other token counts than its masses have.
    """
    first: dict[str, LayerSpec] = {}
    for spec in specs:
        first.setdefault(spec.group, spec)
    halves: dict[str, list[Pair | None]] = {group: [None, None] for group in first}
    for number, one in enumerate(inputs):
        own = inputs_of(quantized, one, first)
        other = own if full is None else inputs_of(full, one, first)
        for group, rows in own.items():
            mass = masses[group][number].to(rows.device)
            if len(mass) != len(rows):
                raise InputDataError(
                    f"layer {first[group].name}: sample {number} gave {len(rows)} inputs, its token masses are of "
                    f"{len(mass)}; statistics and moments must be taken with the same samples"
                )
            found = Pair.of(rows, other[group], mass)
            halves[group][number % 2] = found.added(halves[group][number % 2])
        if progress:
            progress(number + 1, len(inputs))
    return {group: PairMoments.merged(pair) for group, pair in halves.items()}


def inputs_of(model: nn.Module, one: CalibrationInput, layers: Mapping[str, LayerSpec]) -> dict[str, Tensor]:
    """Group → float32[tokens, n], the inputs of one layer a group; the pass ends at the last one."""
    seen = _Seen({})

    def hook_for(group: str, spec: LayerSpec):
        def hook(module, arguments) -> None:
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
    return seen.rows
