#!/usr/bin/env python3
"""Compiles the TensorRT shell against several sets of TensorRT's headers and says which compile.

    python plugins/compile_plugin.py INCLUDE_FOLDER... [--cuda-include FOLDER] [--compiler g++]

Each folder holds NvInferRuntime.h of one version. Every source of plugins/tensorrt is compiled with -Wall
-Wextra -Werror;
nothing is linked and nothing runs, so it needs neither TensorRT nor a GPU. Exit status 0 if all compiled.

Standard library alone: it is run on boards and on machines without the package.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

PLUGINS = Path(__file__).resolve().parent
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")
CUDA_PLACES = ("/usr/local/cuda/include", "/usr/include")
SHOWN_LINES = 20


@dataclass(frozen=True)
class Outcome:
    """Of one folder: the version in its headers ("none" without), seconds, and what the compiler said if it refused."""

    folder: Path
    version: str
    seconds: float
    errors: str

    @property
    def is_ok(self) -> bool:
        return not self.errors


def header_version(folder: Path) -> str:
    """The version that NvInferVersion.h in `folder` defines, such as "10.3.0"; "none" where there is none.

    NV_TENSORRT_MAJOR is a number in some releases and the name of another macro that is one in others.
    """
    path = folder / "NvInferVersion.h"
    if not path.is_file():
        return "none"
    defined = dict(re.findall(r"#define\s+(\w+)\s+(\w+)", path.read_text(encoding="utf-8", errors="replace")))
    numbers = [defined.get(f"NV_TENSORRT_{part}", "?") for part in ("MAJOR", "MINOR", "PATCH")]
    return ".".join(defined.get(number, number) for number in numbers)


def compile_against(folder: Path, cuda_include: Path, compiler: str) -> Outcome:
    """Every source of the shell, against the headers of one folder; stops at the first that does not compile."""
    begin = time.monotonic()
    version, errors = header_version(folder), ""
    if version == "none":
        errors = f"{folder}: expected TensorRT's headers, found no NvInferVersion.h"
    includes = [f"-I{PLUGINS}", "-isystem", str(folder), "-isystem", str(cuda_include)]
    with tempfile.TemporaryDirectory(prefix="mgvq-compile-") as scratch:
        for source in [] if errors else sorted((PLUGINS / "tensorrt").glob("*.cpp")):
            output = str(Path(scratch) / f"{source.stem}.o")
            done = subprocess.run(
                [compiler, *FLAGS, *includes, "-c", str(source), "-o", output], capture_output=True, text=True
            )
            if done.returncode:
                errors = done.stderr or f"{compiler} ended with {done.returncode}"
                break
    return Outcome(folder, version, time.monotonic() - begin, errors)


def table(outcomes: list[Outcome]) -> str:
    """One line a folder: version, ok or FAILED, seconds, folder."""
    rows = [("TensorRT", "shell", "seconds", "headers")]
    rows += [(x.version, "ok" if x.is_ok else "FAILED", f"{x.seconds:.1f}", str(x.folder)) for x in outcomes]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[3]]) for row in rows)


def main(arguments: list[str]) -> int:
    """0 if the shell compiled against every folder, 1 if not, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(description="Compile the TensorRT shell against several sets of headers.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="INCLUDE_FOLDER")
    parser.add_argument("--cuda-include", type=Path, help=f"default: the first of {', '.join(CUDA_PLACES)}")
    parser.add_argument("--compiler", default="g++")
    options = parser.parse_args(arguments)
    places = [options.cuda_include] if options.cuda_include else [Path(place) for place in CUDA_PLACES]
    cuda = next((place for place in places if (place / "cuda_runtime_api.h").is_file()), None)
    if cuda is None:
        parser.error(f"expected cuda_runtime_api.h in {' or '.join(map(str, places))}; name it with --cuda-include")
    outcomes = [compile_against(folder, cuda, options.compiler) for folder in options.folders]
    print(table(outcomes))
    for outcome in outcomes:
        if not outcome.is_ok:
            print(f"\n{outcome.folder}:", *outcome.errors.splitlines()[:SHOWN_LINES], sep="\n", file=sys.stderr)
    return 0 if all(outcome.is_ok for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
