"""The verbs, gathered. Each module of this package registers its own on `app`."""

from __future__ import annotations

from typing import Annotated

import typer

from toolchain import __version__

app = typer.Typer(
    name="mgvq",
    help="Quantize a vision-language model to about 2 bits a weight and take it to a Jetson, checked at every step.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"mgvq {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Quantize a vision-language model to about 2 bits a weight and take it to a Jetson, checked at every step."""


from toolchain.cli import bench, board, kernels, line, look, profile, research, stages  # noqa: E402 - they register on `app`

__all__ = ["app", "bench", "board", "kernels", "line", "look", "profile", "research", "stages"]
