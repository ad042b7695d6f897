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
from toolchain.device.plugin_library import CARRIED, LIBRARY
from toolchain.device.selftest import FILE, write_cases
from toolchain.errors import InputDataError
from toolchain.kernels.build import SOURCE_FOLDERS
from toolchain.values import BitPlan, write_json

DISTRIBUTION = "mgvq"
PACKAGE = Path(toolchain.__file__).resolve().parent
# What the package imports on a board; lower bounds are the wheel's own.
BOARD_REQUIREMENTS = ("numpy", "pillow", "tokenizers", "safetensors", "jinja2", "typer", "rich", "pydantic")
_WHEEL = "Wheel-Version: 1.0\nGenerator: mgvq\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest a zip knows: equal sources give equal bytes
# Folders that the package's own wheel has inside it, and a checkout beside it: place in the package → in a checkout.
_INCLUDED = {"_targets": "targets", "_plugins": "plugins"}


def write_kit(folder: Path, plan: BitPlan, target: Mapping[str, Any], memory: Mapping[str, Any]) -> dict[str, Path]:
    """Make the kit in the existing folder `folder`; name in the bundle → file or folder.

    Args:
        plan: its codes are the ones that are tested.
        target, memory: target.json and memory.json of the bundle.
    """
    wheel = write_wheel(folder)
    (folder / "requirements-board.txt").write_text(board_requirements(target), encoding="utf-8")
    codes = {piece.vq_code for layer in plan.layers for piece in layer.pieces}
    write_cases(codes, folder / FILE)
    (folder / "README.md").write_text(instructions(target, memory, wheel.name), encoding="utf-8")
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
    """requirements-board.txt: our wheel's own bounds of what runs there, and CUDA's bindings for the target's CUDA."""
    needed = metadata.requires(DISTRIBUTION) or []
    lines = [line for line in needed if _name(line) in BOARD_REQUIREMENTS and "extra ==" not in line]
    majors = sorted({int(release["cuda"].split(".")[0]) for release in target["software"]})
    # Bindings of a newer CUDA than the driver's do not load.
    bindings = ["cuda-python>=12.6,<13" if major < 13 else f"cuda-python>={major},<{major + 1}" for major in majors]
    comment = "" if len(bindings) == 1 else "# choose by the CUDA of your JetPack (cat /usr/local/cuda/version.json):\n"
    rest = "".join(f"# {line}\n" for line in bindings[1:])
    return "\n".join(sorted(lines)) + f"\n{comment}{bindings[0]}\n{rest}"


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


def instructions(target: Mapping[str, Any], memory: Mapping[str, Any], wheel: str) -> str:
    """README.md of a bundle: what a person at the board types, with this target's releases and this plan's figures."""
    releases = "\n".join(
        f"* JetPack {x['jetpack']}: {'L4T ' + x['l4t'] + ', ' if x['l4t'] else ''}TensorRT {x['tensorrt']}, "
        f"CUDA {x['cuda']}"
        for x in target["software"]
    )
    peak, build, block = (_mib(memory[key]) for key in ("peak_bytes", "build_peak_bytes", "largest_block_bytes"))
    return _INSTRUCTIONS.format(
        title=target["title"],
        sm=target["sm"],
        releases=releases,
        peak=peak,
        build=build,
        block=block,
        what=memory["largest_block"],
        context=memory["workload"]["context_tokens"],
        cma=_cma_advice(target, memory["largest_block_bytes"]),
        wheel=wheel,
    )


_INSTRUCTIONS = """\
# A vision-language model for {title}

Made by mgvq. Every file here is listed with its hash in manifest.json; nothing in this folder is changed by using it.

## What the board needs

One of (SM {sm}):

{releases}

Memory, by the plan in memory.json (estimated, not measured): {peak} while it runs, {build} while it builds, the largest
single block {block} ({what}). Context: {context} tokens, pictures and answer included.

{cma}
Without a desktop there is more memory:

    sudo systemctl isolate multi-user.target        # until the next reboot

## Install, once

    sudo apt install nvidia-jetpack python3-libnvinfer python3-venv cmake
    python3 -m venv --system-site-packages ~/mgvq   # system packages: TensorRT's Python module is one
    ~/mgvq/bin/pip install -r requirements-board.txt
    ~/mgvq/bin/pip install --no-deps wheel/{wheel}
    ~/mgvq/bin/mgvq doctor

## Build, once per board and JetPack

    ~/mgvq/bin/mgvq build . -o ~/engines

It checks this folder, the board, memory and the plugins before it builds, and says what to change where it refuses. The
plugins are compiled first (minutes) unless libraries/ has one that fits. Engines run on the board and the TensorRT
that built them, and nowhere else.

## Run

    ~/mgvq/bin/mgvq run . --backend tensorrt --engines ~/engines --image PICTURE --prompt QUESTION --stream
    ~/mgvq/bin/mgvq chat . --backend tensorrt --engines ~/engines --image PICTURE

## Where it stops

| exit code | it means |
|---|---|
| 4 | the plugins do not compute what they should: do not use them; report it |
| 5 | it does not fit memory: the message says what to turn down |
| 6 | JetPack, TensorRT, CUDA, a compiler or a library is missing or of another version |
| 7 | a file of this folder is not what it was: copy it again |
"""


def _cma_advice(target: Mapping[str, Any], block: int) -> str:
    default, most = target["largest_block_default_bytes"], target["largest_block_bytes"]
    if block <= default:
        return f"The kernel's contiguous pool of {_mib(default)} is enough as it is.\n"
    megabytes = min(-(-block * 5 // (4 * 2**20)), most // 2**20)
    return (
        f"The largest block is more than the kernel's contiguous pool of {_mib(default)}. Add `cma={megabytes}M` to "
        "the line APPEND in\n/boot/extlinux/extlinux.conf and reboot; `grep Cma /proc/meminfo` shows what came of it.\n"
    )


def _files(folder: Path) -> list[Path]:
    """All files below a folder but Python's caches and hidden ones, sorted."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") or part in ("__pycache__", "_lib") for part in path.relative_to(folder).parts)
    ]


def _record_hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def _name(requirement: str) -> str:
    """The distribution's name of a requirement line, lower case."""
    end = next((i for i, letter in enumerate(requirement) if letter in "<>=!~[; "), len(requirement))
    return requirement[:end].lower()


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


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
