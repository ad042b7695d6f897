"""Verbs that ask how good a quantized model is, and which method is better: eval, compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolchain.cli.common import (
    AnswerTokensOption,
    CalibOption,
    Format,
    FormatOption,
    ModelOption,
    TerminalProgress,
    emit,
    size,
    table,
)
from toolchain.errors import UsageError
from toolchain.values import ANSWER_TOKENS

if TYPE_CHECKING:
    from toolchain.evaluate.answers import Evaluation

COLUMNS = ["method", "index bits", "real bits", "size", "KL, nats a token", "95 %", "accuracy", "seconds"]
LAYER_COLUMNS = ["part", "layer", "code", "text", "image", "both"]


def compare(
    model: ModelOption,
    calib: CalibOption,
    data: Annotated[Path, typer.Option(help="Evaluation data (.jsonl) with an answer on every line.")],
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = "rtn,gptq,gptvq,vptq,mgvq",
    bits: Annotated[
        str, typer.Option(help="Average index bits of the quantized weights; several separated by commas.")
    ] = "2.0",
    samples: Annotated[int | None, typer.Option(min=1, help="Evaluate on the first N lines. Default: all.")] = None,
    seeds: Annotated[
        str, typer.Option("--seeds", "--seed", help="Random seed; several separated by commas are averaged.")
    ] = "0",
    against: Annotated[
        str | None, typer.Option(help="Method whose KL the others are divided by. Default: the first mgvq.")
    ] = None,
    answer_tokens: AnswerTokensOption = ANSWER_TOKENS,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New folder for compare.json and compare.svg.")
    ] = None,
    form: FormatOption = Format.text,
) -> None:
    """Compare quantization methods at equal bits: KL to full precision, accuracy and real bits in one table."""
    from toolchain.calibration.manifest import read_manifest
    from toolchain.evaluate.compare import CompareSettings, check_methods, compare_methods
    from toolchain.files.folders import check_output, staged_folder

    averages, drawn = parse_numbers("--bits", bits, float), parse_numbers("--seeds", seeds, int)
    names = [name.strip() for name in methods.split(",")]
    check_methods(names, against)
    if output is not None:
        check_output(output)
    calibration, evaluation = read_manifest(calib), read_manifest(data)[:samples]
    settings = CompareSettings(tuple(averages), tuple(names), tuple(drawn), against, answer_tokens)
    rows = compare_methods(model, calibration, evaluation, settings, TerminalProgress())
    result = {"rows": rows, "calibration_samples": len(calibration), "questions": len(evaluation), "seeds": drawn}
    if output is not None:
        from toolchain.evaluate.compare_plot import plot_rows
        from toolchain.files.folders import write_json

        with staged_folder(output) as folder:
            write_json(folder / "compare.json", result)
            (folder / "compare.svg").write_text(plot_rows(rows), encoding="utf-8")
    emit(result, comparison_text(rows), form)


def parse_numbers(flag: str, text: str, kind: type) -> list[Any]:
    """The numbers in "2.0" or "2.0,2.5,3.0".

    Raises:
        UsageError: not numbers of that kind with commas between.
    """
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        words, example = ("whole numbers", "0,1,2") if kind is int else ("numbers", "2.0,2.5,3.0")
        raise UsageError(f"{flag} {text!r}: expected {words} with commas between, such as {example}") from None


def comparison_text(rows: list[dict[str, Any]]) -> str:
    """Rows of `compare.compare_methods` for people, and the worst layers of what the others are held against."""
    against = next((row["against"] for row in rows if row["against"]), None)
    several = any(len(row["seeds"]) > 1 for row in rows)
    columns = [*COLUMNS[:6], *([f"KL / {against}", "95 % paired"] if against else [])]
    columns += [*(["KL over seeds"] if several else []), *COLUMNS[6:]]
    parts = [table([text_row(row) for row in rows], columns)]
    shown = against or next((row["method"] for row in rows if row["layers"]), None)
    for row in rows:
        if row["method"] == shown:
            title = f"worst layers of {shown} at {row['requested_bits']:g} bits: share of the output lost, held out"
            parts.append(f"\n{title}\n{layer_text(row['layers'])}")
    return "\n".join(parts)


def text_row(row: dict[str, Any]) -> dict[str, str]:
    """One row of `compare.compare_methods` for people."""
    index = "-" if row["index_bits"] is None else f"{row['index_bits']:.3f}"
    cells = [row["method"], index, f"{row['bits']:.3f}", size(row["bytes"]), f"{row['kl']:.4f}"]
    cells += [f"{row['kl_low']:.4f} – {row['kl_high']:.4f}", f"{100 * row['accuracy']:.1f} %", f"{row['seconds']:.1f}"]
    found = dict(zip(COLUMNS, cells, strict=True))
    if row["against"]:
        has_ratio = row["kl_ratio"] is not None
        found[f"KL / {row['against']}"] = f"{row['kl_ratio']:.2f}" if has_ratio else "-"
        found["95 % paired"] = f"{row['kl_ratio_low']:.2f} – {row['kl_ratio_high']:.2f}" if has_ratio else "-"
    if len(row["seeds"]) > 1:
        each = [one["kl"] for one in row["per_seed"]]
        found["KL over seeds"] = f"{min(each):.4f} – {max(each):.4f}"
    return found


def layer_text(layers: list[dict[str, Any]]) -> str:
    """The worst two layers of every part, with their errors at text and at image positions."""
    from toolchain.evaluate.layer_errors import worst_layers

    rows = []
    for layer in worst_layers(layers):
        errors = [layer["error_text"], layer["error_image"], layer["error_both"]]
        cells = [layer["part"], layer["name"], layer["code"], *("-" if x is None else f"{x:.4f}" for x in errors)]
        rows.append(dict(zip(LAYER_COLUMNS, cells, strict=True)))
    return table(rows, LAYER_COLUMNS)


def evaluate(
    model: ModelOption,
    data: Annotated[Path, typer.Option(help="Evaluation data (.jsonl) with an answer on every line.")],
    calib: Annotated[
        Path | None, typer.Option(help="Calibration data; refused if it shares an image with --data.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Checkpoint to measure KL divergence from, usually the float one.")
    ] = None,
    layers: Annotated[
        bool,
        typer.Option(
            "--layers", help="Also measure the output error of every quantized layer, by modality; needs --reference."
        ),
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of the answer.")] = 64,
    form: FormatOption = Format.text,
) -> None:
    """Measure exact-answer accuracy of a checkpoint, quantized or not, and with --reference its KL divergence."""
    from toolchain.calibration.manifest import read_manifest
    from toolchain.checkpoint.folder import open_checkpoint
    from toolchain.checkpoint.loading import load_any
    from toolchain.checkpoint.modules import keep_decoded
    from toolchain.checkpoint.permuted import read_permutations
    from toolchain.evaluate.answers import answer_all, checkpoint_log_probabilities, divergence_from, refuse_overlap
    from toolchain.evaluate.layer_errors import checkpoint_layer_errors
    from toolchain.models.configs import read_config
    from toolchain.models.registry import family_for
    from toolchain.models.runner import torch_graphs

    if layers and reference is None:
        raise UsageError("--layers measures from a reference; add --reference with the full-precision checkpoint")
    config = read_config(model)
    family = family_for(config)
    samples = read_manifest(data)
    if calib is not None:
        refuse_overlap(read_manifest(calib), samples)
    processor, progress = family.load_processor(model, config), TerminalProgress()
    expected = None
    if reference is not None:
        progress.stage(f"reference  {reference} on {len(samples)} questions")
        expected = checkpoint_log_probabilities(reference, processor, samples, progress)
    loaded = load_any(open_checkpoint(model, config))
    progress.stage(f"evaluate   {model} on {len(samples)} questions")
    with keep_decoded(loaded):
        found = answer_all(processor.host, torch_graphs(family, loaded), samples, max_new_tokens, progress)
        interval = divergence_from(expected, loaded, processor, samples, 0, progress) if expected else None
        lost = None
        if layers and reference:
            lost = checkpoint_layer_errors(reference, loaded, samples, progress, read_permutations(model))
    result, text = _evaluation(found)
    if interval:
        result |= interval.to_json()
        text += f"\nKL {interval} nats an answer token, from {reference}"
    if lost:
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
