"""A verb run on a "board": this machine behind a real ssh server on loopback, and behind a small program called ssh.

The server is started for these tests on a free port with keys of its own; the login is whoever runs the tests. Without
sshd or rsync the tests that need them skip.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from toolchain import __version__
from toolchain.bundle import write_bundle
from toolchain.cli import main
from toolchain.device.remote import RemoteOptions, probe, run_remote
from toolchain.device.remote_ssh import Connection
from toolchain.device.remote_store import Store, read_tree
from toolchain.errors import EnvironmentMismatch, InputDataError, UsageError

needs_rsync = pytest.mark.skipif(shutil.which("rsync") is None, reason="needs rsync")
SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")

FAKE_SSH = f"""#!{sys.executable}
import os, sys
words, options = sys.argv[1:], []
with open(os.environ["FAKE_SSH_LOG"], "a") as log:
    log.write(repr(words) + "\\n")
while words and words[0].startswith("-"):
    options.append(words.pop(0))
    if options[-1] in ("-o", "-F", "-O", "-p", "-l"):
        options.append(words.pop(0))
if "-O" in options:
    sys.exit(0)
if os.environ.get("FAKE_SSH_SAYS"):
    print(os.environ["FAKE_SSH_SAYS"], file=sys.stderr)
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


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def options(tmp_path, said) -> RemoteOptions:
    mgvq = executable(tmp_path / "mgvq", MGVQ)
    return RemoteOptions(sys.executable, str(mgvq), str(tmp_path / "store"), None, said.append)


@pytest.fixture
def fake_ssh(tmp_path, monkeypatch, options) -> Board:
    """A program called ssh that runs the command here; its calls are in ssh.log."""
    folder = tmp_path / "bin"
    folder.mkdir()
    executable(folder / "ssh", FAKE_SSH)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SSH_LOG", str(tmp_path / "ssh.log"))
    return Board("user@board", options, tmp_path / "store")


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Path:
    """ssh's configuration file for a server on loopback, which ends with the tests of this file."""
    if SSHD is None:
        pytest.skip("needs sshd (openssh-server)")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd run by root confines itself; packages make it at boot
    folder = tmp_path_factory.mktemp("sshd")
    for name in ("host_key", "user_key", "stranger_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    with socket.socket() as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        port = probe_socket.getsockname()[1]
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\nPidFile none\nUsePAM no\nStrictModes no\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        "PermitRootLogin prohibit-password\n"
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


@pytest.fixture
def over_ssh(server, options) -> Board:
    return Board("board", replace(options, ssh_config=server), Path(options.folder))


@pytest.fixture(params=["fake_ssh", "over_ssh"])
def board(request) -> Board:
    return request.getfixturevalue(request.param)


@pytest.fixture
def bundle(tmp_path) -> Path:
    """A bundle of three small files, two of equal content, one with an awkward name."""
    source = tmp_path / "pieces"
    source.mkdir()
    (source / "a.txt").write_text("same")
    (source / "it's a $(name).txt").write_text("same")
    (source / "big.txt").write_text("0123456789" * 50_000)
    return write_bundle({"device": source}, tmp_path / "bundle").folder


def run(board: Board, verb: str, bundle: Path, output: Path, *arguments: str, **more) -> int:
    return run_remote(board.host, verb, bundle, output, arguments, options=board.options, **more)


@needs_rsync
def test_a_verb_runs_there_and_its_output_comes_back(board, bundle, tmp_path, capfd, said):
    image = tmp_path / "picture one.png"
    image.write_text("pixels")
    code = run(board, "copy", bundle, tmp_path / "out", "--prompt", "what's $HOME?", inputs={"--image": image})
    assert code == 0
    seen = json.loads((tmp_path / "out" / "seen.json").read_text())
    assert seen["rest"][:2] == ["--prompt", "what's $HOME?"]
    assert list(seen["given"].values()) == ["pixels"]
    assert seen["files"] == {p.relative_to(bundle).as_posix(): p.read_text() for p in bundle.rglob("*") if p.is_file()}
    shown = capfd.readouterr()
    assert ("a figure" in shown.out, "a step" in shown.err) == (True, True)
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
        "import sys; from pathlib import Path; from toolchain.device.remote import *\n"
        f"o = RemoteOptions({options.python!r}, {options.mgvq!r}, {options.folder!r}, "
        f"{str(options.ssh_config) if options.ssh_config else None!r})\n"
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


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.02)


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
            store.send([read_tree(bundle)], 100, print)
    assert list((board.store / "objects").iterdir()) == []
    assert list((board.store / "incoming").iterdir()) == []


@needs_rsync
def test_an_mgvq_of_another_version_is_refused(board, bundle, tmp_path):
    other = executable(tmp_path / "other", "#!/bin/sh\necho mgvq 0.0.0\n")
    odd = replace(board, options=replace(board.options, mgvq=str(other)))
    with pytest.raises(EnvironmentMismatch, match=f"expected mgvq {__version__}, found 'mgvq 0.0.0'"):
        run(odd, "copy", bundle, tmp_path / "out")


@needs_rsync
def test_a_bundle_without_a_wheel_is_refused(board, bundle, tmp_path):
    odd = replace(board, options=replace(board.options, mgvq=None))
    with pytest.raises(EnvironmentMismatch, match=r"one wheel of mgvq.*--remote-mgvq"):
        run(odd, "copy", bundle, tmp_path / "out")


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
def test_an_install_that_fails_says_why_and_is_not_taken_for_done(fake_ssh, tmp_path):
    pieces = tmp_path / "pieces"
    pieces.mkdir()
    (pieces / f"mgvq-{__version__}-py3-none-any.whl").write_bytes(b"no wheel")
    made = write_bundle({"install": pieces}, tmp_path / "bundle").folder
    board = replace(fake_ssh, options=replace(fake_ssh.options, mgvq=None))
    with pytest.raises(EnvironmentMismatch, match=r"cannot be installed there .*make the bundle again"):
        run(board, "copy", made, tmp_path / "out")
    assert not list((board.store / "environments").glob("*/ready"))


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
        with pytest.raises(EnvironmentMismatch, match="no ssh server answers there"):
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
    assert (given["--repeats"], given["--prompt"], given["--format"]) == ("4", "it's", "json")
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
