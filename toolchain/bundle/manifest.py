"""The bundle: one folder for one target that explains itself, every file listed with its hash in manifest.json.

    manifest.json   {"format": "mgvq-bundle", "format_version", "op_version", "tool_version", "target", "created_from",
                     "files": {path: {"sha256", "bytes"}}, "manifest_sha256": hash of all of this but itself}

Written under a temporary sibling and renamed, so that it is there whole or not at all. Opened only if every hash holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from toolchain import __version__
from toolchain.errors import InputDataError, UsageError
from toolchain.files.folders import sha256_file, write_json
from toolchain.values import FORMAT_VERSION

MANIFEST = "manifest.json"
BUNDLE_FORMAT = "mgvq-bundle"
BUNDLE_VERSION = 1
_KEYS = {"format", "format_version", "op_version", "tool_version", "target", "created_from", "files", "manifest_sha256"}


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: every listed file was there and had its hash."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def files(self) -> tuple[str, ...]:
        """Names of all files, sorted, with forward slashes."""
        return tuple(sorted(self.manifest["files"]))

    @property
    def bytes(self) -> int:
        return sum(entry["bytes"] for entry in self.manifest["files"].values())

    def path(self, name: str) -> Path:
        """The file called `name`.

        Raises:
            InputDataError: the bundle has no such file.
        """
        if name not in self.manifest["files"]:
            raise InputDataError(
                f"bundle {self.folder} has no {name}; make it again with this version of mgvq ({__version__})"
            )
        return self.folder / name

    def read_json(self, name: str) -> Any:
        return json.loads(self.path(name).read_text(encoding="utf-8"))

    def names_under(self, prefix: str, suffix: str = "") -> tuple[str, ...]:
        """Files below a folder such as "portable", in sorted order."""
        return tuple(name for name in self.files if name.startswith(prefix + "/") and name.endswith(suffix))


def write_bundle(
    pieces: Mapping[str, Path],
    out: Path,
    *,
    target: dict[str, Any] | None = None,
    created_from: dict[str, Any] | None = None,
) -> Bundle:
    """Copy `pieces` (name in the bundle → file, or folder with all below it) into a new bundle at `out`.

    An older bundle at `out` is replaced once the new one is complete. The same pieces give the same bytes.

    Raises:
        InputDataError: a piece does not exist, or a name is absolute, leaves the bundle or is given twice.
        UsageError: `out` is, or lies under, something that is not a bundle folder.
    """
    _check_place(out)
    files = _listed(pieces)
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        entries = {name: _copy(source, building / name) for name, source in sorted(files.items())}
        manifest = {
            "format": BUNDLE_FORMAT,
            "format_version": BUNDLE_VERSION,
            "op_version": FORMAT_VERSION,
            "tool_version": __version__,
            "target": target,
            "created_from": created_from or {},
            "files": entries,
        }
        write_json(building / MANIFEST, manifest | {"manifest_sha256": _manifest_hash(manifest)})
        building.chmod(0o755)  # mkdtemp makes it private
        _put_in_place(building, out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return Bundle(out, json.loads((out / MANIFEST).read_text(encoding="utf-8")))


def open_bundle(folder: Path) -> Bundle:
    """The bundle at `folder`, every byte of it checked.

    Raises:
        InputDataError: not a bundle, a newer format, or a file is missing, not listed, or not what the manifest says.
    """
    manifest = _read_manifest(folder)
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()} - {MANIFEST}
    listed = set(manifest["files"])
    if missing := sorted(listed - present):
        raise InputDataError(f"bundle {folder}: {_some(missing)} missing; copy the bundle again")
    if extra := sorted(present - listed):
        raise InputDataError(
            f"bundle {folder}: {_some(extra)} not listed in {MANIFEST}; move it out, or copy the bundle again"
        )
    for name, entry in sorted(manifest["files"].items()):
        _check_file(folder / name, name, entry)
    return Bundle(folder, manifest)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        inside = folder / "bundle"  # where a run folder has it
        meant = inside if (inside / MANIFEST).is_file() else "the folder `mgvq bundle` wrote"
        raise InputDataError(f"{folder}: expected a bundle folder with {MANIFEST}, found none; give {meant}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputDataError(f"{path} is damaged ({error}); copy the bundle again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != BUNDLE_FORMAT:
        raise InputDataError(f"{path} is not a bundle's manifest; give the folder `mgvq bundle` wrote")
    if manifest.get("format_version") != BUNDLE_VERSION:
        found = manifest.get("format_version")
        raise InputDataError(
            f"{path}: format version {BUNDLE_VERSION} expected, {found} found; install the mgvq that wrote it"
        )
    content = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    expected, found = str(manifest.get("manifest_sha256")), _manifest_hash(content)
    if set(manifest) != _KEYS or expected != found:
        raise InputDataError(f"{path}: expected hash {expected[:12]}, found {found[:12]}; copy the bundle again")
    for name in manifest["files"]:
        _check_name(name)
    return manifest


def _check_file(path: Path, name: str, entry: dict[str, Any]) -> None:
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise InputDataError(
            f"bundle file {name}: expected {entry['bytes']:,} bytes, found {size:,}; copy the bundle again"
        )
    found = sha256_file(path)
    if found != entry["sha256"]:
        expected = entry["sha256"][:12]
        raise InputDataError(f"bundle file {name}: expected hash {expected}, found {found[:12]}; copy the bundle again")


def _manifest_hash(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _check_place(out: Path) -> None:
    for parent in out.parents:
        if parent.exists() and not parent.is_dir():
            raise UsageError(f"output {out}: {parent} is a file; choose another folder")
    if out.exists() and not (out.is_dir() and ((out / MANIFEST).is_file() or not any(out.iterdir()))):
        raise UsageError(f"output {out} exists and is not a bundle; choose a new folder")


def _listed(pieces: Mapping[str, Path]) -> dict[str, Path]:
    """Every single file by its name in the bundle."""
    files: dict[str, Path] = {}
    for name, source in pieces.items():
        if source.is_dir():
            below = [path for path in sorted(source.rglob("*")) if path.is_file()]
            found = {f"{name}/{path.relative_to(source).as_posix()}": path for path in below}
        elif source.is_file():
            found = {name: source}
        else:
            raise InputDataError(f"bundle piece {name}: {source} does not exist; run the stage that makes it")
        for each in found:
            _check_name(each)
            if each in files:
                raise InputDataError(f"bundle piece {each} is given twice: {files[each]} and {found[each]}")
        files |= found
    return files


def _check_name(name: str) -> None:
    parts = PurePosixPath(name)
    if not name or parts.is_absolute() or ".." in parts.parts or "\\" in name or name == MANIFEST:
        raise InputDataError(f"bundle file name {name!r}: expected a path inside the bundle, other than {MANIFEST}")


def _copy(source: Path, place: Path) -> dict[str, Any]:
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, place)
    return {"sha256": sha256_file(place), "bytes": place.stat().st_size}


def _put_in_place(building: Path, out: Path) -> None:
    """Rename `building` to `out`; a bundle that was there is moved aside first and removed afterwards."""
    if not out.exists():
        os.replace(building, out)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
    os.replace(out, aside / out.name)
    os.replace(building, out)
    shutil.rmtree(aside)


def _some(names: list[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"
