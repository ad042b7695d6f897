"""Where the progress of long work goes: a terminal (`cli.common.Progress`), or nowhere."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Told of stages, of steps that are alike, of layers, which are not (`pace.layer_progress`), and of what a user
    should know and not wait for."""

    def stage(self, title: str) -> None: ...
    def step(self, done: int, total: int, what: str = "") -> None: ...
    def layer(self, done: int, total: int, name: str, seconds_left: float | None) -> None: ...
    def note(self, text: str) -> None: ...
    def done(self, summary: str) -> None: ...


class Silent:
    """A reporter that says nothing."""

    def stage(self, title: str) -> None:
        """Nothing."""

    def step(self, done: int, total: int, what: str = "") -> None:
        """Nothing."""

    def layer(self, done: int, total: int, name: str, seconds_left: float | None) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def done(self, summary: str) -> None:
        """Nothing."""
