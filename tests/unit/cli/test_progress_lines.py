"""What is said of the time left, on a clock that stands still."""

from __future__ import annotations

import pytest

from toolchain.cli.common import TerminalProgress


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("toolchain.cli.common.time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def said(clock, capsys):
    progress = TerminalProgress()
    progress.stage("quantize")

    def at(time, call, *arguments):
        clock[0] = time
        getattr(progress, call)(*arguments)
        return capsys.readouterr().err.strip()

    return at


def test_nothing_is_said_before_a_step_was_timed(said):
    assert said(3600.0, "step", 1, 5, "survey") == "quantize\n  1/5 survey"
    assert said(3640.0, "step", 2, 5, "survey") == "2/5 survey  about 120 s left of these"


def test_every_count_of_a_stage_begins_anew(said):
    said(100.0, "step", 1, 3, "survey")
    said(200.0, "step", 3, 3, "survey")
    assert said(900.0, "step", 1, 3, "gradients").endswith("1/3 gradients")
    assert said(940.0, "step", 2, 3, "gradients") == "2/3 gradients  about 40 s left of these"


def test_layers_say_what_they_are_told(said):
    assert said(40.0, "layer", 1, 9, "q_proj", None).endswith("1/9 q_proj")
    assert said(80.0, "layer", 2, 9, "k_proj", 33.4) == "2/9 k_proj  about 33 s left of these"
    assert said(120.0, "layer", 9, 9, "o_proj", 0.0) == "9/9 o_proj"


def test_a_note_is_said_at_once_and_whole(said):
    text = "pieces of another run stay in " + "a/" * 200
    assert said(3601.0, "note", text) == "quantize\n  note: " + text
