"""Verbs that look and change nothing: targets, models, plan, doctor, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toolchain.cli.common import (
    BitsOption,
    BudgetOption,
    Format,
    FormatOption,
    ModelOption,
    TargetOption,
    bits_or_budget,
    emit,
    size,
    table,
)
from toolchain.errors import BudgetError, EnvironmentMismatch, InputDataError


def targets(form: FormatOption = Format.text) -> None:
    """List the boards that models can be planned and bundled for."""
    from toolchain.plan.target import list_targets, load_target

    found = [load_target(name) for name in list_targets()]
    rows = [
        {
            "name": t.name,
            "board": t.title,
            "sm": t.sm,
            "usable": size(t.memory_usable_bytes),
            "bandwidth": f"{t.bandwidth_pin_bytes_per_s / 1e9:.0f} GB/s",
            "software": ", ".join(f"JetPack {s.jetpack} (TensorRT {s.tensorrt})" for s in t.software),
        }
        for t in found
    ]
    emit({"targets": [t.to_json() for t in found]}, table(rows, list(rows[0])), form)


def models(form: FormatOption = Format.text) -> None:
    """List the supported model families."""
    from toolchain.models.registry import FAMILIES

    rows = [{"family": f.name, "model_type": ", ".join(f.model_types)} for f in FAMILIES]
    emit({"models": rows}, table(rows, ["family", "model_type"]), form)


def doctor(target: Annotated[str | None, typer.Option(help="Also check the software releases of this board.")] = None,
           form: FormatOption = Format.text) -> None:  # fmt: skip
    """Check this machine: packages, GPU, kernels, compiler, memory, JetPack. Exit code 6 if a check fails."""
    from toolchain.plan.target import load_target
    from toolchain.run.doctor import diagnose

    report = diagnose(load_target(target) if target else None)
    rows = [{"": c.status, "check": c.name, "found": c.found, "expected": c.expected} for c in report.checks]
    fixes = "".join(f"\n{c.status}: {c.name}: {c.fix}" for c in report.checks if c.fix)
    emit(report.to_json(), table(rows, ["", "check", "found", "expected"]) + fixes, form)
    if report.exit_code:
        raise EnvironmentMismatch(f"{report.verdict}; the lines above name what to do")


def plan(
    model: ModelOption,
    target: TargetOption = "orin-nano-8gb",
    bits: BitsOption = None,
    budget: BudgetOption = None,
    method: Annotated[str, typer.Option(help="Quantization method; see mgvq quantize.")] = "mgvq",
    context: Annotated[
        int | None, typer.Option(min=1, help="Context length in tokens. Default: that of the target.")
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="Largest image, WIDTHxHEIGHT. Default: the limit of the target.")
    ] = None,
    form: FormatOption = Format.text,
) -> None:
    """Check whether a model fits a board, from config.json alone: memory, latency, and what to reduce.

    Exit code 5 if it does not fit. Example: mgvq plan -m MODEL --target orin-nano-8gb --image 1280x720
    """
    from toolchain.plan.target import load_target
    from toolchain.quantize.methods import stored_method
    from toolchain.run.planning import parse_image, plan_model

    board = load_target(target)
    average, budget_bytes = bits_or_budget(bits, budget)
    size, chosen = parse_image(image), stored_method(method)
    recipe = (chosen.overlaps, chosen.codebooks)
    planned = plan_model(model, board, average, context, size, budget_bytes, (), *recipe)
    emit(planned.to_json(), planned.text(), form)
    if planned.problems:
        raise BudgetError(
            f"{model} does not fit {target}: {planned.problems[0]}; the advice above says what to turn down"
        )


def inspect(
    path: Annotated[Path, typer.Argument(help="A run folder, a bundle, or a quantized checkpoint.")],
    form: FormatOption = Format.text,
) -> None:
    """Show the content of a run, bundle or quantized checkpoint: bits and bytes by part, stages; hashes are checked."""
    from toolchain.run.inspection import inspect_folder

    if not path.is_dir():
        raise InputDataError(
            f"{path} does not exist or is no folder; expected a run, a bundle or a quantized checkpoint"
        )
    data, text = inspect_folder(path)
    emit(data, text, form)
