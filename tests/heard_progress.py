"""Progress that tests listen to, and progress that stops a run at a place."""

from __future__ import annotations

from dataclasses import dataclass, field

from toolchain.values import Silent


@dataclass
class Heard(Silent):
    """Everything that was said."""

    steps: list[tuple[int, int, str]] = field(default_factory=list)
    layers: list[tuple[int, int, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)

    def stage(self, what: str) -> None:
        self.stages.append(what)

    def step(self, done: int, total: int, what: str = "") -> None:
        self.steps.append((done, total, what))

    def layer(self, done: int, total: int, name: str, seconds_left: float | None) -> None:
        self.layers.append((done, total, name))

    def note(self, text: str) -> None:
        self.notes.append(text)


@dataclass
class Stops(Heard):
    """Ctrl-C when so many layers are done, when this layer is, or at this step (done, what)."""

    layers_done: int = -1
    name: str = ""
    at: tuple[int, str] = (-1, "")

    def step(self, done: int, total: int, what: str = "") -> None:
        super().step(done, total, what)
        if (done, what) == self.at:
            raise KeyboardInterrupt

    def layer(self, done: int, total: int, name: str, seconds_left: float | None) -> None:
        super().layer(done, total, name, seconds_left)
        if done == self.layers_done or name == self.name:
            raise KeyboardInterrupt
