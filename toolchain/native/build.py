"""Building the kernels' library on this machine, from the sources that the package carries."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from toolchain.errors import EnvironmentMismatch
from toolchain.native.library import FILE_NAME, PACKAGE_FOLDER, KernelLibrary
from toolchain.values import SILENT, Progress

LOWEST_CUDA = (12, 6)
LOWEST_CMAKE = (3, 20)
NVCC_PLACES = ("/usr/local/cuda/bin/nvcc",)
_HERE = Path(__file__).resolve().parent.parent
SOURCE_FOLDERS = (_HERE / "_plugins", _HERE.parent / "plugins")  # the wheel's copy, then the source checkout's


def kernel_sources() -> Path:
    """The folder with the sources and their CMakeLists.txt.

    Raises:
        EnvironmentMismatch: this installation carries none.
    """
    for folder in SOURCE_FOLDERS:
        if (folder / "CMakeLists.txt").is_file():
            return folder
    raise EnvironmentMismatch(
        f"expected the kernels' sources in {SOURCE_FOLDERS[0].name}/ of the package or plugins/ of a checkout, found "
        "neither; install mgvq from its wheel or work in a checkout"
    )


def find_nvcc() -> Path | None:
    """nvcc by CUDACXX or CUDA_HOME, on PATH, or where the toolkit installs it."""
    home = os.environ.get("CUDA_HOME")
    named = [os.environ.get("CUDACXX"), f"{home}/bin/nvcc" if home else None, shutil.which("nvcc"), *NVCC_PLACES]
    return next((Path(name) for name in named if name and Path(name).is_file()), None)


def tool_version(command: list[str], pattern: str) -> tuple[int, ...] | None:
    """The version `command` prints where `pattern`'s group matches, such as (13, 0); None where it does not run."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(pattern, found.stdout)
    return tuple(int(part) for part in match.group(1).split(".")) if match and not found.returncode else None


def nvcc_version(nvcc: Path) -> tuple[int, ...] | None:
    """CUDA's release by that nvcc, such as (13, 0)."""
    return tool_version([str(nvcc), "--version"], r"release (\d+\.\d+)")


def cmake_version() -> tuple[int, ...] | None:
    """The version of the cmake on PATH."""
    return tool_version(["cmake", "--version"], r"cmake version (\d+(?:\.\d+)+)")


def has_cuda_headers(nvcc: Path) -> bool:
    """Whether the toolkit of that nvcc has cuda_runtime_api.h, which a bare compiler package lacks."""
    root = nvcc.resolve().parent.parent
    places = (root / "include", *sorted(root.glob("targets/*/include")), Path("/usr/local/cuda/include"))
    return any((place / "cuda_runtime_api.h").is_file() for place in places)


def missing_tools() -> list[str]:
    """What a build needs and this machine lacks, in words; empty where nothing is missing."""
    missing = []
    nvcc, cmake = find_nvcc(), cmake_version()
    version = nvcc_version(nvcc) if nvcc else None
    lowest = ".".join(map(str, LOWEST_CUDA))
    if nvcc is None:
        missing.append(f"nvcc of CUDA {lowest} or newer (the CUDA toolkit; on a Jetson: sudo apt install cuda-toolkit)")
    elif version is None or version < LOWEST_CUDA:
        shown = ".".join(map(str, version)) if version else "none that runs"
        missing.append(f"nvcc of CUDA {lowest} or newer, found {shown} at {nvcc}")
    elif not has_cuda_headers(nvcc):
        missing.append(
            "CUDA's headers (cuda_runtime_api.h) beside nvcc: install the toolkit's cudart development files"
        )
    if cmake is None or cmake < LOWEST_CMAKE:
        shown = ".".join(map(str, cmake)) if cmake else "none"
        missing.append(f"cmake {'.'.join(map(str, LOWEST_CMAKE))} or newer, found {shown} (pip install cmake)")
    if shutil.which("c++") is None and shutil.which("g++") is None:
        missing.append("a C++17 compiler (g++)")
    return missing


def local_architectures() -> tuple[str, ...]:
    """Compute capabilities of this machine's GPUs, such as ("87",), by torch or the driver's tool; () where neither
    finds one.
    """
    try:
        import torch

        found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        numbers = {10 * major + minor for major, minor in found}
    except (ImportError, OSError, RuntimeError):
        numbers = set()
    if not numbers and shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        text = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
        numbers = {int(line.replace(".", "")) for line in text.split() if re.fullmatch(r"\d+\.\d", line)}
    return tuple(str(number) for number in sorted(numbers))


def build_library(
    output: Path | None = None, architectures: tuple[str, ...] = (), progress: Progress = SILENT
) -> KernelLibrary:
    """Compile the kernels and put the library into a folder; what it contains is read back from it.

    Args:
        output: where the file goes; the package's own folder, where it is found without further ado, if None.
        architectures: such as ("87", "90a"); those of this machine's GPUs if empty, or all where it has none.

    Raises:
        EnvironmentMismatch: a tool is missing, the folder cannot be written, or the build fails.
    """
    missing = missing_tools()
    if missing:
        raise EnvironmentMismatch(f"the kernels cannot be built here; missing: {'; '.join(missing)}")
    folder = PACKAGE_FOLDER if output is None else output
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentMismatch(f"{folder}: cannot be written ({error}); choose another folder with -o") from None
    chosen = architectures or local_architectures()
    with tempfile.TemporaryDirectory(prefix="mgvq-kernels-") as scratch:
        options = ["-DMGVQ_BUILD_CUDA=ON", "-DBUILD_TESTING=OFF", f"-DCMAKE_CUDA_COMPILER={find_nvcc()}"]
        if chosen:
            options.append("-DCMAKE_CUDA_ARCHITECTURES=" + ";".join(f"{name}-real" for name in chosen))
        progress.stage(f"configuring for {' '.join(chosen) or 'every architecture of ours'}")
        _run(["cmake", "-S", str(kernel_sources()), "-B", scratch, *options])
        progress.stage("compiling; this takes minutes")
        jobs = str(os.cpu_count() or 1)
        _run(["cmake", "--build", scratch, "--target", "mgvq_kernels", "--parallel", jobs])
        built = Path(scratch) / "vq_linear" / FILE_NAME
        fresh = folder / (FILE_NAME + ".new")
        shutil.copyfile(built, fresh)
        os.replace(fresh, folder / FILE_NAME)  # a process that has the old file open keeps it
    return KernelLibrary(folder / FILE_NAME)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-20:])
        raise EnvironmentMismatch(f"{' '.join(command[:2])} failed with exit code {done.returncode}:\n{last}")
