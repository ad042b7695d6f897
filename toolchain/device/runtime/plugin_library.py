"""The library with the VQ plugins: given, carried by the bundle, or compiled here from the bundle's sources.

plugins/                     sources, in the bundle
libraries/libraries.json     [{"file", "machine", "sm": ["87"], "tensorrt": "10.3"}], what was built elsewhere
libmgvq_plugin.so            beside the engines, with plugin.json: what it was made from, so that it is made once
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from toolchain.bundle.manifest import Bundle
from toolchain.bundle.requirements import version_key
from toolchain.errors import EnvironmentMismatch, InputDataError
from toolchain.files.folders import sha256_file, write_json
from toolchain.native.build import find_nvcc, missing_tools
from toolchain.values import Progress

LIBRARY = "libmgvq_plugin.so"
RECORD = "plugin.json"
SOURCES = "plugins"
CARRIED = "libraries/libraries.json"
TARGET = "mgvq_plugin"
CREATORS = ("VQLinear", "VQEmbedding")
_NO_HEADERS = "mgvq plugin: not built, no TensorRT headers"  # plugins/tensorrt/CMakeLists.txt


@dataclass(frozen=True)
class Wanted:
    """What a library must suit: the processor, the GPU's compute capability, and TensorRT's version."""

    machine: str
    sm: str
    tensorrt: str


@dataclass(frozen=True)
class PluginLibrary:
    """A library for this board. `origin` is "given", "bundle", "compiled" or "compiled before"."""

    path: Path
    sha256: str
    origin: str

    def to_json(self) -> dict[str, str]:
        return {"file": LIBRARY, "sha256": self.sha256, "origin": self.origin}


def prepare_library(
    bundle: Bundle, given: Path | None, wanted: Wanted, before: Path, out: Path, progress: Progress
) -> PluginLibrary:
    """The library, put into the folder `out`; the first there is of: given, carried, in the folder `before`, compiled.

    Raises:
        InputDataError: `given` does not exist, or the bundle's list of libraries is broken.
        EnvironmentMismatch: there is none, and the bundle's sources cannot be compiled here.
    """
    if given is not None and not given.is_file():
        raise InputDataError(f"plugin library {given} does not exist; leave --plugin out to have it compiled")
    key = _source_key(bundle, wanted)
    places = {"given": given, "bundle": carried_library(bundle, wanted), "compiled before": _before(before, key)}
    for origin, path in places.items():
        if path is not None:
            shutil.copyfile(path, out / LIBRARY)
            sha256 = sha256_file(out / LIBRARY)
            if origin == "compiled before":
                write_json(out / RECORD, key | {"sha256": sha256})
            return PluginLibrary(out / LIBRARY, sha256, origin)
    compile_library(bundle, wanted, out / LIBRARY, progress)
    write_json(out / RECORD, key | {"sha256": sha256_file(out / LIBRARY)})
    return PluginLibrary(out / LIBRARY, sha256_file(out / LIBRARY), "compiled")


def carried_library(bundle: Bundle, wanted: Wanted) -> Path | None:
    """The bundle's library for this board, None where it has none that fits; its hash is the manifest's.

    Raises:
        InputDataError: the list is broken.
    """
    if CARRIED not in bundle.files:
        return None
    try:
        entries = bundle.read_json(CARRIED)
        for entry in entries:
            same = entry["machine"] == wanted.machine and wanted.sm in entry["sm"]
            if same and version_key(entry["tensorrt"])[:2] == version_key(wanted.tensorrt)[:2]:
                return bundle.path(entry["file"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputDataError(
            f"bundle file {CARRIED}: expected file, machine, sm and tensorrt of every library ({error!r}); make the "
            "bundle again"
        ) from None
    return None


def compile_library(bundle: Bundle, wanted: Wanted, out: Path, progress: Progress) -> None:
    """Compile the bundle's plugin sources for one compute capability; the library goes to `out`.

    Raises:
        EnvironmentMismatch: the bundle has no sources, a tool is missing, or the compilation fails; it has the command.
    """
    sources = bundle.folder / SOURCES
    configure, make = _commands(sources, Path("build"), wanted.sm)
    by_hand = f"by hand: {' '.join(configure)} && {' '.join(make)}, then --plugin build/…/{LIBRARY}"
    if f"{SOURCES}/tensorrt/CMakeLists.txt" not in bundle.files:
        raise EnvironmentMismatch(
            f"no plugin library fits this board ({wanted.machine}, SM {wanted.sm}, TensorRT {wanted.tensorrt}) and the "
            f"bundle has no plugin sources to compile; give --plugin {LIBRARY}, or make the bundle again from an mgvq "
            "that carries them"
        )
    if missing := missing_tools():
        raise EnvironmentMismatch(
            f"no plugin library fits this board and it cannot be compiled here; missing: "
            f"{'; '.join(missing)}; {by_hand}"
        )
    with tempfile.TemporaryDirectory(prefix="mgvq-plugin-") as scratch:
        configure, make = _commands(sources, Path(scratch), wanted.sm)
        progress.stage(f"  compiling the plugin for SM {wanted.sm}; this takes minutes")
        for command in (configure, make):
            done = subprocess.run(command, capture_output=True, text=True)
            if _NO_HEADERS in done.stdout:
                raise EnvironmentMismatch(
                    "compiling the plugin: TensorRT's headers were not found; sudo apt install libnvinfer-headers-dev, "
                    f"or {by_hand} with -DTENSORRT_INCLUDE_DIR= of the folder that has them"
                )
            if done.returncode:
                last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-20:])
                raise EnvironmentMismatch(
                    f"compiling the plugin: {' '.join(command[:2])} failed with exit code {done.returncode}:\n{last}\n"
                    f"{by_hand}"
                )
        built = sorted(Path(scratch).rglob(LIBRARY))
        if not built:
            raise EnvironmentMismatch(f"compiling the plugin made no {LIBRARY}; make the bundle again; {by_hand}")
        shutil.copyfile(built[0], out)


def keep_compiled(library: PluginLibrary, folder: Path) -> None:
    """Copy a library that was compiled, with its record, to `folder` at once: whatever fails later, it is made once."""
    if library.origin != "compiled":
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in (LIBRARY, RECORD):
        shutil.copyfile(library.path.parent / name, folder / name)


def load_into(trt: ModuleType, log: Any, library: Path) -> None:
    """Load a plugin library and register its creators in the empty namespace.

    Raises:
        EnvironmentMismatch: it does not load, this process has creators of these names already, or they are not there
            afterwards.
    """
    registry = trt.get_plugin_registry()
    handle, said = registry.load_library(os.fspath(library.resolve())), log.last()
    # Asked for afterwards alone: TensorRT logs an error for a name that is not there.
    registered = [name for name in CREATORS if registry.get_creator(name, "1", "") is not None]
    if handle is None and registered:
        raise EnvironmentMismatch(
            f"plugin library {library}: this process has registered {registered[0]} already, and TensorRT keeps the "
            "first of a name; start a new process for each library"
        )
    if handle is None:
        raise EnvironmentMismatch(
            f"plugin library {library} does not load ({said}); build it against this TensorRT ({trt.__version__})"
        )
    if missing := sorted(set(CREATORS) - set(registered)):
        raise EnvironmentMismatch(
            f"plugin library {library}: expected creators of {', '.join(missing)}, version 1, empty namespace, found "
            "none; build it from the bundle's sources"
        )


def _commands(sources: Path, build: Path, sm: str) -> tuple[list[str], list[str]]:
    nvcc = find_nvcc()
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DMGVQ_BUILD_CUDA=ON", "-DBUILD_TESTING=OFF"]
    options += [f"-DCMAKE_CUDA_ARCHITECTURES={sm}-real", *([f"-DCMAKE_CUDA_COMPILER={nvcc}"] if nvcc else [])]
    # At most four compilers at once: a board of eight GB has to hold them all.
    jobs = max(1, min(os.cpu_count() or 1, 4))
    configure = ["cmake", "-S", str(sources), "-B", str(build), *options]
    return configure, ["cmake", "--build", str(build), "--target", TARGET, "--parallel", str(jobs)]


def _source_key(bundle: Bundle, wanted: Wanted) -> dict[str, Any]:
    """What a compiled library depends on."""
    hashes: Mapping[str, Any] = bundle.manifest["files"]
    lines = [f"{name} {hashes[name]['sha256']}" for name in bundle.names_under(SOURCES)]
    return {"sources": hashlib.sha256("\n".join(lines).encode()).hexdigest(), **asdict(wanted)}


def _before(folder: Path, key: Mapping[str, Any]) -> Path | None:
    """The library an earlier build compiled from the same sources for the same board, if it is still what it was."""
    record, library = folder / RECORD, folder / LIBRARY
    if not (record.is_file() and library.is_file()):
        return None
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return library if found == {**key, "sha256": sha256_file(library)} else None
