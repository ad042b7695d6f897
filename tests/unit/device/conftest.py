"""Boards: a simulated one to build a bundle on; this machine behind ssh, a real server on loopback or a small program.

Without sshd or rsync the tests that need them skip.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from board_bundles import TARGET, board_pieces, correct_plugin
from heard_progress import Heard
from remote_boards import FAKE_SSH, MGVQ, Board, executable
from simulated_builder import SimulatedBoard
from ssh_server import loopback_server

from toolchain.bundle.manifest import open_bundle, write_bundle
from toolchain.device.remote.options import RemoteOptions


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


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def options(tmp_path, said) -> RemoteOptions:
    mgvq = executable(tmp_path / "mgvq", MGVQ)
    return RemoteOptions(sys.executable, str(mgvq), str(tmp_path / "store"), None, Heard(stages=said))


@pytest.fixture
def fake_ssh(tmp_path, monkeypatch, options) -> Board:
    """A program called ssh that runs the command here; its calls are in ssh.log."""
    folder = tmp_path / "bin"
    folder.mkdir()
    executable(folder / "ssh", FAKE_SSH)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SSH_LOG", str(tmp_path / "ssh.log"))
    return Board("user@board", options, tmp_path / "store")


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Path]:
    """ssh's configuration file for a server on loopback, which ends with the tests of a file."""
    with loopback_server(tmp_path_factory.mktemp("sshd")) as config:
        yield config


@pytest.fixture
def over_ssh(server, options) -> Board:
    return Board("board", replace(options, ssh_config=server), Path(options.folder))


@pytest.fixture(params=["fake_ssh", "over_ssh"])
def board(request) -> Board:
    return request.getfixturevalue(request.param)


@pytest.fixture
def bundle(tmp_path) -> Path:
    """A bundle of three small files, two of equal content, one with an awkward name."""
    source = tmp_path / "pieces"
    source.mkdir()
    (source / "a.txt").write_text("same")
    (source / "it's a $(name).txt").write_text("same")
    (source / "big.txt").write_text("0123456789" * 50_000)
    return write_bundle({"device": source}, tmp_path / "bundle").folder
