"""One connection to a board over plain ssh: commands, files by rsync, and refusals that say what to do.

All commands share a master connection, so that a key is asked for once. Nothing here asks questions on the terminal: a
host whose key is not known, or that wants a password, is refused with the command that settles it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from toolchain.errors import EnvironmentMismatch, InputDataError, UsageError

CONNECT_SECONDS = 10
ALIVE_SECONDS = 15  # a board that does not answer for four times this long is taken for gone
SSH_FAILED = 255  # ssh's own exit code; a command that ends with it cannot be told from that
_HOST = re.compile(r"[A-Za-z0-9_][\w.+-]*(@[A-Za-z0-9_][\w.-]*)?$")
_REFUSALS = (
    ("host key verification failed", "its host key is not known here: ssh {host} once by hand and compare the key"),
    ("permission denied", "the login is refused: ssh-copy-id {host}, or load the key with ssh-add"),
    ("too many authentication", "the login is refused: name one key with IdentityFile in ~/.ssh/config"),
    ("could not resolve", "its name is not known: check the name, or add it to ~/.ssh/config"),
    (
        "connection refused",
        "no ssh server answers there: check the port (~/.ssh/config), or sudo apt install openssh-server on the board",
    ),
    ("timed out", "it does not answer: check that the board is on and in this network"),
    ("no route to host", "it does not answer: check that the board is on and in this network"),
)


class Connection:
    """ssh to one host; a context manager, which closes the master connection."""

    def __init__(self, host: str, config: Path | None = None) -> None:
        """Nothing is opened yet.

        Raises:
            UsageError: the host is not NAME or USER@NAME.
            InputDataError: the configuration is not there.
            EnvironmentMismatch: ssh or rsync is not installed here.
        """
        if not _HOST.match(host):
            raise UsageError(f"--host {host!r}: expected user@board, or a name of ~/.ssh/config (for ports and keys)")
        if config is not None and not config.is_file():
            raise InputDataError(f"{config} does not exist; check --ssh-config")
        for tool in ("ssh", "rsync"):
            if shutil.which(tool) is None:
                raise EnvironmentMismatch(
                    f"--host needs {tool} here, found none; sudo apt install openssh-client rsync"
                )
        self.host = host
        self._was_there = False
        # Short, because a socket's path has little more than a hundred characters.
        self._sockets = tempfile.TemporaryDirectory(prefix="mgvq-", dir="/tmp" if os.path.isdir("/tmp") else None)
        self._options = [
            *(("-F", str(config)) if config else ()),
            *("-o", "BatchMode=yes"),
            *("-o", f"ConnectTimeout={CONNECT_SECONDS}"),
            *("-o", f"ServerAliveInterval={ALIVE_SECONDS}", "-o", "ServerAliveCountMax=4"),
            *("-o", "ControlMaster=auto", "-o", f"ControlPath={self._sockets.name}/%C", "-o", "ControlPersist=60"),
        ]

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        close = ["ssh", *self._options, "-O", "exit", self.host]
        try:
            subprocess.run(close, stdin=subprocess.DEVNULL, capture_output=True, timeout=CONNECT_SECONDS)
        except subprocess.TimeoutExpired:
            pass  # the master ends by itself after ControlPersist, or with its dead link
        finally:
            self._sockets.cleanup()

    def command(self, remote: str) -> list[str]:
        """The ssh command line that runs `remote` in the board's shell, without a terminal."""
        # Through sh, whatever the login's own shell is.
        return ["ssh", "-T", *self._options, self.host, f"exec sh -c {shlex.quote(remote)}"]

    def run(self, remote: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a shell command there and wait for it.

        Raises:
            EnvironmentMismatch: the host cannot be reached; the message says why and what to do.
        """
        done = subprocess.run(self.command(remote), input=stdin, capture_output=True, text=True, errors="replace")
        if done.returncode == SSH_FAILED:
            raise self.refusal(done.stderr)
        self._was_there = True
        return done

    def refusal(self, stderr: str) -> EnvironmentMismatch:
        """The error for what ssh said when it could not connect, or when a connection that was there is gone."""
        said = stderr.strip().splitlines()[-1] if stderr.strip() else "no reason given"
        for word, advice in _REFUSALS:
            if word in stderr.lower():
                return EnvironmentMismatch(f"{self.host}: {advice.format(host=self.host)} ({said})")
        if self._was_there:
            return EnvironmentMismatch(
                f"{self.host}: the connection broke ({said}); run the same command again to go on"
            )
        return EnvironmentMismatch(f"{self.host}: ssh failed ({said}); try it by hand: ssh {self.host}")

    def rsync(self, arguments: Sequence[str], files_from: Sequence[str] | None = None) -> None:
        """Run rsync over this connection; a path on the board is `self.place(path)`.

        Raises:
            EnvironmentMismatch: it failed; the message has what it said. What had arrived stays for the next time.
        """
        shell = " ".join(shlex.quote(word) for word in ["ssh", "-T", *self._options])
        listed = ["--files-from=-"] if files_from is not None else []
        done = subprocess.run(
            ["rsync", "-e", shell, *listed, *arguments],
            input="".join(f"{name}\n" for name in files_from or ()),
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode == SSH_FAILED:
            raise self.refusal(done.stderr)
        if done.returncode:
            said = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
            if "command not found" in done.stderr or done.returncode == 127:
                said = "rsync is not installed there: sudo apt install rsync on the board"
            raise EnvironmentMismatch(f"copying with {self.host} stopped ({said}); run the same command again to go on")

    def place(self, path: str) -> str:
        """A path on the board, for rsync."""
        return f"{self.host}:{path}"
