"""What a remote run refuses: boards that lack something, logins, hosts and links that fail, output in use."""

from __future__ import annotations

import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from remote_boards import executable, needs_rsync, run

from toolchain import __version__
from toolchain.device.remote import ssh as remote_ssh
from toolchain.device.remote.ssh import Connection
from toolchain.device.remote.store import Store, read_tree
from toolchain.device.remote.verbs import probe, run_remote
from toolchain.errors import EnvironmentMismatch, InputDataError, UsageError
from toolchain.values import SILENT


@needs_rsync
@pytest.mark.parametrize(
    ("version", "words"), [("3.8", "is 3.8; name another one"), ("", "found no .*; name another one")]
)
def test_a_python_too_old_is_refused(board, bundle, tmp_path, version, words):
    old = executable(tmp_path / "oldpython", f"#!/bin/sh\necho '{version}'\n")
    odd = replace(board, options=replace(board.options, python=str(old)))
    with pytest.raises(EnvironmentMismatch, match=f"Python 3.10 or newer is needed.*{words}"):
        run(odd, "copy", bundle, tmp_path / "out")


@needs_rsync
def test_no_space_is_refused_before_anything_is_sent(board, bundle):
    with Connection(board.host, board.options.ssh_config) as connection:
        assert probe(connection, board.options).free_bytes > 0
        store = Store(connection, board.options.folder)
        with pytest.raises(EnvironmentMismatch, match=r"to send and .* to spare are needed, 0\.0 MiB are free"):
            store.send([read_tree(bundle)], 100, SILENT)
    assert list((board.store / "objects").iterdir()) == []
    assert list((board.store / "incoming").iterdir()) == []


@needs_rsync
def test_an_mgvq_of_another_version_is_refused(board, bundle, tmp_path):
    other = executable(tmp_path / "other", "#!/bin/sh\necho mgvq 0.0.0\necho and a license\n")
    odd = replace(board, options=replace(board.options, mgvq=str(other)))
    with pytest.raises(EnvironmentMismatch, match=f"expected mgvq {__version__}, found 'mgvq 0.0.0'"):
        run(odd, "copy", bundle, tmp_path / "out")


@needs_rsync
def test_a_bundle_without_a_wheel_is_refused(board, bundle, tmp_path):
    odd = replace(board, options=replace(board.options, mgvq=None))
    with pytest.raises(EnvironmentMismatch, match=r"one wheel of mgvq.*--remote-mgvq"):
        run(odd, "copy", bundle, tmp_path / "out")


@needs_rsync
def test_a_login_without_the_key_is_refused(server, over_ssh, bundle, tmp_path):
    odd = server.with_name("stranger_config")
    odd.write_text(server.read_text().replace("user_key", "stranger_key"))
    with pytest.raises(EnvironmentMismatch, match="the login is refused: ssh-copy-id board"):
        run(replace(over_ssh, options=replace(over_ssh.options, ssh_config=odd)), "copy", bundle, tmp_path / "out")


@needs_rsync
def test_a_host_whose_key_is_not_known_is_refused(server, over_ssh, bundle, tmp_path):
    odd = server.with_name("unknown_config")
    odd.write_text(server.read_text().replace("known_hosts", "no_known_hosts"))
    with pytest.raises(EnvironmentMismatch, match="host key is not known here"):
        run(replace(over_ssh, options=replace(over_ssh.options, ssh_config=odd)), "copy", bundle, tmp_path / "out")


@needs_rsync
def test_a_host_where_nothing_listens_is_refused(server, over_ssh, bundle, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets it meanwhile
        odd = server.with_name("closed_config")
        lines = [f"  Port {taken.getsockname()[1]}" if "Port" in x else x for x in server.read_text().splitlines()]
        odd.write_text("\n".join(lines))
        with pytest.raises(
            EnvironmentMismatch, match=r"no ssh server answers there: check the port .*, or sudo apt install"
        ):
            run(replace(over_ssh, options=replace(over_ssh.options, ssh_config=odd)), "copy", bundle, tmp_path / "out")


@needs_rsync
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ssh: Could not resolve hostname board: Name or service not known", "its name is not known"),
        ("ssh: connect to host board port 22: Connection timed out", "it does not answer"),
        ("ssh: connect to host board port 22: No route to host", "it does not answer"),
        ("user@board: Permission denied (publickey).", "ssh-copy-id user@board"),
        ("something else", r"ssh failed \(something else\)"),
    ],
)
def test_what_ssh_says_becomes_advice(fake_ssh, bundle, tmp_path, monkeypatch, line, words):
    monkeypatch.setenv("FAKE_SSH_SAYS", line)
    with pytest.raises(EnvironmentMismatch, match=words):
        run(fake_ssh, "copy", bundle, tmp_path / "out")


@needs_rsync
def test_ssh_never_asks_and_its_connection_is_shared_and_closed(fake_ssh, bundle, tmp_path):
    run(fake_ssh, "copy", bundle, tmp_path / "out")
    calls = (tmp_path / "ssh.log").read_text().splitlines()
    assert all("BatchMode=yes" in call and "ControlMaster=auto" in call for call in calls)
    assert len({call.split("ControlPath=")[1].split("'")[0] for call in calls}) == 1
    assert "'-O', 'exit'" in calls[-1]


@needs_rsync
@pytest.mark.parametrize("host", ["-oProxyCommand=touch x", "user@", "a b", "", "user@-x", "board:22", "$(x)"])
def test_what_cannot_be_a_host_is_refused_unasked(fake_ssh, bundle, tmp_path, host):
    with pytest.raises(UsageError, match="expected user@board"):
        run(replace(fake_ssh, host=host), "copy", bundle, tmp_path / "out")
    assert not (tmp_path / "ssh.log").exists()


@pytest.mark.parametrize("tool", ["ssh", "rsync"])
def test_a_missing_tool_is_refused(bundle, tmp_path, monkeypatch, tool):
    monkeypatch.setattr(shutil, "which", lambda name: None if name == tool else f"/usr/bin/{name}")
    with pytest.raises(EnvironmentMismatch, match=f"needs {tool} here.*apt install"):
        run_remote("board", "copy", bundle, tmp_path / "out")


def test_a_damaged_bundle_and_a_used_output_are_refused_before_connecting(fake_ssh, bundle, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        run(fake_ssh, "copy", bundle, tmp_path / "used")
    (bundle / "device" / "a.txt").write_text("damaged")
    with pytest.raises(InputDataError, match="copy the bundle again"):
        run(fake_ssh, "copy", bundle, tmp_path / "out")
    with pytest.raises(InputDataError, match="does not exist"):
        run(fake_ssh, "copy", tmp_path / "none", tmp_path / "out")
    assert not (tmp_path / "ssh.log").exists()


@needs_rsync
def test_a_link_that_breaks_is_what_is_said_though_nothing_can_be_tidied_over_it(fake_ssh, bundle, tmp_path, said):
    with pytest.raises(EnvironmentMismatch, match="the connection broke while the verb ran"):
        run(fake_ssh, "cut", bundle, tmp_path / "out", str(tmp_path / "ssh.log.dead"))
    assert said[-1].startswith("left")
    assert not (tmp_path / "out").exists()


@needs_rsync
def test_a_connection_that_was_there_and_broke_is_no_login_to_try_by_hand(fake_ssh, tmp_path):
    (tmp_path / "file").write_text("x")
    with Connection(fake_ssh.host) as connection:
        assert connection.run("true").returncode == 0
        (tmp_path / "ssh.log.dead").touch()
        with pytest.raises(EnvironmentMismatch, match=r"connection broke \(.*\); run the same command again to go on"):
            connection.run("true")
        # rsync ends with ssh's exit code or with one of its own, whichever it notices first.
        with pytest.raises(EnvironmentMismatch, match="run the same command again to go on"):
            connection.rsync([str(tmp_path / "file"), connection.place(str(tmp_path / "copy"))])


@needs_rsync
def test_a_connection_that_does_not_close_spoils_nothing(fake_ssh, monkeypatch):
    monkeypatch.setattr(remote_ssh, "CONNECT_SECONDS", 1)
    monkeypatch.setenv("FAKE_SSH_CLOSES_IN", "30")
    with Connection(fake_ssh.host) as connection:
        sockets = Path(connection._sockets.name)
        assert sockets.is_dir()
    assert not sockets.exists()
