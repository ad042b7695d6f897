"""Verbs that ask which method is better: compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from toolchain.cli.app import app
from toolchain.cli.common import CalibOption, Format, FormatOption, ModelOption, Progress, SeedOption, emit, size, table

COLUMNS = ["method", "index bits", "real bits", "size", "KL, nats a token", "95 %", "accuracy", "seconds"]


@app.command()
def compare(
    model: ModelOption,
    calib: CalibOption,
    data: Annotated[Path, typer.Option(help="Evaluation manifest; every line has an answer.")],
    methods: Annotated[str, typer.Option(help="Names with commas between.")] = "rtn,gptq,gptvq,vptq,mgvq",
    bits: Annotated[str, typer.Option(help="Index bits averaged over the quantized weights, or 2.0,2.5,3.0.")] = "2.0",
    samples: Annotated[int | None, typer.Option(min=1, help="Evaluate on the first N lines; all when absent.")] = None,
    seed: SeedOption = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for compare.json and compare.svg; must be new.")
    ] = None,
    form: FormatOption = Format.text,
) -> None:
    """Quantize a checkpoint by several methods; KL to full precision, accuracy and real bits in one table."""
    from toolchain.calibration import read_manifest
    from toolchain.compare import compare_methods
    from toolchain.folders import check_output, staged_folder

    averages, names = parse_bits(bits), [name.strip() for name in methods.split(",")]
    if output is not None:
        check_output(output)
    calibration, evaluation = read_manifest(calib), read_manifest(data)[:samples]
    rows = compare_methods(model, calibration, evaluation, averages, names, seed, Progress())
    result = {"rows": rows, "calibration_samples": len(calibration), "questions": len(evaluation), "seed": seed}
    if output is not None:
        from toolchain.compare_plot import plot_rows
        from toolchain.values import write_json

        with staged_folder(output) as folder:
            write_json(folder / "compare.json", result)
            (folder / "compare.svg").write_text(plot_rows(rows), encoding="utf-8")
    emit(result, table([text_row(row) for row in rows], COLUMNS), form)


def parse_bits(text: str) -> list[float]:
    """The averages in "2.0" or "2.0,2.5,3.0".

    Raises:
        UsageError: not numbers with commas between.
    """
    from toolchain.errors import UsageError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--bits {text!r}: expected numbers with commas between, such as 2.0,2.5,3.0") from None


def text_row(row: dict[str, Any]) -> dict[str, str]:
    """One row of `compare.compare_methods` for people."""
    index = "-" if row["index_bits"] is None else f"{row['index_bits']:.3f}"
    cells = [row["method"], index, f"{row['bits']:.3f}", size(row["bytes"]), f"{row['kl']:.4f}"]
    cells += [f"{row['kl_low']:.4f} – {row['kl_high']:.4f}", f"{100 * row['accuracy']:.1f} %", f"{row['seconds']:.1f}"]
    return dict(zip(COLUMNS, cells))
