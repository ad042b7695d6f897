"""Verbs about the CUDA kernels' library: kernels build."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toolchain.cli.app import app
from toolchain.cli.common import Format, FormatOption, Progress, emit

kernels = typer.Typer(help="The CUDA kernels' library.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(kernels, name="kernels")

ARCHITECTURES_HELP = (
    "Compute capabilities with commas between, such as 87,90a; those of this machine's GPUs when absent."
)


@kernels.command()
def build(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the library; the package's own when absent.")
    ] = None,
    architectures: Annotated[str | None, typer.Option(help=ARCHITECTURES_HELP)] = None,
    form: FormatOption = Format.text,
) -> None:
    """Compile libmgvq_kernels.so here. Needs nvcc of CUDA 12.6 or newer, cmake and a C++ compiler; no GPU."""
    from toolchain.kernels.build import build_library
    from toolchain.kernels.library import FILE_VARIABLE

    progress = Progress()
    wanted = tuple(name.strip() for name in (architectures or "").split(",") if name.strip())
    library = build_library(output, wanted, progress.stage)
    result = {"library": str(library.path), "architectures": list(library.architectures)}
    text = f"{library.path}, for {' '.join(library.architectures)}"
    if output is not None:
        text += f"\nuse it with {FILE_VARIABLE}={library.path}"
    emit(result, text, form)
