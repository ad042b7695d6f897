"""The verbs, gathered: the other modules of this package write them as functions, this one registers them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from toolchain import __version__
from toolchain.cli import bench, board, evaluate, inspect, kernels, line, profile, stages

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


# In the order of the help: first what a newcomer asks for, then the arrows of the line, then what looks back.
VERBS: tuple[tuple[str, Callable[..., None]], ...] = (
    ("demo", line.demo),
    ("all", line.all_stages),
    ("plan", inspect.plan),
    ("doctor", inspect.doctor),
    ("targets", inspect.targets),
    ("models", inspect.models),
    ("quantize", stages.quantize),
    ("export", stages.export),
    ("rewrite", stages.rewrite),
    ("validate", stages.validate),
    ("bundle", line.bundle),
    ("build", board.build),
    ("run", board.run),
    ("chat", board.chat),
    ("profile", profile.profile),
    ("eval", evaluate.evaluate),
    ("compare", evaluate.compare),
    ("report", line.report),
    ("inspect", inspect.inspect),
)

for _name, _verb in VERBS:
    app.command(name=_name)(_verb)
app.add_typer(bench.bench, name="bench")
app.add_typer(kernels.kernels, name="kernels")
