"""What is done to a whole model once every group has its codes: Jacobi rounds over the codes, then KL fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from toolchain.bits.codebook_sharing import UNIVERSAL
from toolchain.calibration.activations import Masses, collect_pairs
from toolchain.calibration.gradients import ROWS_UP_TO, collect_loss_statistics
from toolchain.checkpoint.install import TABLES
from toolchain.checkpoint.modules import vq_modules
from toolchain.files.store import ObjectStore
from toolchain.quantize.driver.request import Job
from toolchain.quantize.mgvq.recipe import Recipe
from toolchain.quantize.mgvq.run import MgvqRun
from toolchain.quantize.refine.finetune import fine_tune
from toolchain.quantize.refine.finetune_settings import TuneSettings
from toolchain.quantize.refine.finetune_state import packed, unpacked
from toolchain.quantize.refine.kl_gradients import teacher_scores
from toolchain.quantize.refine.round_moves import RoundOptions
from toolchain.quantize.refine.rounds import Statistics, jacobi_round
from toolchain.values import BitPlan, LayerSpec, Progress

ROUNDS = 2
UNFINISHED = "tune.steps"  # the piece that holds a fine-tuning on its way


def refine_model(run: MgvqRun, model: nn.Module, plan: BitPlan, masses: Masses) -> dict[str, Any]:
    """What the recipe has done to the whole quantized model, in place: "rounds" and "tune" → what came of it."""
    found: dict[str, Any] = {}
    if run.recipe.rounds:
        found["rounds"] = mend_by_rounds(run.job, run.recipe, model, plan, masses, run.store, run.progress)
    if run.recipe.tune:
        found["tune"] = mend_by_tuning(run.job, run.recipe, model, run.store, run.progress)
    return found


def mend_by_rounds(
    job: Job, recipe: Recipe, model: nn.Module, plan: BitPlan, masses: Masses, store: ObjectStore, progress: Progress
) -> list[dict[str, Any]]:
    """At most ROUNDS Jacobi rounds, in place; what each did. The first that helps nothing is the last.

    Layers in K-segments, embeddings and what is tied to them keep their codes, and tables that groups share stay as
    they are. What is held at a time, and what of a round that was killed is kept, `rounds` says.

    Args:
        recipe: with `fisher` rows count by S_o, the second moment of the output gradients; else each alike.
        model: quantized from `job.model`, with the same column orders.
    """
    linears = [spec for spec in job.specs if spec.kind != "embedding" and not spec.tied_to]
    stored = {spec.group for spec in job.specs if spec.tied_to}
    linears = [spec for spec in linears if spec.group not in stored and not plan.layer(spec.name).segments]
    statistics = Statistics(
        lambda specs: _moments(job, model, specs, masses),
        lambda specs: _row_factors(job, specs, progress) if recipe.fisher else {},
        ROWS_UP_TO if recipe.fisher else 0,
    )
    scores = None
    found: list[dict[str, Any]] = []
    for number in range(ROUNDS):
        pieces = store.under(f"during.round.{number}")
        kept = store.get(f"round.{number}")
        if kept is None:
            scores = scores or teacher_scores(job.model, job.inputs)
            result = jacobi_round(
                model,
                scores,
                job.inputs,
                statistics,
                linears,
                plan,
                pieces,
                RoundOptions(keeps_tables=recipe.shares_tables),
                seed=job.seed + number,
                progress=progress,
            )
            store.put(f"round.{number}", _state(model), asdict(result))
            found.append(asdict(result))
        else:
            _load(model, kept[0])
            found.append(kept[1])
        pieces.clear()
        if not found[-1]["step"]:
            break
    return found


def _moments(job: Job, model: nn.Module, specs: Sequence[LayerSpec], masses: Masses) -> dict[str, Tensor]:
    """Group → S_i float32[n, n]; the halves that it was added up in go with this call."""
    pairs = collect_pairs(model, None, job.inputs, specs, masses)
    return {group: pair.whole.moment / pair.whole.mass for group, pair in pairs.items()}


def _row_factors(job: Job, specs: Sequence[LayerSpec], progress: Progress) -> dict[str, Tensor]:
    return collect_loss_statistics(
        job.model,
        job.inputs,
        specs,
        rows_up_to=ROWS_UP_TO,
        seed=job.seed,
        progress=progress,
        what="output factors",
    ).rows


def mend_by_tuning(
    job: Job, recipe: Recipe, model: nn.Module, store: ObjectStore, progress: Progress
) -> dict[str, Any]:
    """Tables, scales, norms and biases fine-tuned in place; what that did. A killed run goes on after the last state
    kept, and ends in the same bytes. A part's table moves for all that use it; universal tables stay universal.

    Args:
        model: quantized from `job.model`, with the same column orders.

    Raises:
        InputDataError: the state kept is damaged.
        UsageError: it is of another run.
    """

    settings = TuneSettings(kept_dtype=job.kept_dtype, seed=job.seed)
    if recipe.tables == UNIVERSAL:
        settings = replace(settings, table_rate=0.0)

    def make() -> tuple[dict[str, Tensor], Any]:
        kept = store.get(UNFINISHED, refuses_damage=True)
        result = fine_tune(
            model,
            job.model,
            job.inputs,
            settings,
            progress=progress,
            save=lambda state: store.put(UNFINISHED, *packed(state)),
            resume=None if kept is None else unpacked(*kept),
        )
        return _state(model), asdict(result)

    tensors, result = store.made("tune", make)
    store.drop(UNFINISHED)
    _load(model, tensors)
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
