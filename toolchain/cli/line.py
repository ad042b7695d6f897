"""Verbs that run the whole line: all, demo, eval."""

from __future__ import annotations

import shlex
import sys
import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolchain.bit_allocation import HIGHEST_BITS, LOWEST_PLAIN_BITS
from toolchain.cli.app import app
from toolchain.cli.common import (
    BITS_HELP,
    BudgetOption,
    Format,
    FormatOption,
    ModelOption,
    OutputOption,
    Progress,
    Provider,
    emit,
    parse_size,
    size,
)
from toolchain.errors import StoppedError, UsageError

if TYPE_CHECKING:
    from toolchain.evaluate import Evaluation


class Resume(str, Enum):
    auto = "auto"
    required = "required"
    never = "never"


ResumeOption = Annotated[Resume, typer.Option(help="Continue a run found in the output folder.")]
RunArgument = Annotated[Path, typer.Argument(help="A finished run folder.")]
RunOption = Annotated[Path, typer.Option("--output", "-o", help="Run folder.")]


@app.command(name="all")
def all_stages(
    model: Annotated[Path | None, typer.Option("--model", "-m", help="Folder of a transformers checkpoint.")] = None,
    calib: Annotated[Path | None, typer.Option(help="Calibration manifest (.jsonl).")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Evaluation manifest with answers; accuracy is measured if given.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Run folder.")] = None,
    target: Annotated[str | None, typer.Option(help="Board to plan for; see mgvq targets.")] = None,
    bits: Annotated[float | None, typer.Option(help=BITS_HELP)] = None,
    budget: BudgetOption = None,
    provider: Annotated[Provider | None, typer.Option(help="onnxruntime's execution provider.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings in JSON or TOML; flags win over it.")] = None,
    assign: Annotated[list[str] | None, typer.Option("--set", help="One setting, such as quantize.seed=1.")] = None,
    resume: ResumeOption = Resume.auto,
    form: FormatOption = Format.text,
) -> None:
    """Run the whole line: plan, quantize, evaluate, export, rewrite, validate, bundle, report."""
    from toolchain.config import resolve

    flags: dict[str, Any] = {"model": model, "calib": calib, "data": data, "output": output, "target": target}
    flags |= {"quantize.bits": bits, "budget_bytes": parse_size(budget) if budget else None}
    flags |= {"validation.provider": provider.value if provider else None}
    settings, origin = resolve(flags, assign or [], config)
    facts = _run(settings, origin, resume, ())
    emit(facts, _text(facts), form)


@app.command()
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
    """Run the whole line on the built-in model and pictures, with round-to-nearest beside it. No network."""
    from toolchain import demo as builtin
    from toolchain.config import resolve

    flags: dict[str, Any] = {"model": builtin.MODEL, "calib": builtin.CALIBRATION, "data": builtin.EVALUATION}
    settings, origin = resolve(flags | {"output": output, "quantize.bits": bits}, [], None)
    facts = _run(settings, origin, resume, ("rtn",))
    emit(facts, _text(facts), form)


def _run(settings, origin: dict[str, str], resume: Resume, baselines: tuple[str, ...]) -> dict[str, Any]:
    from toolchain.line import check, run_line
    from toolchain.runfolder import RunFolder
    from toolchain.values import write_json

    began, progress = time.monotonic(), Progress()
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
    lines.append(f"next       mgvq run {facts['bundle']} --image PICTURE --prompt QUESTION")
    return "\n".join(lines)


@app.command()
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
    """Write the bundle of a finished run to another place."""
    from toolchain.line import bundle_from_run

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


@app.command()
def report(run: RunArgument, form: FormatOption = Format.text) -> None:
    """Write report.html of a finished run again."""
    from toolchain.errors import InputDataError
    from toolchain.line import report_from_run
    from toolchain.models.family import read_json

    record = read_json(run / "run.json") if (run / "run.json").is_file() else {}
    if "result" not in record:
        raise InputDataError(f"{run}: expected a finished run (run.json with its result); run mgvq all -o {run} first")
    path = report_from_run(run, record["result"])
    emit({"report": str(path)}, str(path), form)


@app.command(name="eval")
def evaluate(
    model: ModelOption,
    data: Annotated[Path, typer.Option(help="Manifest whose lines have answers.")],
    calib: Annotated[Path | None, typer.Option(help="Calibration manifest; refused when it shares a picture.")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Checkpoint to measure KL divergence from, the full-precision one as a rule.")
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="What every quantized layer loses too, from --reference, by modality.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    form: FormatOption = Format.text,
) -> None:
    """Exact-answer accuracy of a checkpoint, quantized or not, on a manifest; with --reference, KL divergence too."""
    from toolchain.calibration import read_manifest
    from toolchain.checkpoint import load_any
    from toolchain.evaluate import answer_all, checkpoint_log_probabilities, divergence_from, refuse_overlap
    from toolchain.layer_errors import checkpoint_layer_errors
    from toolchain.mgvq.dealing import read_orders
    from toolchain.models.family import family_for, read_config
    from toolchain.models.runner import torch_graphs
    from toolchain.modules import keep_decoded

    if layers and reference is None:
        raise UsageError("--layers measures from a reference; add --reference with the full-precision checkpoint")
    config = read_config(model)
    family = family_for(config)
    samples = read_manifest(data)
    if calib is not None:
        refuse_overlap(read_manifest(calib), samples)
    processor, progress = family.load_processor(model), Progress()
    expected = None
    if reference is not None:
        progress.stage(f"reference  {reference} on {len(samples)} questions")
        expected = checkpoint_log_probabilities(reference, processor, samples, progress.step)
    loaded = load_any(model)
    progress.stage(f"evaluate   {model} on {len(samples)} questions")
    with keep_decoded(loaded):
        found = answer_all(processor.host, torch_graphs(family, loaded), samples, max_new_tokens, progress.step)
        interval = divergence_from(expected, loaded, processor, samples, 0, progress.step) if expected else None
        lost = None
        if layers and reference:
            lost = checkpoint_layer_errors(reference, loaded, samples, progress.step, read_orders(model))
    result, text = _evaluation(found)
    if interval:
        result |= interval.to_json()
        text += f"\nKL {interval} nats an answer token, from {reference}"
    if lost:
        from toolchain.cli.research import layer_text

        result["layers"] = lost
        text += f"\nworst layers: share of the output lost on these questions\n{layer_text(lost)}"
    emit(result, text, form)


def _evaluation(found: Evaluation) -> tuple[dict[str, Any], str]:
    """Accuracy and wrong answers, for other tools and for people (the first five)."""
    wrong = [
        {"image": a.sample.image.name, "prompt": a.sample.prompt, "answer": a.sample.answer, "given": a.given}
        for a in found.answers
        if not a.is_right
    ]
    lines = [f"accuracy {100 * found.accuracy:.1f} % of {len(found.answers)}"]
    lines += [f"  {w['image']} {w['prompt']} expected {w['answer']!r}, given {w['given']!r}" for w in wrong[:5]]
    return {"accuracy": found.accuracy, "questions": len(found.answers), "wrong": wrong}, "\n".join(lines)
