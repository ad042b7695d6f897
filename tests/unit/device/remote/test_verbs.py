"""A verb run on a board over ssh: what is sent, how it ends, what comes back (boards: conftest.py)."""

from __future__ import annotations

import hashlib
import json
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from remote_boards import MGVQ, executable, make_environment, needs_rsync, place_package, run, until, wheel

from toolchain import __version__
from toolchain.bundle.manifest import write_bundle
from toolchain.cli import main
from toolchain.device.remote.store import read_tree
from toolchain.errors import EnvironmentMismatch, InputDataError


@needs_rsync
def test_a_verb_runs_there_and_its_output_comes_back(board, bundle, tmp_path, capfd, said):
    image = tmp_path / "image one.png"
    image.write_text("pixels")
    code = run(board, "copy", bundle, tmp_path / "out", "--prompt", "what's $HOME?", inputs={"--image": image})
    assert code == 0
    seen = json.loads((tmp_path / "out" / "seen.json").read_text())
    assert seen["rest"][:2] == ["--prompt", "what's $HOME?"]
    assert list(seen["given"].values()) == ["pixels"]
    assert seen["files"] == {p.relative_to(bundle).as_posix(): p.read_text() for p in bundle.rglob("*") if p.is_file()}
    shown = capfd.readouterr()
    assert ("a figure" in shown.out, "a step" in shown.err) == (False, True)
    assert list((board.store / "runs").iterdir()) == []
    assert [line.split()[0] for line in said] == ["connect", "send", "run", "fetch"]


@needs_rsync
def test_only_what_the_board_lacks_is_sent(board, bundle, tmp_path, said):
    run(board, "copy", bundle, tmp_path / "one")
    assert "4 files" not in said[1]
    assert "3 of 3 files" in said[1]  # the manifest, and two contents in three files
    before = {p.name: p.stat().st_mtime_ns for p in (board.store / "objects").iterdir()}
    said.clear()
    run(board, "copy", bundle, tmp_path / "two")
    assert "has all 3 files" in said[1]
    (tmp_path / "pieces" / "a.txt").write_text("other")
    write_bundle({"device": tmp_path / "pieces"}, bundle)
    said.clear()
    run(board, "copy", bundle, tmp_path / "three")
    assert "2 of 4 files" in said[1]  # the new content and the new manifest
    objects = {p.name: p.stat().st_mtime_ns for p in (board.store / "objects").iterdir()}
    assert before.items() <= objects.items()
    for name in objects:
        assert hashlib.sha256((board.store / "objects" / name).read_bytes()).hexdigest() == name


@needs_rsync
@pytest.mark.parametrize("wrong", [False, True])
def test_a_transfer_that_broke_off_goes_on(board, bundle, tmp_path, wrong):
    content = (bundle / "device" / "big.txt").read_bytes()
    incoming = board.store / "incoming" / hashlib.sha256(content).hexdigest()
    incoming.parent.mkdir(parents=True)
    incoming.write_bytes(b"x" * 300_000 if wrong else content[:300_000])
    inode = incoming.stat().st_ino
    assert run(board, "copy", bundle, tmp_path / "out") == 0
    found = board.store / "objects" / incoming.name
    assert found.read_bytes() == content
    assert wrong or found.stat().st_ino == inode  # the part was added to, not sent again


@needs_rsync
def test_content_that_changed_on_the_way_is_refused_and_removed(board, bundle, tmp_path):
    content = (bundle / "device" / "big.txt").read_bytes()
    incoming = board.store / "incoming" / hashlib.sha256(content).hexdigest()
    incoming.parent.mkdir(parents=True)
    incoming.write_bytes(b"x" * len(content))
    with pytest.raises(EnvironmentMismatch, match="1 files arrived changed"):
        run(board, "copy", bundle, tmp_path / "out")
    assert not incoming.exists()
    assert not (tmp_path / "out").exists()
    assert run(board, "copy", bundle, tmp_path / "out") == 0


@needs_rsync
def test_exit_codes_pass_and_nothing_is_brought_back(board, bundle, tmp_path, said):
    assert run(board, "fail", bundle, tmp_path / "out") == 5
    assert list((board.store / "runs").iterdir()) == []
    assert run(board, "stop", bundle, tmp_path / "out") == 75
    assert said[-1].startswith("left")
    left = said[-1].rpartition(":")[2]
    assert (Path(left) / "seen.json").is_file()
    assert not (tmp_path / "out").exists()


@needs_rsync
def test_a_verb_that_ends_well_and_writes_nothing_is_an_error(board, bundle, tmp_path):
    with pytest.raises(EnvironmentMismatch, match="left no"):
        run(board, "nothing", bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@needs_rsync
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopping_us_stops_the_verb_there(board, bundle, tmp_path, number):
    """Interrupted, the verb saves its state and we end with 130; killed, it is stopped all the same."""
    state, options = tmp_path / "state", board.options
    code = (
        "import signal, sys; from pathlib import Path; from toolchain.device.remote.verbs import *\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where tests run in the background
        f"o = RemoteOptions({options.python!r}, {options.mgvq!r}, {options.folder!r}, "
        f"{f'Path({str(options.ssh_config)!r})' if options.ssh_config else None})\n"
        "try: run_remote(*sys.argv[1:3], Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5:], options=o)\n"
        "except KeyboardInterrupt: sys.exit(130)\n"
    )
    words = [board.host, "wait", bundle, tmp_path / "out", state]
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, words)], stdin=subprocess.DEVNULL)
    until(lambda: state.with_suffix(".pid").exists() and state.with_suffix(".pid").read_text())
    verb = int(state.with_suffix(".pid").read_text())
    process.send_signal(number)
    assert process.wait(60) == (130 if number == signal.SIGINT else -signal.SIGKILL)
    until(lambda: state.exists() and state.read_text() == "saved")
    until(lambda: not Path(f"/proc/{verb}").exists())


@needs_rsync
def test_the_bundles_wheel_is_installed_once(over_ssh, tmp_path, said):
    pieces = tmp_path / "pieces"
    pieces.mkdir()
    wheel(pieces / f"mgvq-{__version__}-py3-none-any.whl")
    (pieces / "requirements-board.txt").write_text("# nothing: no network in tests\n")
    made = write_bundle({"install": pieces}, tmp_path / "bundle").folder
    board = replace(over_ssh, options=replace(over_ssh.options, mgvq=None))
    for name in ("one", "two"):
        assert run(board, "copy", made, tmp_path / name) == 0
        assert (tmp_path / name / "seen.json").is_file()
    assert [line.split()[0] for line in said].count("install") == 1


@needs_rsync
def test_what_the_named_pythons_own_environment_has_is_used_and_our_wheel_all_the_same(over_ssh, tmp_path):
    """A board without a network whose packages are in an environment of its owner's, another mgvq among them."""
    site = make_environment(tmp_path / "owners")
    place_package(site, "needed", "1.0")
    place_package(site, "mgvq", __version__)
    (tmp_path / "pieces").mkdir()
    wheel(tmp_path / "pieces" / f"mgvq-{__version__}-py3-none-any.whl")
    (tmp_path / "pieces" / "requirements-board.txt").write_text("needed>=1\n")
    made = write_bundle({"install": tmp_path / "pieces"}, tmp_path / "bundle").folder
    python = str(tmp_path / "owners" / "bin" / "python")
    board = replace(over_ssh, options=replace(over_ssh.options, mgvq=None, python=python))
    assert run(board, "copy", made, tmp_path / "out") == 0
    assert (tmp_path / "out" / "seen.json").is_file()
    (tmp_path / "pieces" / "requirements-board.txt").write_text("needed>=2\n")
    made = write_bundle({"install": tmp_path / "pieces"}, tmp_path / "newer").folder
    with pytest.raises(EnvironmentMismatch, match=r"cannot be installed there .*needed>=2.*give the board a network"):
        run(board, "copy", made, tmp_path / "none")


@needs_rsync
def test_an_install_that_fails_says_why_and_is_not_taken_for_done(fake_ssh, tmp_path):
    pieces = tmp_path / "pieces"
    pieces.mkdir()
    (pieces / f"mgvq-{__version__}-py3-none-any.whl").write_bytes(b"no wheel")
    made = write_bundle({"install": pieces}, tmp_path / "bundle").folder
    board = replace(fake_ssh, options=replace(fake_ssh.options, mgvq=None))
    with pytest.raises(EnvironmentMismatch, match=r"cannot be installed there .*make the bundle again"):
        run(board, "copy", made, tmp_path / "out")
    assert not list((board.store / "environments").glob("*/ready"))


def test_names_that_break_lines_are_refused(tmp_path):
    (tmp_path / "a\tb").write_text("x")
    with pytest.raises(InputDataError, match="tab"):
        read_tree(tmp_path)


def test_a_trees_key_is_its_content(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("x")
    assert read_tree(tmp_path / "one").key == read_tree(tmp_path / "two").key
    (tmp_path / "two" / "a").rename(tmp_path / "two" / "b")
    assert read_tree(tmp_path / "one").key != read_tree(tmp_path / "two").key


@needs_rsync
def test_the_verb_profile_goes_to_the_board(fake_ssh, bundle, tmp_path, monkeypatch, capfd):
    """The verb's flags arrive as they were given; what the stand-in wrote is what comes back."""
    mgvq = executable(tmp_path / "profiler", MGVQ.replace('"copy"', '"profile"'))
    monkeypatch.setenv("HOME", str(tmp_path))
    image = tmp_path / "p.png"
    image.write_text("pixels")
    words = ["profile", bundle, "-o", tmp_path / "out", "--host", "user@board", "--remote-mgvq", mgvq, "--image", image,
             "--python", sys.executable, "--repeats", "4", "--prompt", "it's", "--format", "json"]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main([str(word) for word in words]) == 0, capfd.readouterr().err
    rest = json.loads((tmp_path / "out" / "seen.json").read_text())["rest"]
    given = dict(zip(rest[::2], rest[1::2]))
    assert (given["--repeats"], given["--prompt"]) == ("4", "it's")
    assert json.loads(capfd.readouterr().out) == {"made": "there"}
    assert given["--image"].endswith("/p.png")
    assert "--host" not in rest
    assert shlex.join(rest).count("--backend") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--python", "python3.12"], "--python has no effect without --host"),
        (["--backend", "tensorrt"], "needs --engines"),
        (["--engines", "x"], "--engines has no effect with --backend ort"),
        (["--backend", "tensorrt", "--engines", "x", "--provider", "cuda"], "--provider has no effect"),
    ],
)
def test_flags_without_effect_are_refused(bundle, tmp_path, capsys, words, message):
    assert main(["profile", str(bundle), "-o", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
