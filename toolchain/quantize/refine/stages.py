"""What is done to a whole model once every group has its codes: Jacobi rounds over the codes, then KL fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from toolchain.bits.codebook_sharing import UNIVERSAL
from toolchain.calibration.activations import TokenWeights, collect_pairs
from toolchain.calibration.gradients import ROWS_UP_TO, collect_loss_statistics
from toolchain.checkpoint.install import CODEBOOKS
from toolchain.checkpoint.modules import vq_modules
from toolchain.quantize.driver.request import QuantizationRequest
from toolchain.quantize.mgvq.run import MgvqRun
from toolchain.quantize.refine.finetune import fine_tune
from toolchain.quantize.refine.finetune_settings import FineTuneSettings
from toolchain.quantize.refine.finetune_state import packed, unpacked
from toolchain.quantize.refine.kl_gradients import teacher_scores
from toolchain.quantize.refine.round_moves import RoundOptions
from toolchain.quantize.refine.rounds import Statistics, jacobi_round
from toolchain.values import BitPlan, LayerSpec

ROUNDS = 2
UNFINISHED = "tune.steps"  # the piece that holds a fine-tuning on its way


def refine_model(run: MgvqRun, model: nn.Module, plan: BitPlan, token_weights: TokenWeights) -> dict[str, Any]:
    """What the recipe has done to the whole quantized model, in place: "rounds" and "tune" → what came of it."""
    found: dict[str, Any] = {}
    if run.recipe.rounds:
        found["rounds"] = refine_by_rounds(run, model, plan, token_weights)
    if run.recipe.tune:
        found["tune"] = refine_by_tuning(run, model)
    return found


def refine_by_rounds(
    run: MgvqRun, model: nn.Module, plan: BitPlan, token_weights: TokenWeights
) -> list[dict[str, Any]]:
    """At most ROUNDS Jacobi rounds, in place; what each did. The first that helps nothing is the last.

    Layers in K-segments, embeddings and what is tied to them keep their codes, and codebooks that groups share stay as
    they are. What is held at a time, and what of a round that was killed is kept, `rounds` says.

    Args:
        run: with its recipe's `fisher` rows count by S_o, the second moment of the output gradients; else each alike.
        model: quantized from the request's, with the same column permutations.
    """
    request, recipe, store = run.request, run.recipe, run.store
    linears = [spec for spec in request.specs if spec.kind != "embedding" and not spec.tied_to]
    stored = {spec.group for spec in request.specs if spec.tied_to}
    linears = [spec for spec in linears if spec.group not in stored and not plan.layer(spec.name).segments]
    statistics = Statistics(
        lambda specs: _moments(request, model, specs, token_weights),
        lambda specs: _row_factors(run, specs) if recipe.fisher else {},
        ROWS_UP_TO if recipe.fisher else 0,
    )
    scores = None
    found: list[dict[str, Any]] = []
    for number in range(ROUNDS):
        pieces = store.under(f"during.round.{number}")
        kept = store.get(f"round.{number}")
        if kept is None:
            scores = scores or teacher_scores(request.model, request.inputs)
            result = jacobi_round(
                model,
                scores,
                request.inputs,
                statistics,
                linears,
                plan,
                pieces,
                RoundOptions(keeps_codebook=recipe.shares_codebooks),
                seed=request.seed + number,
                progress=run.progress,
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


def _moments(
    request: QuantizationRequest, model: nn.Module, specs: Sequence[LayerSpec], token_weights: TokenWeights
) -> dict[str, Tensor]:
    """Group → S_i float32[n, n]; the halves that it was added up in go with this call."""
    pairs = collect_pairs(model, None, request.inputs, specs, token_weights)
    return {group: pair.whole.second_moment for group, pair in pairs.items()}


def _row_factors(run: MgvqRun, specs: Sequence[LayerSpec]) -> dict[str, Tensor]:
    return collect_loss_statistics(
        run.request.model,
        run.request.inputs,
        specs,
        rows_up_to=ROWS_UP_TO,
        seed=run.request.seed,
        progress=run.progress,
        what="output factors",
    ).rows


def refine_by_tuning(run: MgvqRun, model: nn.Module) -> dict[str, Any]:
    """Codebooks, scales, norms and biases fine-tuned in place; what that did. A killed run goes on after the last state
    kept, and ends in the same bytes. A part's codebook moves for all that use it; universal codebooks stay universal.

    Args:
        model: quantized from the request's, with the same column permutations.

    Raises:
        InputDataError: the state kept is damaged.
        UsageError: it is of another run.
    """
    request, store = run.request, run.store
    settings = FineTuneSettings(kept_dtype=request.kept_dtype, seed=request.seed)
    if run.recipe.codebooks == UNIVERSAL:
        settings = replace(settings, codebook_rate=0.0)

    def make() -> tuple[dict[str, Tensor], Any]:
        kept = store.get(UNFINISHED, refuses_damage=True)
        result = fine_tune(
            model,
            request.model,
            request.inputs,
            settings,
            progress=run.progress,
            save=lambda state: store.put(UNFINISHED, *packed(state)),
            resume=None if kept is None else unpacked(*kept),
        )
        return _state(model), asdict(result)

    tensors, result = store.get_or_make("tune", make)
    store.drop(UNFINISHED)
    _load(model, tensors)
    return result


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Everything a quantized model stores: codes, scales, codebooks, and the parameters that stay."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _load(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put a state back, in place, so that ties and shared codebooks hold."""
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)
    for module in vq_modules(model).values():
        module.keep(False)
        module.codebook.copy_(model.get_submodule(CODEBOOKS).get_buffer(module.codebook_id))
