"""Finished pieces of a long run, one file each, so that a killed run goes on where it was and ends in the same bytes.

    FOLDER/key.json                       what the pieces were made from; another key is another run
    FOLDER/NAME.DIGEST.safetensors        a piece; DIGEST is its content's SHA-256, shortened

A piece appears whole or not at all. One whose content does not have its digest is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from toolchain.errors import InputDataError, UsageError
from toolchain.values import write_json

KEY_FILE = "key.json"
DIGEST_LENGTH = 16
RESUME = ("auto", "required", "never")
TEXT = "json"  # metadata key of what is not a tensor


class ObjectStore:
    """The pieces of one run in a folder, which is made with the first of them."""

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self.folder, self._key = folder, key

    @classmethod
    def open(cls, folder: Path, key: dict[str, Any], resume: str = "auto") -> ObjectStore:
        """The store for `key`: what is there where it was made from the same, else an empty one.

        Args:
            key: JSON-clean; everything the pieces depend on.
            resume: "auto" goes on where it can, "required" refuses to begin anew, "never" begins anew.

        Raises:
            UsageError: another word than these.
            InputDataError: `resume` is "required" and there is nothing to go on with.
        """
        if resume not in RESUME:
            raise UsageError(f"resume {resume!r}: expected one of {', '.join(RESUME)}")
        path = folder / KEY_FILE
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        if resume == "required" and found != key:
            differs = "there is none" if found is None else f"it differs in {', '.join(_differing(found, key))}"
            raise InputDataError(
                f"nothing to resume at {folder}: expected a run of the same settings, {differs}; start it with "
                "--resume auto"
            )
        if found != key or resume == "never":
            shutil.rmtree(folder, ignore_errors=True)
        return cls(folder, key)

    def get(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        """(tensors, JSON value) of a piece, or None where it was not finished."""
        for path in self._files(name):
            content = path.read_bytes()
            if path.name.split(".")[-2] == _digest(content):
                tensors = load(content)
                size = int.from_bytes(content[:8], "little")
                text = json.loads(content[8 : 8 + size]).get("__metadata__", {}).get(TEXT, "null")
                return tensors, json.loads(text)
            path.unlink()
        return None

    def put(self, name: str, tensors: dict[str, Tensor], value: Any = None) -> None:
        """Keep a piece; what was kept under its name goes."""
        if not (self.folder / KEY_FILE).is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / KEY_FILE, self._key)
        content = save({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, {TEXT: json.dumps(value)})
        for old in self._files(name):
            old.unlink()
        path = self.folder / f"{name}.{_digest(content)}.safetensors"
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(content)
        os.replace(temporary, path)

    def made(self, name: str, make: Callable[[], tuple[dict[str, Tensor], Any]]) -> tuple[dict[str, Tensor], Any]:
        """The piece of that name, made now where it is not there."""
        found = self.get(name)
        if found is None:
            tensors, value = make()
            self.put(name, tensors, value)
            found = tensors, json.loads(json.dumps(value))
        return found

    def _files(self, name: str) -> list[Path]:
        """NAME.DIGEST.safetensors, not those of names that begin with NAME and a dot."""
        exact = f"{name}.{'?' * DIGEST_LENGTH}.safetensors"
        return sorted(path for path in self.folder.glob(exact) if path.name.count(".") == name.count(".") + 2)

    def discard(self) -> None:
        """Remove everything: the run is done."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGEST_LENGTH]


def _differing(found: dict[str, Any], key: dict[str, Any]) -> list[str]:
    return sorted(name for name in {*found, *key} if found.get(name) != key.get(name))
