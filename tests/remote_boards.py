"""What stands for a board in tests of remote runs: a small program called ssh, and one that stands for mgvq there."""

from __future__ import annotations

import shutil
import stat
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from toolchain import __version__
from toolchain.device.remote.options import RemoteOptions
from toolchain.device.remote.verbs import run_remote

needs_rsync = pytest.mark.skipif(shutil.which("rsync") is None, reason="needs rsync")

FAKE_SSH = f"""#!{sys.executable}
import os, sys, time
words, options = sys.argv[1:], []
with open(os.environ["FAKE_SSH_LOG"], "a") as log:
    log.write(repr(words) + "\\n")
while words and words[0].startswith("-"):
    options.append(words.pop(0))
    if options[-1] in ("-o", "-F", "-O", "-p", "-l"):
        options.append(words.pop(0))
if "-O" in options:
    time.sleep(float(os.environ.get("FAKE_SSH_CLOSES_IN", 0)))
    sys.exit(0)
if os.environ.get("FAKE_SSH_SAYS") or os.path.exists(os.environ["FAKE_SSH_LOG"] + ".dead"):
    print(os.environ.get("FAKE_SSH_SAYS", "Connection closed"), file=sys.stderr)
    sys.exit(255)
os.execvp("sh", ["sh", "-c", " ".join(words[1:])])
"""

# What stands for mgvq on the board: a few verbs that show what they were given, and how they end.
MGVQ = f"""#!{sys.executable}
import json, os, pathlib, signal, sys, time
words = sys.argv[1:]
if words == ["--version"]:
    print("mgvq {__version__}")
    sys.exit(0)
verb, source, _, output, *rest = words
here, output = pathlib.Path(source), pathlib.Path(output)
def write():
    output.mkdir()
    files = {{p.relative_to(here).as_posix(): p.read_text(errors="replace") for p in here.rglob("*") if p.is_file()}}
    given = {{rest[i]: pathlib.Path(rest[i + 1]).read_text() for i, w in enumerate(rest) if w == "--image"}}
    (output / "seen.json").write_text(json.dumps({{"rest": rest, "files": files, "given": given}}))
    (output / "profile.json").write_text(json.dumps({{"made": "there"}}))
if verb == "copy":
    print("a figure", flush=True)
    print("a step", file=sys.stderr, flush=True)
    write()
elif verb == "fail":
    sys.exit(5)
elif verb == "stop":
    write()
    sys.exit(75)
elif verb == "nothing":
    pass
elif verb == "cut":
    pathlib.Path(rest[0]).touch()
    sys.exit(255)
elif verb == "wait":
    state = pathlib.Path(rest[0])
    try:
        state.with_suffix(".pid").write_text(str(os.getpid()))
        time.sleep(600)
    except KeyboardInterrupt:
        state.write_text("saved")
        sys.exit(130)
"""


@dataclass(frozen=True)
class Board:
    """Where a test's ssh goes: host name, options, and the folder that the options name."""

    host: str
    options: RemoteOptions
    store: Path


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def run(board: Board, verb: str, bundle: Path, output: Path, *arguments: str, **more) -> int:
    return run_remote(board.host, verb, bundle, output, arguments, options=board.options, **more)


def until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.02)


def wheel(path: Path) -> None:
    """A wheel of a package called toolchain whose command is the stand-in."""
    info = f"mgvq-{__version__}.dist-info"
    body = MGVQ.partition("\n")[2]
    files = {
        "toolchain/__init__.py": "",
        "toolchain/stand_in.py": "def main():\n" + "".join(f"    {line}\n" for line in body.splitlines()),
        f"{info}/entry_points.txt": "[console_scripts]\nmgvq = toolchain.stand_in:main\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: mgvq\nVersion: {__version__}\nRequires-Dist: torch\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"]))


def make_environment(folder: Path) -> Path:
    """Make a virtual environment without pip; the folder of its packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return next(folder.glob("lib/python*/site-packages"))


def place_package(site: Path, name: str, version: str) -> None:
    """A package in an environment as far as pip sees it: nothing but its name and version."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("")
