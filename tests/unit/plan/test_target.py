"""Targets: every file loads, every figure has a source, every mistake in a file is named."""

from __future__ import annotations

import dataclasses
import json

import pytest

from toolchain.errors import InputDataError, UnsupportedError
from toolchain.plan import target as targets

BOARDS = ("agx-orin-64gb", "agx-thor-128gb", "orin-nano-8gb", "orin-nx-16gb")


def test_all_four_boards_are_there():
    assert targets.list_targets() == BOARDS


@pytest.mark.parametrize("name", BOARDS)
def test_every_figure_has_a_kind_and_a_source(name):
    board = targets.load_target(name)
    assert set(board.sources) == set(targets.FIGURES)
    for figure, entry in board.sources.items():
        assert entry["kind"] in targets.KINDS, figure
        assert len(entry["source"]) > 10, figure
    assert board.software
    assert all(release.source for release in board.software)


@pytest.mark.parametrize("name", BOARDS)
def test_figures_agree_with_each_other(name):
    board = targets.load_target(name)
    assert board.memory_usable_desktop_bytes < board.memory_usable_bytes < board.memory_total_bytes
    assert board.bandwidth_read_bytes_per_s < board.bandwidth_pin_bytes_per_s
    assert board.largest_block_default_bytes <= board.largest_block_bytes < board.memory_usable_bytes
    assert 0 < board.matmul_efficiency < 1
    if board.sm == "87":  # 1024 dense FP16 multiply-adds a clock in each SM
        peak = board.sm_count * board.gpu_clock_hz * 2048
        assert board.fp16_flops_per_s == pytest.approx(peak, rel=0.002)


@pytest.mark.parametrize("name", BOARDS)
def test_json_gives_the_same_target(name):
    board = targets.load_target(name)
    assert targets.Target.from_json(json.loads(json.dumps(board.to_json()))) == board


def test_unknown_target_names_the_closest():
    with pytest.raises(UnsupportedError, match=r"did you mean orin-nano-8gb\? known targets: agx-orin-64gb"):
        targets.load_target("orin-nano")
    with pytest.raises(UnsupportedError, match="known targets"):
        targets.load_target("../targets/orin-nano-8gb")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[sm_count]\nvalue = 8", "[sm_count]\nvalue = '8'", "sm_count: expected int, found '8'"),
        ("[sm_count]\nvalue = 8", "[sm_count]\nvalue = -8", "expected a positive number"),
        ("[sm_count]", "[sm_counts]", r"missing keys \['sm_count'\], unknown keys \['sm_counts'\]"),
        ('kind = "chosen"', 'kind = "guessed"', "expected kind in"),
        ('name = "orin-nano-8gb"', 'name = "other"', "expected the file's own name"),
        ("[sm_count]", "[sm_count", "cannot be read as a target"),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path, old, new, message):
    text = (targets._target_folder() / "orin-nano-8gb.toml").read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "orin-nano-8gb.toml"
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(InputDataError, match=message):
        targets.read_target(path)


def test_json_with_an_unknown_key_is_refused():
    data = targets.load_target("orin-nano-8gb").to_json()
    with pytest.raises(InputDataError, match=r"unknown keys \['colour'\]"):
        targets.Target.from_json(data | {"colour": "green"})
    with pytest.raises(InputDataError, match=r"missing keys \['sm'\]"):
        targets.Target.from_json({key: value for key, value in data.items() if key != "sm"})


def test_the_wheel_copy_is_read_first(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.toml").write_text("")
    monkeypatch.setattr(targets, "_FOLDERS", (tmp_path / "a", tmp_path / "b"))
    assert targets.list_targets() == ("one",)
    monkeypatch.setattr(targets, "_FOLDERS", (tmp_path / "b",))
    with pytest.raises(InputDataError, match="install mgvq again"):
        targets.list_targets()


def test_target_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        targets.load_target("orin-nano-8gb").sm = "86"
