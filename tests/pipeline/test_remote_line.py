"""The real mgvq over a real ssh server: a bundle goes to the board, engines and profiles come back, links break.

The board is this machine behind sshd on loopback, with a home folder of its own. mgvq is installed there from the
bundle's wheel, without a network.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from remote_boards import make_environment, needs_rsync, place_package, until
from ssh_server import Link, loopback_server, relayed

from toolchain.bundle.manifest import open_bundle
from toolchain.device.remote.store import read_tree
from toolchain.files.folders import sha256_file

MIB = 1 << 20
pytestmark = [needs_rsync, pytest.mark.slow(reason="engines are built over ssh from the demo's bundle")]


@pytest.fixture(scope="module")
def board(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """ssh's `config`, what mgvq keeps in the board's home (`store`), and a Python there (`python`).

    The Python is of an environment with everything that runs on a board. What is called cuda-python in it is a name:
    pip has to find one, and nothing that runs without a GPU calls it.
    """
    folder = tmp_path_factory.mktemp("board")
    site = make_environment(folder / "owners")
    (site / "packages.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    place_package(site, "cuda-python", "12.6.2" if sys.version_info < (3, 12) else "13.0.3")
    (folder / "sshd").mkdir()
    with loopback_server(folder / "sshd") as config:
        store = folder / "sshd" / "home" / ".cache" / "mgvq"
        yield SimpleNamespace(config=config, store=store, python=folder / "owners" / "bin" / "python")


def start(board: SimpleNamespace, link: Link, *words: object) -> subprocess.Popen[str]:
    """mgvq with `--host` over a link; its stderr goes to a file beside the link's."""
    there = ["--host", "board", "--ssh-config", link.config, "--python", board.python, "--format", "json"]
    command = [sys.executable, "-c", "import sys; from toolchain.cli import main; sys.exit(main(sys.argv[1:]))"]
    with log(link).open("w") as stderr:
        return subprocess.Popen(
            [*command, *map(str, [*words, *there])],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True,
        )  # fmt: skip


def log(link: Link) -> Path:
    return link.config.parent / "stderr"


def running_there(board: SimpleNamespace) -> list[str]:
    """Command lines of the mgvq that was installed on the board."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if f"{board.store}/environments" in words:
            found.append(words)
    return found


@pytest.mark.rtx
@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="needs TensorRT for RTX (pip install tensorrt-rtx-cu13)")
def test_engines_are_built_there_and_come_back_though_the_link_breaks_twice(demo_bundle, board, tmp_path, capsys):
    """First while the bundle is sent, then while the board builds; each time the same command goes on."""
    files = read_tree(demo_bundle).files
    total = sum(dict(files.values()).values())
    out = tmp_path / "engines"
    words = ("build", demo_bundle, "--backend", "tensorrt_rtx", "-o", out)

    link = relayed(board.config, tmp_path / "first", most_bytes=total // 2)
    assert start(board, link, *words).wait(300) == 6, log(link).read_text()
    assert "run the same command again to go on" in log(link).read_text()
    arrived = sum(path.stat().st_size for path in (board.store / "incoming").iterdir())
    assert total // 4 < arrived < total

    link = relayed(board.config, tmp_path / "second")
    process = start(board, link, *words)
    until(lambda: process.poll() is not None or "decoder: decoder.onnx" in log(link).read_text(), 300)
    assert process.poll() is None, log(link).read_text()
    second = link.sent_bytes
    assert second < total - arrived + MIB, "what had arrived was not sent again"
    assert running_there(board)
    link.cut()
    assert process.wait(60) == 6
    assert "the connection broke while the verb ran, which stopped it" in log(link).read_text()
    until(lambda: not running_there(board))
    assert not out.exists()

    link = relayed(board.config, tmp_path / "third")
    process = start(board, link, *words)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, log(link).read_text()
    assert f"send       nothing: board has all {len(dict(files.values()))} files" in log(link).read_text()
    assert "install " not in log(link).read_text()
    with capsys.disabled():
        print(
            f"\nbundle of {total:,} bytes: {arrived:,} arrived before the link broke; the second call sent {second:,} "
            f"\nand lost its link while it built; the third sent {link.sent_bytes:,}:\n{log(link).read_text()}"
        )
    record = json.loads((out / "build.json").read_text())
    assert record == json.loads(said), "what the board said it built"
    assert record["bundle"] == open_bundle(demo_bundle).manifest["manifest_sha256"]
    made_there = {engine["file"]: engine["sha256"] for engine in record["engines"]}
    assert set(made_there) == {"vision.engine", "embed.engine", "decoder.engine"}
    assert {path.name: sha256_file(path) for path in out.iterdir() if path.suffix == ".engine"} == made_there
    assert {path.name for path in out.iterdir()} == {*made_there, "build.json"}


def test_a_profile_is_taken_there_and_comes_back(demo_bundle, board, tmp_path):
    link, out = relayed(board.config, tmp_path / "link"), tmp_path / "profile"
    process = start(board, link, "profile", demo_bundle, "-o", out, "--repeats", 1, "--warmup", 0, "--tokens", 2)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, log(link).read_text()
    found = json.loads((out / "profile.json").read_text())
    assert found == json.loads(said), "what the board said it measured"
    assert (found["backend"], found["settings"]["tokens"]) == ("ort", 2)
    assert [row["phase"] for row in found["phases"]] == ["prepare", "vision", "embed", "prefill", "decode"]
    assert (out / "profile.html").is_file()
    [environment] = (board.store / "environments").iterdir()
    assert list(environment.glob("lib/python*/site-packages/toolchain/cli/__init__.py")), "the bundle's wheel ran"
    assert list((board.store / "runs").glob("*/output/profile.json")) == []
