"""Files on a board by their content: sent once, whatever bundle they come in, and put together by hard links.

STORE/objects/SHA256            a file; there only when whole and proved
STORE/incoming/                 what is under way, kept when a connection breaks
STORE/trees/KEY/                a folder put together from objects; KEY is the hash of its names and digests
"""

from __future__ import annotations

import hashlib
import secrets
import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from toolchain.device.remote.ssh import Connection
from toolchain.errors import EnvironmentMismatch, InputDataError
from toolchain.files.folders import sha256_file
from toolchain.values import Progress

DIGEST_LENGTH = 64
SPARE_BYTES = 64 << 20  # left free on the board beyond what is sent


@dataclass(frozen=True)
class Tree:
    """A folder or a single file by content: name (with forward slashes) → (SHA-256, bytes)."""

    root: Path
    files: Mapping[str, tuple[str, int]]

    @property
    def key(self) -> str:
        text = "".join(f"{digest} {name}\n" for name, (digest, _) in sorted(self.files.items()))
        return hashlib.sha256(text.encode()).hexdigest()

    def source(self, name: str) -> Path:
        return self.root / name if self.root.is_dir() else self.root


def read_tree(path: Path) -> Tree:
    """What is at `path`, every file hashed.

    Raises:
        InputDataError: nothing is there, it is empty, or a name would break a line.
    """
    if not path.exists():
        raise InputDataError(f"{path} does not exist; check the path")
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    names = [path.name] if path.is_file() else [p.relative_to(path).as_posix() for p in found]
    if odd := [name for name in names if "\n" in name or "\t" in name]:
        raise InputDataError(f"{path}: file name {odd[0]!r} has a line break or a tab; rename it")
    if not found:
        raise InputDataError(f"{path} holds no files; check the path")
    return Tree(path, {name: (sha256_file(p), p.stat().st_size) for name, p in zip(names, found)})


class Store:
    """The store of one board, at `folder` there (from the home folder on, or absolute)."""

    def __init__(self, connection: Connection, folder: str) -> None:
        self._connection, self.folder = connection, folder

    def send(self, trees: list[Tree], free_bytes: int, progress: Progress) -> list[str]:
        """Bring every tree there; their folders on the board, in order.

        Raises:
            EnvironmentMismatch: no space, a broken connection, or content that changed on the way.
        """
        sizes = {digest: size for tree in trees for digest, size in tree.files.values()}
        missing = sorted(set(sizes) - self._present())
        bytes_missing = sum(sizes[digest] for digest in missing)
        # Once is enough: what arrives is renamed into place, and trees are hard links.
        if bytes_missing + SPARE_BYTES > free_bytes:
            raise EnvironmentMismatch(
                f"{self._connection.host}: {_mib(bytes_missing)} to send and {_mib(SPARE_BYTES)} to spare are needed, "
                f"{_mib(free_bytes)} are free; make room, for example rm -r {self.folder} there (what was sent before)"
            )
        if missing:
            files = f"{len(missing)} of {len(sizes)} files"
            progress.stage(f"send       {files}, {_mib(bytes_missing)}, to {self._connection.host}")
            self._send_objects(trees, missing)
        else:
            progress.stage(f"send       nothing: {self._connection.host} has all {len(sizes)} files")
        return [self._assembled(tree) for tree in trees]

    def _present(self) -> set[str]:
        folders = " ".join(self._at(name) for name in ("objects", "incoming", "trees"))
        done = self._connection.run(f"mkdir -p {folders} && ls {self._at('objects')}")
        if done.returncode:
            raise EnvironmentMismatch(
                f"{self._connection.host}: {self.folder} cannot be made ({done.stderr.strip()}); free the disk, or "
                "give the login a home folder it may write to"
            )
        return {name for name in done.stdout.split() if len(name) == DIGEST_LENGTH}

    def _send_objects(self, trees: list[Tree], missing: list[str]) -> None:
        """Through a folder of links named by digest, so that one rsync sends them all and resumes each of them."""
        wanted = set(missing)
        with tempfile.TemporaryDirectory(prefix="mgvq-send-") as folder:
            for tree in trees:
                for name, (digest, _) in tree.files.items():
                    link = Path(folder) / digest
                    if digest in wanted and not link.is_symlink():
                        link.symlink_to(tree.source(name).resolve())
            self._connection.rsync(
                ["--copy-links", "--times", "--partial", "--append-verify", f"{folder}/",
                 self._connection.place(f"{self.folder}/incoming/")],
                files_from=missing,
            )  # fmt: skip
        self._prove(missing)

    def _prove(self, digests: list[str]) -> None:
        """Objects whose content has their name go in place; others are removed."""
        script = (
            f"cd {self._at('incoming')} || exit 1\n"
            "while read -r name; do\n"
            '  found=$(sha256sum "$name")\n'
            '  if [ "${found%% *}" = "$name" ]; then chmod a-w "$name" && mv -f "$name" ../objects/ || exit 1\n'
            '  else rm -f "$name"; echo "$name"; fi\n'
            "done"
        )
        done = self._connection.run(script, stdin="".join(f"{digest}\n" for digest in digests))
        bad = done.stdout.split()
        if done.returncode or bad:
            reason = f"{len(bad)} files arrived changed" if bad else done.stderr.strip()
            raise EnvironmentMismatch(
                f"{self._connection.host}: {reason}; run the same command again, and check the disk if it stays so"
            )

    def _assembled(self, tree: Tree) -> str:
        """The tree's folder on the board, made of hard links under another name and renamed when whole."""
        place = f"{self.folder}/trees/{tree.key}"
        lines = "".join(f"{digest}\t{name}\n" for name, (digest, _) in tree.files.items())
        at, partial = shlex.quote(place), self._at(f"trees/.{secrets.token_hex(8)}")
        script = (
            f"[ -d {at} ] && exit 0\n"
            "while IFS='\t' read -r digest name; do\n"
            f'  file={partial}/"$name"\n'
            f'  mkdir -p "${{file%/*}}" && ln -f {self._at("objects")}/"$digest" "$file" || exit 1\n'
            "done\n"
            # Somebody else may have put the same tree there meanwhile: as good.
            f"mv -T {partial} {at} 2>/dev/null || {{ rm -rf {partial}; [ -d {at} ]; }}"
        )
        done = self._connection.run(script, stdin=lines)
        if done.returncode:
            raise EnvironmentMismatch(
                f"{self._connection.host}: {place} cannot be put together ({done.stderr.strip() or 'no reason given'})"
                f"; rm -r {self.folder} there and run the same command again"
            )
        return place

    def _at(self, path: str) -> str:
        """A path of the store, for the board's shell."""
        return shlex.quote(f"{self.folder}/{path}")


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
