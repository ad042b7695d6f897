"""Stage 1: which inputs every layer sees, how much energy each column has, and how much each token counts."""

from __future__ import annotations

from toolchain.calibration.activations import Masses, Survey, survey_inputs
from toolchain.calibration.gradients import collect_loss_statistics
from toolchain.quantize.mgvq.run import MgvqRun
from toolchain.values import LayerSpec


def survey_model(run: MgvqRun) -> Survey:
    """Energies of all columns, and token masses by modality alone; those of attention sinks capped where the recipe
    says so.
    """
    cap = run.job.options.norm_quantile if run.recipe.caps else None
    return survey_inputs(run.job.model, run.job.inputs, _linears(run), run.progress, cap)


def weigh_tokens(run: MgvqRun, survey: Survey) -> Masses:
    """Token masses: with the recipe's Fisher part by the norm of the loss gradient, else the survey's."""
    if not run.recipe.fisher:
        return survey.masses
    job = run.job
    found = collect_loss_statistics(
        job.model, job.inputs, _linears(run), seed=job.seed, power=job.options.token_power, progress=run.progress
    ).masses
    return survey.capped(found, job.options.norm_quantile) if run.recipe.caps else found


def _linears(run: MgvqRun) -> list[LayerSpec]:
    return [spec for spec in run.job.specs if spec.kind != "embedding"]
