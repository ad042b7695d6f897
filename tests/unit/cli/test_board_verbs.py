"""What the verbs on a bundle hand on: flags to a board over ssh, libraries to a bundle."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from toolchain.cli import main
from toolchain.cli.board import MOST_WARNINGS, _build_text
from toolchain.device.engines.build import BuildReport, BuiltEngine
from toolchain.device.remote import verbs as remote
from toolchain.errors import EnvironmentMismatch

ENGINE = BuiltEngine("vision", "vision.engine", 1 << 20, 1.0, 5, plugin_layers=3)
REPORT = BuildReport("tensorrt", "10.3", "87", "b", (ENGINE,), ())


@pytest.fixture
def sent(monkeypatch, tmp_path):
    """What `run_remote` was called with; the board's exit code is `sent["code"]`, its engines come to ./e."""
    found: dict = {"code": 0}
    monkeypatch.chdir(tmp_path)

    def run_remote(host, verb, source, output, arguments, *, inputs, options):
        found.update(host=host, verb=verb, source=source, output=output, arguments=arguments, inputs=inputs)
        found["options"] = options
        if found["code"] == 0:
            output.mkdir(exist_ok=True)
            (output / "build.json").write_text(json.dumps(REPORT.to_json()))
        return found["code"]

    monkeypatch.setattr(remote, "run_remote", run_remote)
    return found


def test_a_build_on_a_board_is_the_same_verb_there(sent, tmp_path):
    plugin = tmp_path / "p.so"
    command = ["build", "b", "-o", "e", "--host", "user@board", "--level", "2", "--ignore-memory", "--plugin", plugin]
    command += ["--no-check"]
    assert main([str(word) for word in [*command, "--python", "python3.10"]]) == 0
    assert (sent["host"], sent["verb"], sent["source"], sent["output"]) == ("user@board", "build", Path("b"), Path("e"))
    assert sent["arguments"] == ["--backend", "tensorrt", "--level", "2", "--ignore-memory", "--no-check"]
    assert sent["inputs"] == {"--plugin": plugin}
    assert sent["options"].python == "python3.10"


def test_dense_twins_are_built_on_a_board_only_if_asked_for(sent):
    command = ["build", "b", "-o", "e", "--host", "h", "--backend", "tensorrt_rtx", "--format", "json"]
    for flags, expected in (([], "--no-dense"), (["--no-dense"], "--no-dense"), (["--dense"], "--dense")):
        assert main([*command, *flags]) == 0
        assert sent["arguments"] == ["--backend", "tensorrt_rtx", expected]


def test_what_came_back_is_told_with_the_paths_of_this_machine(sent, capsys):
    assert main(["build", "b", "-o", "e", "--host", "user@board"]) == 0
    text = capsys.readouterr().out
    assert "engines  e\n" in text
    assert "next     mgvq profile b --host user@board --backend tensorrt --engines e -o PROFILE\n" in text
    assert "vision  1.0 MiB" in text
    assert main(["build", "b", "-o", "e", "--host", "user@board", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(Path("e/build.json").read_text())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--sm", "87"], "an SM can be chosen with backend tensorrt_rtx only"),
        (["--no-dense"], "--no-dense has no effect with --backend tensorrt"),
        (["--backend", "tensorrt_rtx", "--plugin", "p.so"], "has no plugins"),
        (["--backend", "tensorrt_rtx", "--no-check"], "compares no engines"),
    ],
)
def test_flags_without_effect_are_refused_before_a_board_is_asked(sent, capsys, flags, words):
    assert main(["build", "b", "-o", "e", "--host", "h", *flags]) == 2
    assert words in capsys.readouterr().err
    assert "host" not in sent


def test_warnings_are_shown_as_far_as_a_person_reads_them():
    for count, more in ((MOST_WARNINGS, None), (70, "65 more warnings of the builder are in build.json")):
        report = dataclasses.replace(REPORT, warnings=tuple(f"w{i}" for i in range(count)))
        lines = _build_text(report.to_json()).splitlines()
        assert [line for line in lines if line.startswith("warning: ")] == [f"warning: w{i}" for i in range(5)]
        assert (lines[-1] == more) == (more is not None)


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
