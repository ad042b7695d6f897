"""--bits and --budget: what they plan for, alone and together."""

from __future__ import annotations

import json

import pytest

from toolchain.cli import main
from toolchain.cli.common import bits_or_budget


@pytest.fixture
def planned(tiny_qwen2_vl, capsys):
    """`planned(*flags)`: what `mgvq plan` says of the tiny model, counted bits and bytes by part."""

    def run(*flags: object) -> dict:
        code = main(["plan", "-m", str(tiny_qwen2_vl), "--format", "json", *map(str, flags)])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return json.loads(captured.out)["bits"]

    return run


def test_what_the_flags_ask_for():
    assert bits_or_budget(None, None) == (2.0, None)
    assert bits_or_budget(3.0, None) == (3.0, None)
    assert bits_or_budget(None, "1MiB") == (None, 2**20)
    assert bits_or_budget(3.0, "1MiB") == (3.0, 2**20)


@pytest.mark.parametrize("method", ["mgvq", "rtn"])
def test_a_budget_is_spent_and_kept(planned, method):
    lowest, highest = (planned("--bits", bits, "--method", method)["total"]["bytes"] for bits in (2, 4))
    budget = (lowest + highest) // 2
    found = planned("--budget", f"{budget}B", "--method", method)["total"]
    assert lowest < found["bytes"] <= budget
    assert 2 < found["index"] < 4
    assert planned("--budget", f"{highest}B", "--method", method)["total"]["bytes"] == highest


def test_bits_win_over_a_budget_that_has_room(planned):
    assert planned("--bits", 2.5, "--budget", "1GiB") == planned("--bits", 2.5)
    assert planned() == planned("--bits", 2)


def test_methods_differ_in_their_codes(planned):
    assert planned("--bits", 1.5)["total"]["index"] == 1.5
    assert planned("--bits", 1.5, "--method", "mgvq-drift")["total"]["index"] == 1.5
    assert planned("--bits", 3, "--method", "mgvq-overlap")["total"] == planned("--bits", 3, "--method", "rtn")["total"]
