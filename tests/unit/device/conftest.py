"""A bundle for a board and a simulated board to build it on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from board_bundles import TARGET, board_pieces, correct_plugin
from simulated_builder import SimulatedBoard

from toolchain.bundle import open_bundle, write_bundle


@pytest.fixture
def pieces(tmp_path) -> dict[str, Path]:
    """A bundle's pieces for a board: graphs as simulated_builder reads them, plan, self-test, plugin sources."""
    return board_pieces(tmp_path / "source")


@pytest.fixture
def board_bundle(pieces, tmp_path):
    write_bundle(pieces, tmp_path / "bundle", target=TARGET)
    return open_bundle(tmp_path / "bundle")


@pytest.fixture
def given(tmp_path, pieces) -> Path:
    return tmp_path / "source" / "given" / "libmgvq_plugin.so"


@pytest.fixture
def simulated(monkeypatch):
    """`simulated(...)`: install a simulated board as `tensorrt` and its CUDA, and give it back."""

    def install(**changes) -> SimulatedBoard:
        found = SimulatedBoard(**{"plugin_answer": correct_plugin, **changes})
        monkeypatch.setitem(sys.modules, "tensorrt", found.module())
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", found.cuda)
        return found

    return install
