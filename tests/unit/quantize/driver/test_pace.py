"""Time left is by work, of what was timed, and not said before."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from toolchain.quantize.driver.pace import LayerPace, group_work


def spec(name: str, columns: int, rows: int = 8, group: str = "", tied_to: str = ""):
    return SimpleNamespace(name=name, group=group or name, rows=rows, columns=columns, tied_to=tied_to)


SMALL, LARGE = (group_work([spec("", columns)]) for columns in (8, 32))


class Run:
    """A pace on a clock of its own."""

    def __init__(self, *specs):
        self.now = 0.0
        self.pace = LayerPace(specs, lambda: self.now)

    def ends(self, name: str, took: float, seconds: float | None = None) -> float | None:
        self.now += took
        return self.pace.after(name, 0.9 * took if seconds is None else seconds)


def test_layers_count_by_their_work():
    run = Run(spec("a", 8), spec("b", 8), spec("c", 32), spec("d", 8))
    assert run.ends("a", 900.0, 1.0) is None, "what came before the first layer is not its own"
    assert run.ends("b", 2.0) == pytest.approx(2.0 * (LARGE + SMALL) / SMALL)
    assert run.ends("c", 50.0) == pytest.approx(52.0 * SMALL / (LARGE + SMALL))
    assert run.ends("d", 2.0) == 0


def test_layers_of_one_group_count_once():
    run = Run(spec("q", 8, group="qkv"), spec("k", 8, group="qkv"), spec("o", 8), spec("p", 8))
    assert run.ends("q", 5.0) is None
    assert run.ends("k", 0.0, 5.0) is None
    assert run.ends("o", 3.0) == pytest.approx(3.0)


def test_what_was_finished_before_says_nothing():
    run = Run(*(spec(name, 8) for name in "abcde"))
    for name in "ab":
        assert run.ends(name, 0.001, 4.0) is None
    assert run.ends("c", 30.0, 4.0) is None, "the first that is made now"
    assert run.ends("d", 4.0, 3.5) == pytest.approx(4.0)


def test_what_is_tied_is_no_work():
    run = Run(spec("embedding", 8), spec("a", 8), spec("b", 8), spec("head", 32, tied_to="embedding"))
    run.ends("embedding", 1.0)
    assert run.ends("a", 3.0) == pytest.approx(3.0)
