"""Finished pieces of a long run, one file each, so that a killed run goes on where it was and ends in the same bytes.

    FOLDER/KEY/key.json                       what the pieces were made from; KEY is its SHA-256, shortened
    FOLDER/KEY/NAME.DIGEST.safetensors        a piece; DIGEST is its content's SHA-256, shortened

A piece appears whole or not at all, and the one it replaces goes after it has come. One whose content does not have
its digest is made again, or refused where what it took to make is worth a word (`get`). A run of other settings has a
folder of its own beside it: what one run has made, no other one removes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from toolchain.errors import InputDataError, UsageError
from toolchain.files.folders import write_json

KEY_FILE = "key.json"
DIGEST_LENGTH = 16
SHORT_KEY = 8
LONGEST_VALUES = 60  # characters of two differing values; digests and lists are left out
RESUME = ("auto", "required", "never")
TEXT = "json"  # metadata key of what is not a tensor


class ObjectStore:
    """The pieces of one run in a folder, which is made with the first of them."""

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self.folder, self._key = folder, key

    @classmethod
    def open(
        cls, folder: Path, key: dict[str, Any], resume: str = "auto", note: Callable[[str], None] | None = None
    ) -> ObjectStore:
        """The store for `key` in a folder of stores: what is there where it was made from the same, else an empty one.

        Args:
            key: JSON-clean; everything the pieces depend on.
            resume: "auto" goes on where it can, "required" refuses to begin anew, "never" begins anew.
            note: told of every run of other settings that was stopped here, when this one begins anew.

        Raises:
            UsageError: another word than these.
            InputDataError: `resume` is "required" and there is nothing to go on with, or the key.json of this key is
                another's or no JSON object.
        """
        if resume not in RESUME:
            raise UsageError(f"resume {resume!r}: expected one of {', '.join(RESUME)}")
        store = cls(folder / _digest(json.dumps(key, sort_keys=True).encode())[:SHORT_KEY], key)
        is_there = store._is_there()
        others = {} if is_there and resume != "never" else _others(folder, store.folder, key)
        if resume == "required" and not is_there:
            raise InputDataError(
                f"nothing to resume at {folder}: expected a run of the same settings, "
                + (
                    "; ".join(f"{path.name} differs in {differs}" for path, differs in others.items())
                    or "there is none"
                )
                + "; give its settings again, or start this one with --resume auto"
            )
        if resume == "never":
            shutil.rmtree(store.folder, ignore_errors=True)
        for path, differs in others.items():
            if note:
                note(
                    f"{path} holds the pieces of a run that was stopped and differs in {differs}; they stay, and this "
                    f"run begins anew beside them. To go on with them give their settings again; else remove {path}"
                )
        return store

    def _is_there(self) -> bool:
        """Whether a run of this key has pieces here."""
        path = self.folder / KEY_FILE
        if not path.is_file():
            return False
        if (found := _key_of(path)) != self._key:
            wrong = "none" if found is None else f"another in {', '.join(_differing(found, self._key))}"
            raise InputDataError(
                f"{path}: expected a JSON object, the key that {self.folder.name} is the digest of, found {wrong}; "
                f"something changed it: remove {self.folder} to begin anew"
            )
        return True

    def get(self, name: str, *, refuses_damage: bool = False) -> tuple[dict[str, Tensor], Any] | None:
        """(tensors, JSON value) of a piece, or None where it was not finished. The newest, where a kill left two.

        Raises:
            InputDataError: the content has changed since it was written, and `refuses_damage`; removed otherwise.
        """
        for path in sorted(self._files(name), key=lambda path: path.stat().st_mtime_ns, reverse=True):
            content = path.read_bytes()
            written, found = path.name.split(".")[-2], _digest(content)
            if written == found:
                tensors = load(content)
                size = int.from_bytes(content[:8], "little")
                text = json.loads(content[8 : 8 + size]).get("__metadata__", {}).get(TEXT, "null")
                return tensors, json.loads(text)
            if refuses_damage:
                raise InputDataError(
                    f"{path}: expected content of SHA-256 {written}…, found {found}…; something changed the file after "
                    "it was written: delete it, and what it holds is made again from the start"
                )
            path.unlink()
        return None

    def put(self, name: str, tensors: dict[str, Tensor], value: Any = None) -> None:
        """Keep a piece; what was kept under its name goes."""
        if not (self.folder / KEY_FILE).is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / KEY_FILE, self._key)
        content = save({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, {TEXT: json.dumps(value)})
        path = self.folder / f"{name}.{_digest(content)}.safetensors"
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(content)
        os.replace(temporary, path)
        for old in self._files(name):
            if old != path:
                old.unlink()

    def drop(self, name: str) -> None:
        """Remove a piece, where there is one."""
        for path in self._files(name):
            path.unlink()

    def get_or_make(
        self, name: str, make: Callable[[], tuple[dict[str, Tensor], Any]]
    ) -> tuple[dict[str, Tensor], Any]:
        """The piece of that name, made now where it is not there."""
        found = self.get(name)
        if found is None:
            tensors, value = make()
            self.put(name, tensors, value)
            found = tensors, json.loads(json.dumps(value))
        return found

    def under(self, prefix: str) -> Pieces:
        """The pieces whose names begin with the prefix and a dot, to be named without them."""
        return Pieces(self, prefix)

    def clear(self, prefix: str) -> None:
        """Remove all pieces whose names begin with the prefix and a dot, and what a kill left of them."""
        for path in self.folder.glob(f"{prefix}.*"):
            path.unlink()

    def _files(self, name: str) -> list[Path]:
        """NAME.DIGEST.safetensors, not those of names that begin with NAME and a dot."""
        exact = f"{name}.{'?' * DIGEST_LENGTH}.safetensors"
        return sorted(path for path in self.folder.glob(exact) if path.name.count(".") == name.count(".") + 2)

    def discard(self) -> None:
        """Remove everything: the run is done. The folder of stores goes with the last of them."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.parent.is_dir() and not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()


@dataclass(frozen=True)
class Pieces:
    """The pieces of one part of a run, gone when that is done: those whose names begin alike in a store."""

    store: ObjectStore
    prefix: str

    def get(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        """As the store's."""
        return self.store.get(f"{self.prefix}.{name}")

    def wanted(self, name: str) -> tuple[dict[str, Tensor], Any]:
        """A piece that this run has put or found.

        Raises:
            InputDataError: it is damaged, or gone since then.
        """
        found = self.store.get(f"{self.prefix}.{name}", refuses_damage=True)
        if found is None:
            raise InputDataError(
                f"{self.store.folder}: expected piece {self.prefix}.{name}, which this run has kept there, found none; "
                "something removed it: start the run again, and it is made again"
            )
        return found

    def put(self, name: str, tensors: dict[str, Tensor], value: Any = None) -> None:
        """As the store's."""
        self.store.put(f"{self.prefix}.{name}", tensors, value)

    def get_or_make(
        self, name: str, make: Callable[[], tuple[dict[str, Tensor], Any]]
    ) -> tuple[dict[str, Tensor], Any]:
        """As the store's."""
        return self.store.get_or_make(f"{self.prefix}.{name}", make)

    def drop(self, name: str) -> None:
        """As the store's."""
        self.store.drop(f"{self.prefix}.{name}")

    def clear(self) -> None:
        """Remove all of them."""
        self.store.clear(self.prefix)


def _others(folder: Path, own: Path, key: dict[str, Any]) -> dict[Path, str]:
    """Stores of other keys in a folder → what they differ in."""
    found = {}
    for path in sorted(folder.glob(f"*/{KEY_FILE}")):
        if path.parent != own:
            other = _key_of(path)
            found[path.parent] = "a damaged key.json" if other is None else ", ".join(_differing(other, key))
    return found


def _key_of(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGEST_LENGTH]


def _differing(found: dict[str, Any], key: dict[str, Any], of: str = "") -> list[str]:
    """What two keys differ in, "limits.bits (2.0, now 2.25)"; long values without them."""
    names = []
    for name in sorted({*found, *key}):
        old, new = found.get(name), key.get(name)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            names += _differing(old, new, f"{of}{name}.")
            continue
        values = f" ({json.dumps(old)}, now {json.dumps(new)})"
        names.append(f"{of}{name}" + (values if len(values) <= LONGEST_VALUES else ""))
    return names
