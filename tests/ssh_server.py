"""A real ssh server on loopback and a link to it that can be cut.

The server has keys of its own. The login is who runs the tests, with a home folder of the server's and without a
network for pip.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")

BOARD_SHELL = 'cd "{home}" && export HOME="$PWD" PIP_NO_INDEX=1 && eval "$SSH_ORIGINAL_COMMAND"'

# Stands between ssh and the server: passes on what comes, counts what is sent, and ends when told to.
RELAY = """
import os, pathlib, socket, sys, threading
port, most, folder = int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3])
link = socket.create_connection(("127.0.0.1", port))
def back():
    while data := link.recv(65536):
        os.write(1, data)
    os._exit(0)
def watch():
    while not (folder / "cut").exists():
        threading.Event().wait(0.02)
    os._exit(1)
for work in (back, watch):
    threading.Thread(target=work, daemon=True).start()
sent = 0
while data := os.read(0, 65536):
    sent += len(data)
    (folder / "sent.new").write_text(str(sent))
    os.replace(folder / "sent.new", folder / "sent")  # never seen empty
    if most and sent > most:
        os._exit(1)
    link.sendall(data)
"""


@contextmanager
def loopback_server(folder: Path) -> Iterator[Path]:
    """ssh's configuration file with the host "board"; the server runs until the end.

    Skips the test where there is no sshd or it does not start.
    """
    if SSHD is None:
        pytest.skip("needs sshd (openssh-server)")
    home = folder / "home"
    home.mkdir()
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd run by root confines itself; packages make it at boot
    for name in ("host_key", "user_key", "stranger_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    with socket.socket() as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        port = probe_socket.getsockname()[1]
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\nPidFile none\nUsePAM no\nStrictModes no\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        f"PermitRootLogin prohibit-password\nForceCommand {BOARD_SHELL.format(home=home)}\n"
    )
    key = (folder / "host_key.pub").read_text().split()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {key[0]} {key[1]}\n")
    (folder / "config").write_text(
        f"Host board\n  HostName 127.0.0.1\n  Port {port}\n  User {getpass.getuser()}\n  IdentitiesOnly yes\n"
        f"  IdentityFile {folder}/user_key\n  UserKnownHostsFile {folder}/known_hosts\n  StrictHostKeyChecking yes\n"
    )
    log = (folder / "sshd.log").open("wb")
    process = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "sshd_config"], stderr=log, stdin=subprocess.DEVNULL)
    try:
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", port), 0.2).close()
                break
            except OSError:
                if process.poll() is not None:
                    pytest.skip(f"sshd does not start here: {(folder / 'sshd.log').read_text().strip()}")
                time.sleep(0.05)
        yield folder / "config"
    finally:
        process.terminate()
        process.wait()
        log.close()


@dataclass(frozen=True)
class Link:
    """ssh's configuration file for a relayed connection; `cut` ends it at once."""

    config: Path

    def cut(self) -> None:
        (self.config.parent / "cut").touch()

    @property
    def sent_bytes(self) -> int:
        """What went to the board so far, ssh's own wrapping included."""
        return int((self.config.parent / "sent").read_text())


def relayed(config: Path, folder: Path, most_bytes: int = 0) -> Link:
    """A link over a relay whose files are in `folder`; it breaks after `most_bytes`, never if 0."""
    folder.mkdir()
    (folder / "relay.py").write_text(RELAY)
    command = f"  ProxyCommand {sys.executable} {folder}/relay.py %p {most_bytes} {folder}\n"
    (folder / "config").write_text(config.read_text() + command)
    return Link(folder / "config")
