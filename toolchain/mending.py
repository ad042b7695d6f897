"""What is done to a whole model once every group has its codes: Jacobi rounds over the codes, then KL fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolchain.calibration import CalibrationInput
from toolchain.finetune import TuneSettings, fine_tune
from toolchain.install import TABLES
from toolchain.kl_shifts import teacher_scores
from toolchain.modules import vq_modules
from toolchain.moments import Masses, collect_pairs
from toolchain.objects import ObjectStore
from toolchain.rounds import jacobi_round
from toolchain.statistics import collect_loss_statistics
from toolchain.values import BitPlan, LayerSpec

Watch = Callable[[str, int, int], None]
ROUNDS = 2
ROWS_UP_TO = 4_096  # layers of more outputs take S_o = I in a round: S_o alone would be 64 MiB and more


@dataclass(frozen=True)
class Patient:
    """A quantized model, the full-precision one with the same column orders, and what they are compared on."""

    model: nn.Module
    full: nn.Module
    inputs: Sequence[CalibrationInput]
    specs: Sequence[LayerSpec]
    plan: BitPlan
    masses: Masses
    seed: int
    kept_dtype: torch.dtype


def mend_by_rounds(patient: Patient, store: ObjectStore, coupled: bool, watch: Watch) -> list[dict[str, Any]]:
    """At most ROUNDS Jacobi rounds, in place; what each did. The first that helps nothing is the last.

    Layers in K-segments, embeddings and what is tied to them keep their codes. Second moments of all layers' inputs
    are held at once.

    Args:
        coupled: rows count by S_o, the second moment of the output gradients; else each alike.
    """
    linears = [spec for spec in patient.specs if spec.kind != "embedding" and not spec.tied_to]
    stored = {spec.group for spec in patient.specs if spec.tied_to}
    linears = [spec for spec in linears if spec.group not in stored and not patient.plan.layer(spec.name).segments]
    scores, factors = None, None
    found: list[dict[str, Any]] = []
    for number in range(ROUNDS):
        kept = store.get(f"round.{number}")
        if kept is None:
            if scores is None:
                scores = teacher_scores(patient.full, patient.inputs)
                factors = _row_factors(patient, linears, watch) if coupled else {}
            pairs = collect_pairs(patient.model, None, patient.inputs, linears, patient.masses)
            moments = {group: pair.whole.moment / pair.whole.mass for group, pair in pairs.items()}
            result = jacobi_round(
                patient.model,
                scores,
                patient.inputs,
                moments,
                factors or {},
                patient.specs,
                patient.plan,
                seed=patient.seed + number,
                progress=lambda what, done, total: watch(f"round: {what}", done, total),
            )
            store.put(f"round.{number}", _state(patient.model), asdict(result))
            found.append(asdict(result))
        else:
            _load(patient.model, kept[0])
            found.append(kept[1])
        if not found[-1]["step"]:
            break
    return found


def _row_factors(patient: Patient, linears: Sequence[LayerSpec], watch: Watch) -> dict[str, Tensor]:
    return collect_loss_statistics(
        patient.full,
        patient.inputs,
        linears,
        rows_up_to=ROWS_UP_TO,
        seed=patient.seed,
        progress=lambda done, total: watch("output curvature", done, total),
    ).rows


def mend_by_tuning(patient: Patient, store: ObjectStore, watch: Watch) -> dict[str, Any]:
    """Tables, scales, norms and biases fine-tuned in place; what that did."""

    def make() -> tuple[dict[str, Tensor], Any]:
        result = fine_tune(
            patient.model,
            patient.full,
            patient.inputs,
            TuneSettings(kept_dtype=patient.kept_dtype),
            seed=patient.seed,
            progress=lambda done, total, loss: watch("fine-tuning", done, total),
        )
        return _state(patient.model), asdict(result)

    tensors, result = store.made("tune", make)
    _load(patient.model, tensors)
    return result


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Everything a mended model stores: codes, scales, tables, and the parameters that stay."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _load(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put a state back, in place, so that ties and shared tables hold."""
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)
    for module in vq_modules(model).values():
        module.keep(False)
        module.table.copy_(model.get_submodule(TABLES).get_buffer(module.table_id))
