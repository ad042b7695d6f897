"""A verb run on a board over ssh: what it needs is sent by content, it runs there, its result comes back whole.

    1  reach the board, ask what it has (Python, space, rsync)      refused with exit 6 and what to do
    2  send what it lacks of the bundle and of other inputs         remote_store
    3  a virtual environment there from the bundle's own wheel      remote_install
    4  run the verb, its stderr shown as it comes; ctrl-C stops it  remote_agent
    5  bring the output folder back: all of it, or nothing

Nothing is written on the board outside `RemoteOptions.folder`.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from toolchain.bundle.manifest import MANIFEST, open_bundle
from toolchain.device.remote import agent as remote_agent
from toolchain.device.remote.install import installed_command
from toolchain.device.remote.options import RemoteOptions
from toolchain.device.remote.ssh import SSH_FAILED, Connection
from toolchain.device.remote.store import Store, read_tree
from toolchain.errors import EnvironmentMismatch
from toolchain.files.folders import check_output, staged_folder

OLDEST_PYTHON = (3, 10)
_INTERRUPT_SECONDS = 60.0  # longer than the agent's patience, so that its exit code still arrives
_PROBE = """
printf 'rsync=%s\\n' "$(command -v rsync)"
printf 'python=%s\\n' "$({python} -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)"
mkdir -p {folder} && printf 'free=%s\\n' "$(df -Pk {folder} | tail -n 1 | tr -s ' ' | cut -d ' ' -f 4)"
"""


@dataclass(frozen=True)
class RemoteMachine:
    """What a board said of itself. `python` is (major, minor)."""

    python: tuple[int, ...]
    free_bytes: int


def run_remote(
    host: str,
    verb: str,
    source: Path,
    output: Path,
    arguments: Sequence[str] = (),
    *,
    inputs: Mapping[str, Path] | None = None,
    options: RemoteOptions | None = None,
) -> int:
    """Run `mgvq VERB SOURCE -o OUTPUT ARGUMENTS` on a board; its exit code.

    Its stderr is ours as it comes; its stdout, which names the board's paths, is not shown: the result is `output`.
    That is there, whole, when the code is 0; with another code nothing is brought back and the message says where it
    lies on the board.

    Args:
        host: user@board, or a name of ~/.ssh/config.
        source: a bundle, whose hashes are checked first, or any other folder that the verb takes.
        arguments: passed on as they are; a path among them would be a path of the board.
        inputs: flag → file or folder of this machine that is sent and named to the verb by its place there.

    Raises:
        UsageError: the host cannot be one, or `output` is in use.
        InputDataError: source or an input is missing or damaged.
        EnvironmentMismatch: the board cannot be reached, lacks something, or the connection broke.
        KeyboardInterrupt: after the verb was stopped there.
    """
    options, inputs = options or RemoteOptions(), dict(inputs or {})
    check_output(output)
    if (source / MANIFEST).is_file():
        open_bundle(source)
    trees = [read_tree(source), *(read_tree(path) for path in inputs.values())]
    with Connection(host, options.ssh_config) as connection:
        options.progress.stage(f"connect    {host}")
        machine = probe(connection, options)
        store = Store(connection, options.folder)
        places = store.send(trees, machine.free_bytes, options.progress)
        named = [(flag, _inside(path, place)) for (flag, path), place in zip(inputs.items(), places[1:])]
        sent = [text for pair in named for text in pair]
        command = installed_command(connection, options, trees[0], places[0])
        run = _run_folder(connection, options)
        options.progress.stage(f"run        mgvq {verb} on {host}")
        there = f"{run}/output"
        try:
            code = _run_verb(connection, options, [*command, verb, places[0], "-o", there, *arguments, *sent])
            if code == 0:
                options.progress.stage(f"fetch      {host}:{there}")
                fetch(connection, there, output)
        finally:
            _tidy(connection, options, run, there)
        return code


def _tidy(connection: Connection, options: RemoteOptions, run: str, there: str) -> None:
    """Remove the run's folder if it is empty: what a verb that failed wrote may be worth a look.

    A dead connection is no error here: it would stand in for the one on its way, a broken run or ctrl-C.
    """
    try:
        kept = connection.run(f"[ ! -d {shlex.quote(run)} ] || rmdir {shlex.quote(run)}").returncode != 0
    except EnvironmentMismatch:
        kept = True
    if kept:
        options.progress.stage(f"left       what was written there: {connection.host}:{there}")


def probe(connection: Connection, options: RemoteOptions) -> RemoteMachine:
    """What the board has, refused where it does not suffice.

    Raises:
        EnvironmentMismatch: no connection, no rsync, no Python or one too old, no space to ask about.
    """
    script = _PROBE.format(python=shlex.quote(options.python), folder=shlex.quote(options.folder))
    done = connection.run(script)
    said = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    host = connection.host
    if not said.get("rsync"):
        raise EnvironmentMismatch(f"{host}: rsync is needed there, found none; sudo apt install rsync on the board")
    version = tuple(int(x) for x in said["python"].split(".")) if said.get("python") else None
    if version is None or version < OLDEST_PYTHON:
        found = f"{options.python} is {said['python']}" if version else f"no {options.python}"
        raise EnvironmentMismatch(
            f"{host}: Python {'.'.join(map(str, OLDEST_PYTHON))} or newer is needed, found {found}; name another one "
            "with --python"
        )
    if not said.get("free", "").isdigit():
        raise EnvironmentMismatch(
            f"{host}: {options.folder} cannot be made there ({done.stderr.strip() or 'no reason given'}); give the "
            "login a home folder it may write to"
        )
    return RemoteMachine(version, 1024 * int(said["free"]))


def fetch(connection: Connection, there: str, output: Path) -> None:
    """A folder of the board as `output`, whole or not at all.

    Raises:
        EnvironmentMismatch: the connection broke, or the verb wrote nothing.
        UsageError: `output` is in use.
    """
    if connection.run(f"[ -d {shlex.quote(there)} ]").returncode:
        raise EnvironmentMismatch(
            f"{connection.host}: the verb ended well and left no {there}; is the mgvq there of this version?"
        )
    with staged_folder(output) as folder:
        connection.rsync(["--recursive", "--times", connection.place(f"{there}/"), f"{folder}/"])
    connection.run(f"rm -rf {shlex.quote(str(Path(there).parent))}")


def _inside(path: Path, place: str) -> str:
    """Where an input is on the board: a file in the folder it was sent in, or the folder."""
    return f"{place}/{path.name}" if path.is_file() else place


def _run_folder(connection: Connection, options: RemoteOptions) -> str:
    """A fresh folder for one run."""
    runs = shlex.quote(f"{options.folder}/runs")
    done = connection.run(f"mkdir -p {runs} && mktemp -d {runs}/XXXXXXXX")
    if done.returncode:
        raise EnvironmentMismatch(f"{connection.host}: no folder for the run can be made ({done.stderr.strip()})")
    return done.stdout.strip()


def _run_verb(connection: Connection, options: RemoteOptions, command: Sequence[str]) -> int:
    """The verb's exit code. Closing our end of its stdin is what stops it, whoever closes it."""
    agent = Path(remote_agent.__file__).read_text(encoding="utf-8")
    words = [options.python, "-I", "-c", agent, *command]  # -I: nothing of the home folder stands for a module
    process = subprocess.Popen(
        connection.command(" ".join(shlex.quote(word) for word in words)),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # ctrl-C goes to us alone; we stop the verb and wait for what it says
    )
    assert process.stdin is not None
    try:
        code = process.wait()
    except KeyboardInterrupt:
        options.progress.stage(f"stop       {connection.host}")
        process.stdin.close()
        _wait_or_kill(process)
        raise
    finally:
        if not process.stdin.closed:
            process.stdin.close()
        if process.poll() is None:
            process.kill()
            process.wait()
    if code == SSH_FAILED:
        raise EnvironmentMismatch(
            f"{connection.host}: the connection broke while the verb ran, which stopped it; run the same command again"
        )
    return code


def _wait_or_kill(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_INTERRUPT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
