"""Verbs that ask which method is better: compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from toolchain.cli.app import app
from toolchain.cli.common import (
    AnswerTokensOption,
    CalibOption,
    Format,
    FormatOption,
    ModelOption,
    Progress,
    emit,
    size,
    table,
)
from toolchain.values import ANSWER_TOKENS

COLUMNS = ["method", "index bits", "real bits", "size", "KL, nats a token", "95 %", "accuracy", "seconds"]
LAYER_COLUMNS = ["part", "layer", "code", "text", "image", "both"]


@app.command()
def compare(
    model: ModelOption,
    calib: CalibOption,
    data: Annotated[Path, typer.Option(help="Evaluation manifest; every line has an answer.")],
    methods: Annotated[str, typer.Option(help="Names with commas between.")] = "rtn,gptq,gptvq,vptq,mgvq",
    bits: Annotated[str, typer.Option(help="Index bits averaged over the quantized weights, or 2.0,2.5,3.0.")] = "2.0",
    samples: Annotated[int | None, typer.Option(min=1, help="Evaluate on the first N lines; all when absent.")] = None,
    seeds: Annotated[
        str, typer.Option("--seeds", "--seed", help="Seed of everything random, or 0,1,2 to average over several.")
    ] = "0",
    against: Annotated[
        str | None, typer.Option(help="Method to divide every KL by; the first of ours when absent.")
    ] = None,
    answer_tokens: AnswerTokensOption = ANSWER_TOKENS,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for compare.json and compare.svg; must be new.")
    ] = None,
    form: FormatOption = Format.text,
) -> None:
    """Quantize a checkpoint by several methods; KL to full precision, accuracy and real bits in one table."""
    from toolchain.calibration import read_manifest
    from toolchain.compare import check_methods, compare_methods
    from toolchain.folders import check_output, staged_folder

    averages, drawn = parse_numbers("--bits", bits, float), parse_numbers("--seeds", seeds, int)
    names = [name.strip() for name in methods.split(",")]
    check_methods(names, against)
    if output is not None:
        check_output(output)
    calibration, evaluation = read_manifest(calib), read_manifest(data)[:samples]
    rows = compare_methods(model, calibration, evaluation, averages, names, drawn, against, Progress(), answer_tokens)
    result = {"rows": rows, "calibration_samples": len(calibration), "questions": len(evaluation), "seeds": drawn}
    if output is not None:
        from toolchain.compare_plot import plot_rows
        from toolchain.values import write_json

        with staged_folder(output) as folder:
            write_json(folder / "compare.json", result)
            (folder / "compare.svg").write_text(plot_rows(rows), encoding="utf-8")
    emit(result, comparison_text(rows), form)


def parse_numbers(flag: str, text: str, kind: type) -> list[Any]:
    """The numbers in "2.0" or "2.0,2.5,3.0".

    Raises:
        UsageError: not numbers of that kind with commas between.
    """
    from toolchain.errors import UsageError

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
    """The worst two layers of every part, with their errors at text and at picture positions."""
    from toolchain.layer_errors import worst_layers

    rows = []
    for layer in worst_layers(layers):
        errors = [layer["error_text"], layer["error_image"], layer["error_both"]]
        cells = [layer["part"], layer["name"], layer["code"], *("-" if x is None else f"{x:.4f}" for x in errors)]
        rows.append(dict(zip(LAYER_COLUMNS, cells, strict=True)))
    return table(rows, LAYER_COLUMNS)
