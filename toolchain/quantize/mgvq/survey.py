"""Stage 1: which inputs every layer sees, how much energy each column has, and how much each token counts."""

from __future__ import annotations

from toolchain.calibration.activations import Survey, TokenWeights, survey_inputs
from toolchain.calibration.gradients import collect_loss_statistics
from toolchain.quantize.mgvq.run import MgvqRun
from toolchain.values import LayerSpec


def survey_model(run: MgvqRun) -> Survey:
    """Energies of all columns, and token weights by modality alone; those of attention sinks capped where the recipe
    says so.
    """
    cap = run.request.options.norm_quantile if run.recipe.sinkcap else None
    return survey_inputs(run.request.model, run.request.inputs, _linears(run), run.progress, cap)


def weigh_tokens(run: MgvqRun, survey: Survey) -> TokenWeights:
    """Token weights: with the recipe's Fisher part by the norm of the loss gradient, else the survey's."""
    if not run.recipe.fisher:
        return survey.token_weights
    request = run.request
    found = collect_loss_statistics(
        request.model,
        request.inputs,
        _linears(run),
        seed=request.seed,
        power=request.options.token_power,
        progress=run.progress,
    ).token_weights
    return survey.capped(found, request.options.norm_quantile) if run.recipe.sinkcap else found


def _linears(run: MgvqRun) -> list[LayerSpec]:
    return [spec for spec in run.request.specs if spec.kind != "embedding"]
