"""What the verbs that can run on a board over ssh share: their flags, and the run there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from toolchain.cli.common import TerminalProgress
from toolchain.errors import UsageError

HostOption = Annotated[
    str | None,
    typer.Option("--host", help="Run it on this board over ssh, such as user@board, and bring the result back."),
]
PythonOption = Annotated[
    str | None,
    typer.Option(
        "--python",
        help="Python on the board, with --host (python3 when absent); an environment's lends what is installed in it.",
    ),
]
RemoteMgvqOption = Annotated[
    str | None,
    typer.Option(
        "--remote-mgvq",
        help="An mgvq that is installed on the board already, with --host; without it the bundle's own wheel is used.",
    ),
]
SshConfigOption = Annotated[
    Path | None, typer.Option("--ssh-config", help="Configuration file for ssh (ssh -F), with --host.")
]


@dataclass(frozen=True)
class RemoteFlags:
    """The flags that have an effect with --host only; None where one was not given."""

    python: str | None
    remote_mgvq: str | None
    ssh_config: Path | None

    def refuse_idle(self) -> None:
        """For a run without --host.

        Raises:
            UsageError: one of them was given.
        """
        for name, value in vars(self).items():
            if value is not None:
                raise UsageError(f"--{name.replace('_', '-')} has no effect without --host; leave it out")


def run_there(
    host: str,
    verb: str,
    source: Path,
    output: Path,
    flags: Mapping[str, Any],
    inputs: Mapping[str, Path | None],
    remote: RemoteFlags,
) -> None:
    """Run a verb on a board. Flags that are None or False, and inputs that are None, are left out.

    Raises:
        typer.Exit: with the verb's exit code there, if it is not 0.
    """
    from toolchain.device.remote.options import RemoteOptions
    from toolchain.device.remote.verbs import run_remote

    options = RemoteOptions(
        python=remote.python or "python3",
        mgvq=remote.remote_mgvq,
        ssh_config=remote.ssh_config,
        progress=TerminalProgress(),
    )
    given = {name: value for name, value in flags.items() if value is not None and value is not False}
    arguments = [text for name, value in given.items() for text in ([name] if value is True else [name, str(value)])]
    sent = {flag: path for flag, path in inputs.items() if path is not None}
    if code := run_remote(host, verb, source, output, arguments, inputs=sent, options=options):
        raise typer.Exit(code)
