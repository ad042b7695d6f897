"""Verbs that run the whole line: all, demo, eval."""

from __future__ import annotations

import shlex
import sys
import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolchain.bits.allocation import HIGHEST_BITS, LOWEST_PLAIN_BITS
from toolchain.cli.common import (
    BITS_HELP,
    BudgetOption,
    Format,
    FormatOption,
    OutputOption,
    Provider,
    TerminalProgress,
    emit,
    parse_size,
    size,
)
from toolchain.errors import StoppedError, UsageError

if TYPE_CHECKING:
    pass


class Resume(str, Enum):
    auto = "auto"
    required = "required"
    never = "never"


ResumeOption = Annotated[Resume, typer.Option(help="Whether to resume a run found in the output folder.")]
RunArgument = Annotated[Path, typer.Argument(help="A finished run folder.")]
RunOption = Annotated[Path, typer.Option("--output", "-o", help="Run folder.")]


def all_stages(
    model: Annotated[Path | None, typer.Option("--model", "-m", help="Folder of a transformers checkpoint.")] = None,
    calib: Annotated[Path | None, typer.Option(help="Calibration data (.jsonl).")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Evaluation data (.jsonl) with answers; enables the accuracy stage.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Run folder.")] = None,
    target: Annotated[str | None, typer.Option(help="Board to plan for; see mgvq targets.")] = None,
    bits: Annotated[float | None, typer.Option(help=BITS_HELP)] = None,
    budget: BudgetOption = None,
    provider: Annotated[Provider | None, typer.Option(help="Execution provider of onnxruntime.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings in JSON or TOML; flags win over it.")] = None,
    assign: Annotated[list[str] | None, typer.Option("--set", help="One setting, such as quantize.seed=1.")] = None,
    resume: ResumeOption = Resume.auto,
    form: FormatOption = Format.text,
) -> None:
    """Run the whole line: plan, quantize, evaluate, export, rewrite, validate, bundle, report. Repeat it to resume."""
    from toolchain.run.settings import resolve

    flags: dict[str, Any] = {"model": model, "calib": calib, "data": data, "output": output, "target": target}
    flags |= {"quantize.bits": bits, "budget_bytes": parse_size(budget) if budget else None}
    flags |= {"validation.provider": provider.value if provider else None}
    settings, origin = resolve(flags, assign or [], config)
    facts = _run(settings, origin, resume, ())
    emit(facts, _text(facts), form)


def demo(
    output: RunOption = Path("runs/demo"),
    bits: Annotated[
        float | None,
        typer.Option(
            min=LOWEST_PLAIN_BITS,
            max=HIGHEST_BITS,
            help="Index bits averaged over the quantized weights; those of the baseline beside it too.",
        ),
    ] = None,
    resume: ResumeOption = Resume.auto,
    form: FormatOption = Format.text,
) -> None:
    """Run the whole line on the built-in model and images, with round-to-nearest for comparison. Needs no network."""
    from toolchain import demo as builtin
    from toolchain.run.settings import resolve

    flags: dict[str, Any] = {"model": builtin.MODEL, "calib": builtin.CALIBRATION, "data": builtin.EVALUATION}
    settings, origin = resolve(flags | {"output": output, "quantize.bits": bits}, [], None)
    facts = _run(settings, origin, resume, ("rtn",))
    emit(facts, _text(facts), form)


def _run(settings, origin: dict[str, str], resume: Resume, baselines: tuple[str, ...]) -> dict[str, Any]:
    from toolchain.files.folders import write_json
    from toolchain.run.folder import RunFolder
    from toolchain.run.line import check, run_line

    began, progress = time.monotonic(), TerminalProgress()
    checked = check(settings)
    try:
        with RunFolder(settings.output, shlex.join(["mgvq", *sys.argv[1:]]), resume.value) as run:
            resolved = {"settings": settings.model_dump(mode="json"), "origin": origin}
            write_json(settings.output / "config.resolved.json", resolved)
            facts = run_line(checked, run, progress, baselines) | {"seconds": round(time.monotonic() - began, 1)}
            run.note("result", facts)
    except KeyboardInterrupt:
        raise StoppedError(
            f"stopped; finished stages are kept in {settings.output}, the same command goes on from there"
        ) from None
    return facts


def _text(facts: dict[str, Any]) -> str:
    lines = []
    for name, accuracy in facts.get("accuracy", {}).items():
        lines.append(f"accuracy {name:<10} {100 * accuracy:6.1f} %")
    bits = facts["bits"]
    lines.append(
        f"bits       index {bits['index']:.2f}, real {bits['model']:.2f} over the model, "
        f"{bits['language']:.2f} over the decoder"
    )
    lines.append(f"validation {facts['validation']['text']}")
    lines.append(f"bundle     {facts['bundle']}")
    lines.append(f"report     {facts['report']}")
    lines.append(f"next       mgvq run {facts['bundle']} --image IMAGE --prompt QUESTION")
    return "\n".join(lines)


def bundle(
    run: RunArgument,
    output: OutputOption,
    library: Annotated[
        list[str] | None,
        typer.Option(
            help="A built plugin library to carry, as MACHINE:SM:TENSORRT=FILE, such as aarch64:87:10.3=FILE."
        ),
    ] = None,
    form: FormatOption = Format.text,
) -> None:
    """Write the bundle of a finished run to another folder, with plugin libraries if any are given."""
    from toolchain.run.line import bundle_from_run

    written = bundle_from_run(run, output, dict(map(_library, library or [])))
    data = {"bundle": str(written.folder), "files": len(written.files), "bytes": written.bytes}
    emit(data, f"{written.folder}: {data['files']} files, {size(written.bytes)}", form)


def _library(text: str) -> tuple[Path, dict[str, Any]]:
    """File and what it suits, of "aarch64:87:10.3=FILE"; several SMs with commas."""
    suits, _, file = text.partition("=")
    parts = suits.split(":")
    if not file or len(parts) != 3 or not all(parts):
        raise UsageError(f"library {text!r}: expected MACHINE:SM:TENSORRT=FILE, such as aarch64:87:10.3=FILE")
    return Path(file), {"machine": parts[0], "sm": parts[1].split(","), "tensorrt": parts[2]}


def report(run: RunArgument, form: FormatOption = Format.text) -> None:
    """Write report.html of a finished run again."""
    from toolchain.errors import InputDataError
    from toolchain.files.folders import read_json
    from toolchain.run.line import report_from_run

    record = read_json(run / "run.json") if (run / "run.json").is_file() else {}
    if "result" not in record:
        raise InputDataError(f"{run}: expected a finished run (run.json with its result); run mgvq all -o {run} first")
    path = report_from_run(run, record["result"])
    emit({"report": str(path)}, str(path), form)
