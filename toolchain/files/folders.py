"""Files that appear whole or not at all: folders, JSON objects, digests. Standard library only."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from toolchain.errors import InputDataError, UsageError


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        InputDataError: the file cannot be read, is not JSON, or holds something other than an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputDataError(f"{path}: not JSON ({error}); copy or download it again") from None
    if not isinstance(data, dict):
        raise InputDataError(f"{path}: expected a JSON object, found {type(data).__name__}; copy or download it again")
    return data


def check_output(out: Path) -> None:
    """Refuse an output folder that could not be written whole: one with content, and what `check_place` refuses.

    Raises:
        UsageError: with what is in the way.
    """
    if out.is_dir() and any(out.iterdir()):
        raise UsageError(f"output {out}: the folder is not empty; name a new one, or empty it")
    check_place(out)


def check_place(out: Path) -> None:
    """Refuse a path where no folder can be: a file, under a file, or where nothing can be made.

    The last is tried and undone: permissions do not tell of read-only disks, quotas and root.

    Raises:
        UsageError: with what is in the way.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"output {out}: is a file; name a folder")
    above = next(parent for parent in out.absolute().parents if parent.exists())
    if not above.is_dir():
        raise UsageError(f"output {out}: {above} is a file; name a path under a folder")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=f".{out.name}.", dir=above))
    except OSError as error:
        raise UsageError(
            f"output {out}: {above} cannot be written to ({error.strerror}); name a folder that can be"
        ) from None


@contextmanager
def staged_folder(out: Path | str) -> Iterator[Path]:
    """A temporary sibling of `out` to write into: becomes `out` when the context ends well, is removed otherwise.

    Raises:
        UsageError: `out` is in use (see `check_output`); nothing has been touched then.
    """
    out = Path(out)
    check_output(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        yield temporary
        share_files(temporary)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def share_files(folder: Path) -> None:
    """Give a folder and all in it the permissions new files have here: mkdtemp and safetensors make theirs private."""
    mask = _umask()
    folder.chmod(0o777 & ~mask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _umask() -> int:
    """The process's file mode mask; there is no way to read it but to set it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, data: Any) -> None:
    """Write `data` as indented JSON; a reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=2, sort_keys=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
