"""Where the progress of long work goes: a terminal (`cli.common.Progress`), or nowhere."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Told of stages, of steps that are alike, and of layers, which are not (`pace.layer_progress`)."""

    def stage(self, title: str) -> None: ...
    def step(self, done: int, total: int, what: str = "") -> None: ...
    def layer(self, done: int, total: int, name: str, seconds_left: float | None) -> None: ...
    def done(self, summary: str) -> None: ...


class Silent:
    """A reporter that says nothing."""

    def stage(self, title: str) -> None:
        """Nothing."""

    def step(self, done: int, total: int, what: str = "") -> None:
        """Nothing."""

    def layer(self, done: int, total: int, name: str, seconds_left: float | None) -> None:
        """Nothing."""

    def done(self, summary: str) -> None:
        """Nothing."""
