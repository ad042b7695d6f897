"""Verbs about the CUDA kernels' library: kernels build."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toolchain.cli.common import Format, FormatOption, TerminalProgress, emit

kernels = typer.Typer(help="The CUDA kernels' library.", no_args_is_help=True, rich_markup_mode=None)

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
    from toolchain.native.build import build_library
    from toolchain.native.library import FILE_VARIABLE

    progress = TerminalProgress()
    wanted = tuple(name.strip() for name in (architectures or "").split(",") if name.strip())
    library = build_library(output, wanted, progress)
    result = {"library": str(library.path), "architectures": list(library.architectures)}
    text = f"{library.path}, for {' '.join(library.architectures)}"
    if output is not None:
        text += f"\nuse it with {FILE_VARIABLE}={library.path}"
    emit(result, text, form)
