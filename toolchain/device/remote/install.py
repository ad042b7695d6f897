"""An mgvq on the board: the one named, or a virtual environment with the wheel that the bundle carries.

The environment sees the board's own packages, because JetPack installs TensorRT for the system's Python; and those of
the environment that --python names, if it is one, so that a board without a network can be prepared by hand. The wheel
goes in without its dependencies (they are the workstation's: torch, transformers), whatever mgvq can be seen besides;
requirements-board.txt names the board's, and pip asks for none that are there.
"""

from __future__ import annotations

import hashlib
import shlex
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from toolchain import __version__
from toolchain.device.remote.ssh import Connection
from toolchain.device.remote.store import Tree
from toolchain.errors import EnvironmentMismatch

if TYPE_CHECKING:
    from toolchain.device.remote.options import RemoteOptions

REQUIREMENTS = "requirements-board.txt"
# Run by the named Python: if that is an environment's, the new one (its argument) looks for packages there, last.
_SEE_ENVIRONMENT = """
import pathlib, sys, sysconfig
if sys.prefix != sys.base_prefix:
    own = next(pathlib.Path(sys.argv[1]).glob("lib/python*/site-packages"))
    seen = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    (own / "mgvq-sees.pth").write_text("".join(f"import site; site.addsitedir({path!r})\\n" for path in seen))
"""


def installed_command(connection: Connection, options: RemoteOptions, bundle: Tree, place: str) -> list[str]:
    """The words that start mgvq on the board, installed there if need be. `place` is where the bundle is on the board.

    Raises:
        EnvironmentMismatch: what is named does not start; the bundle has no wheel; the environment cannot be made.
    """
    if options.mgvq is not None:
        _check_starts(connection, [options.mgvq])
        return [options.mgvq]
    wheels = sorted(name for name in bundle.files if name.endswith(".whl"))
    requirements = sorted(name for name in bundle.files if PurePosixPath(name).name == REQUIREMENTS)
    if len(wheels) != 1:
        raise EnvironmentMismatch(
            f"{bundle.root}: expected one wheel of mgvq in what is sent, found {wheels or 'none'}; install mgvq on the "
            "board by hand and name it with --remote-mgvq"
        )
    parts = [bundle.files[name][0] for name in (*wheels, *requirements)]
    key = hashlib.sha256("\n".join([options.python, *parts]).encode()).hexdigest()[:16]
    environment = f"{options.folder}/environments/{key}"
    command = [f"{environment}/bin/mgvq"]  # not python -m: that would take a folder "toolchain" of the home folder
    if connection.run(f"[ -f {shlex.quote(environment + '/ready')} ]").returncode:
        options.progress.stage(f"install    {PurePosixPath(wheels[0]).name} on {connection.host}")
        _install(connection, options.python, environment, [f"{place}/{name}" for name in requirements],
                 f"{place}/{wheels[0]}")  # fmt: skip
    _check_starts(connection, command)
    return command


def _install(connection: Connection, python: str, environment: str, requirements: list[str], wheel: str) -> None:
    """Make the environment; the file `ready` says that it was made whole."""
    at, start = shlex.quote(environment), shlex.quote(python)
    steps = [
        (
            f"rm -rf {at} && mkdir -p {at} && {start} -m venv --system-site-packages {at} && "
            f"{start} -c {shlex.quote(_SEE_ENVIRONMENT)} {at}",
            "sudo apt install python3-venv on the board",
        )
    ]
    pip = f"{at}/bin/python -m pip --disable-pip-version-check --no-input install"
    for path in requirements:
        steps.append(
            (
                f"{pip} --requirement {shlex.quote(path)}",
                "give the board a network, or install them by hand in an environment there and name its python with "
                "--python",
            )
        )
    # Else pip takes an mgvq of this version that it sees outside the environment for this one.
    steps.append(
        (f"{pip} --ignore-installed --no-deps {shlex.quote(wheel)} && touch {at}/ready", "make the bundle again")
    )
    for script, advice in steps:
        done = connection.run(script)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
            raise EnvironmentMismatch(f"{connection.host}: mgvq cannot be installed there ({said}); {advice}")


def _check_starts(connection: Connection, command: list[str]) -> None:
    """Refuse an mgvq that does not start, or is of another version than ours: flags and formats may differ."""
    done = connection.run(" ".join(shlex.quote(word) for word in [*command, "--version"]))
    said = done.stdout.strip()
    if done.returncode or said != f"mgvq {__version__}":
        found = said.partition("\n")[0] or (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise EnvironmentMismatch(
            f"{connection.host}: expected mgvq {__version__}, found {found!r} from {' '.join(command)}; install this "
            "version there, or make the bundle again with it"
        )
