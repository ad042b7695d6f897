"""What the verbs on a bundle hand on: flags to a board over ssh, libraries to a bundle."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolchain.cli import main
from toolchain.device import remote
from toolchain.errors import EnvironmentMismatch


@pytest.fixture
def sent(monkeypatch):
    """What `run_remote` was called with; the board's exit code is `sent["code"]`."""
    found: dict = {"code": 0}

    def run_remote(host, verb, source, output, arguments, *, inputs, options):
        found.update(host=host, verb=verb, source=source, output=output, arguments=arguments, inputs=inputs)
        found["options"] = options
        return found["code"]

    monkeypatch.setattr(remote, "run_remote", run_remote)
    return found


def test_a_build_on_a_board_is_the_same_verb_there(sent, tmp_path):
    plugin = tmp_path / "p.so"
    command = ["build", "b", "-o", "e", "--host", "user@board", "--level", "2", "--ignore-memory", "--plugin", plugin]
    assert main([str(word) for word in [*command, "--python", "python3.10"]]) == 0
    assert (sent["host"], sent["verb"], sent["source"], sent["output"]) == ("user@board", "build", Path("b"), Path("e"))
    expected = ["--backend", "tensorrt", "--level", "2", "--ignore-memory", "--format", "text"]
    assert sent["arguments"] == expected
    assert sent["inputs"] == {"--plugin": plugin}
    assert sent["options"].python == "python3.10"


def test_dense_twins_are_built_on_a_board_only_if_asked_for(sent):
    command = ["build", "b", "-o", "e", "--host", "h", "--backend", "tensorrt_rtx", "--format", "json"]
    for flags, expected in (([], "--no-dense"), (["--no-dense"], "--no-dense"), (["--dense"], "--dense")):
        assert main([*command, *flags]) == 0
        assert sent["arguments"] == ["--backend", "tensorrt_rtx", expected, "--format", "json"]


def test_the_boards_exit_code_passes_through(sent):
    sent["code"] = 5
    assert main(["build", "b", "-o", "e", "--host", "h"]) == 5


def test_a_refusal_on_the_way_is_ours(monkeypatch, capsys):
    def unreachable(*_, **__):
        raise EnvironmentMismatch("board h: no route")

    monkeypatch.setattr(remote, "run_remote", unreachable)
    assert main(["build", "b", "-o", "e", "--host", "h"]) == 6
    assert "no route" in capsys.readouterr().err


@pytest.mark.parametrize("flag", [["--python", "python3"], ["--remote-mgvq", "m"], ["--ssh-config", "c"]])
def test_flags_for_a_board_have_no_effect_here(capsys, flag):
    assert main(["build", "b", "-o", "e", *flag]) == 2
    assert f"{flag[0]} has no effect without --host" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["x.so", "aarch64:87=x.so", "aarch64::10.3=x.so", "aarch64:87:10.3="])
def test_a_library_that_does_not_say_what_it_suits(capsys, tmp_path, text):
    assert main(["bundle", str(tmp_path), "-o", str(tmp_path / "b"), "--library", text]) == 2
    assert "expected MACHINE:SM:TENSORRT=FILE" in capsys.readouterr().err
