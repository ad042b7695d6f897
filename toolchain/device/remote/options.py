"""How to work on a board over ssh."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from toolchain.values import SILENT, Progress


@dataclass(frozen=True)
class RemoteOptions:
    """How to work on the board.

    Args:
        python: the interpreter there that makes the virtual environment.
        mgvq: the command of an mgvq installed there already; the bundle's wheel is not looked at then.
        folder: where everything goes, from the home folder on.
        ssh_config: a file for `ssh -F`.
        progress: told of every step, as a stage.
    """

    python: str = "python3"
    mgvq: str | None = None
    folder: str = ".cache/mgvq"
    ssh_config: Path | None = None
    progress: Progress = SILENT
