"""What a bundle carries besides the model: our wheel, requirements, plugin sources, self-test, instructions.

README.md                  what a person at the board types, for this bundle's target
wheel/mgvq-….whl           this very package, installed there with --no-deps
requirements-board.txt     what it needs there
plugins/                   sources of the VQ plugins, compiled on the board when no library fits
libraries/                 libraries that were built elsewhere, with libraries.json
selftest.safetensors       small cases with exact answers for the plugins
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import toolchain
from toolchain.bundle.requirements import DISTRIBUTION, distribution_of, requirements
from toolchain.device.runtime.plugin_library import CARRIED, LIBRARY
from toolchain.device.runtime.selftest import FILE, write_cases
from toolchain.errors import InputDataError
from toolchain.files.folders import write_json
from toolchain.native.build import SOURCE_FOLDERS
from toolchain.run.board_readme import instructions
from toolchain.values import BitPlan

TRAINING_LOG = "training_log.jsonl"  # pyproject.toml leaves it out of the wheel, too
PACKAGE = Path(toolchain.__file__).resolve().parent
# What the package imports on a board; lower bounds are the wheel's own.
BOARD_REQUIREMENTS = ("numpy", "pillow", "tokenizers", "safetensors", "jinja2", "typer", "rich", "pydantic")
_JETPACK_7_PYTHON = "3.12"
# CUDA's major version → bindings. They carry the CUDA runtime of their release, which a driver of that release or of a
# newer one runs: so those of the first minor version on any JetPack of ours (12.6 on 6.1, 13.0 on 7.0).
BINDINGS = {12: "cuda-python>=12.6,<12.7", 13: "cuda-python>=13.0,<13.1"}
_WHEEL = "Wheel-Version: 1.0\nGenerator: mgvq\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest a zip knows: equal sources give equal bytes
# Folders that the package's own wheel has inside it, and a checkout beside it: place in the package → in a checkout.
_INCLUDED = {"_targets": "targets", "_plugins": "plugins"}


def write_kit(
    folder: Path, plan: BitPlan, target: Mapping[str, Any], memory: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Path]:
    """Make the kit in the existing folder `folder`; name in the bundle → file or folder.

    Args:
        plan: its codes are the ones that are tested.
        target, memory, settings: target.json, memory.json and processor/host.json of the bundle.
    """
    wheel = write_wheel(folder)
    (folder / "requirements-board.txt").write_text(board_requirements(target), encoding="utf-8")
    codes = {piece.vq_code for layer in plan.layers for piece in layer.pieces}
    write_cases(codes, folder / FILE)
    (folder / "README.md").write_text(instructions(target, memory, settings, wheel.name), encoding="utf-8")
    pieces = {
        f"wheel/{wheel.name}": wheel,
        "requirements-board.txt": folder / "requirements-board.txt",
        FILE: folder / FILE,
        "README.md": folder / "README.md",
    }
    return pieces | plugin_sources()


def plugin_sources() -> dict[str, Path]:
    """plugins/… → source file, from the package's own copy or a checkout; empty where there are none."""
    for folder in SOURCE_FOLDERS:
        if (folder / "CMakeLists.txt").is_file():
            return {f"plugins/{path.relative_to(folder).as_posix()}": path for path in _files(folder)}
    return {}


def carry_libraries(libraries: Mapping[Path, Mapping[str, Any]], folder: Path) -> dict[str, Path]:
    """Pieces for plugin libraries that are built already: file → {"machine", "sm": [...], "tensorrt"}.

    Raises:
        InputDataError: a library does not exist.
    """
    pieces, entries = {}, []
    for number, (path, suits) in enumerate(libraries.items()):
        if not path.is_file():
            raise InputDataError(f"plugin library {path} does not exist; build it, or leave it out of the bundle")
        name = f"libraries/{number}/{LIBRARY}"
        pieces[name] = path
        entries.append({"file": name, **suits})
    if not entries:
        return {}
    write_json(folder / "libraries.json", entries)
    return pieces | {CARRIED: folder / "libraries.json"}


def board_requirements(target: Mapping[str, Any]) -> str:
    """requirements-board.txt: our wheel's own bounds of what runs there, and CUDA's bindings for the target's CUDA.

    Where the target's releases differ in CUDA's major version, the system's Python says which one a board has.
    """
    lines = sorted(line for line in requirements() if distribution_of(line) in BOARD_REQUIREMENTS)
    majors = sorted({int(release["cuda"].split(".")[0]) for release in target["software"]})
    bindings = [BINDINGS[major] for major in majors]
    if len(bindings) == 1:
        return "\n".join([*lines, *bindings]) + "\n"
    by_python = [f"{bindings[0]}; python_version < '{_JETPACK_7_PYTHON}'"]
    by_python += [f"{line}; python_version >= '{_JETPACK_7_PYTHON}'" for line in bindings[1:]]
    comment = f"# JetPack 6 has Python 3.10 and CUDA 12, JetPack 7 has Python {_JETPACK_7_PYTHON} and CUDA 13:"
    return "\n".join([*lines, comment, *by_python]) + "\n"


def write_wheel(folder: Path) -> Path:
    """This package as a wheel in `folder`, the same bytes for the same sources; it installs with `pip install`.

    Made from what is imported, so that a checkout and an installation give the same thing without a build tool.
    """
    package = metadata.distribution(DISTRIBUTION)
    info = f"{DISTRIBUTION}-{package.version}.dist-info"
    contents = {f"toolchain/{path.relative_to(PACKAGE).as_posix()}": path.read_bytes() for path in _files(PACKAGE)}
    for inside, beside in _INCLUDED.items():
        if not (PACKAGE / inside).is_dir() and (PACKAGE.parent / beside).is_dir():
            files = _files(PACKAGE.parent / beside)
            contents |= {
                f"toolchain/{inside}/{path.relative_to(PACKAGE.parent / beside).as_posix()}": path.read_bytes()
                for path in files
            }
    contents[f"{info}/METADATA"] = (package.read_text("METADATA") or "").encode()
    contents[f"{info}/entry_points.txt"] = (package.read_text("entry_points.txt") or "").encode()
    contents[f"{info}/WHEEL"] = _WHEEL.encode()
    record = [f"{name},sha256={_record_hash(data)},{len(data)}" for name, data in sorted(contents.items())]
    contents[f"{info}/RECORD"] = ("\n".join([*record, f"{info}/RECORD,,"]) + "\n").encode()
    path = folder / f"{DISTRIBUTION}-{package.version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in sorted(contents.items()):
            entry = zipfile.ZipInfo(name, _TIME)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return path


def _files(folder: Path) -> list[Path]:
    """All files below a folder but Python's caches, hidden ones and the demo's training log, sorted."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name != TRAINING_LOG
        and not any(part.startswith(".") or part in ("__pycache__", "_lib") for part in path.relative_to(folder).parts)
    ]


def _record_hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def kit_summary(names: Sequence[str]) -> str:
    """What of the kit a bundle with these files has, in words for a progress line, and what it lacks."""
    sources = sum(name.startswith("plugins/") for name in names)
    libraries = sum(name.startswith("libraries/") and name.endswith(LIBRARY) for name in names)
    said = [name.partition("/")[2] for name in names if name.startswith("wheel/")]
    if "plugins/tensorrt/CMakeLists.txt" in names:
        said.append(f"{sources} plugin source files")
    else:
        said.append("no sources of the TensorRT plugin here: the board will need a library")
    return ", ".join([*said, *([f"{libraries} plugin libraries"] if libraries else [])])
