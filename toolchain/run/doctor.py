"""Is this machine ready: versions, a known fatal pair of packages, GPU, kernels, compiler, memory, disk, the release.

Reads package metadata, not packages; torch is imported only to ask it for a CUDA device.
"""

from __future__ import annotations

import dataclasses
import platform
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.bundle.requirements import in_window, installed, version_key
from toolchain.device.runtime.board import jetson_release
from toolchain.errors import EnvironmentMismatch
from toolchain.native import build
from toolchain.native.library import ABI, BUILD_COMMAND, KernelLibrary, find_library, runs_on
from toolchain.plan.target import Target, list_targets, load_target

# Package → (lowest version, first version too new or None). A test holds them equal to pyproject.toml.
REQUIRED = {
    "torch": ("2.11", "2.14"),
    "transformers": ("5.0", "6"),
    "onnx": ("1.19", None),
    "onnxruntime": ("1.22", None),
}
PYTHON = ("3.10", "3.14")
ORT_FIX = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
RTX_FIX = "pip install tensorrt-rtx-cu13"
FREE_RAM_BYTES = 4 << 30
FREE_DISK_BYTES = 5 << 30


@dataclass(frozen=True)
class Check:
    """One finding. `status` is "ok", "warn" or "fail"; `fix` is empty, or the next thing to do."""

    name: str
    found: str
    expected: str
    status: str
    fix: str = ""


@dataclass(frozen=True)
class DoctorReport:
    checks: tuple[Check, ...]

    @property
    def verdict(self) -> str:
        """ "ok", "ok-with-warnings" or "fail"."""
        statuses = {check.status for check in self.checks}
        return "fail" if "fail" in statuses else "ok-with-warnings" if "warn" in statuses else "ok"

    @property
    def exit_code(self) -> int:
        return EnvironmentMismatch.exit_code if self.verdict == "fail" else 0

    def to_json(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "checks": [dataclasses.asdict(check) for check in self.checks]}


def diagnose(target: Target | None = None, root: Path = Path("/")) -> DoctorReport:
    """Every check of this machine; with a target, its release too. `root` is where /proc and /etc are read."""
    board = jetson_release(root)
    checks = [_python_check()]
    checks += [_required_check(name) for name in REQUIRED if name != "onnxruntime"]
    checks += [_onnxruntime_check(), _tensorrt_check(target, board), _bindings_check(board)]
    checks += [_tensorrt_rtx_check(), _gpu_check(root)]
    checks += [_kernels_check(), _compiler_check(), _ram_check(root), _disk_check(), _board_check(target, board)]
    return DoctorReport(tuple(checks))


def _window(low: str, high: str | None) -> str:
    return f">={low}" + (f",<{high}" if high else "")


def _python_check() -> Check:
    found, window = platform.python_version(), _window(*PYTHON)
    good = in_window(found, *PYTHON)
    return Check(
        "python",
        found,
        window,
        "ok" if good else "fail",
        "" if good else "make a new environment with python3.12 -m venv",
    )


def _required_check(name: str) -> Check:
    """A package the workstation needs and the board does without, so that its absence is a warning."""
    found, window = installed(name), _window(*REQUIRED[name])
    fix = f"pip install '{name}{window}'"
    if found is None:
        return Check(name, "not installed", f"{window}; not needed on a board", "warn", fix)
    good = in_window(found, *REQUIRED[name])
    return Check(name, found, window, "ok" if good else "fail", "" if good else fix)


def _onnxruntime_check() -> Check:
    cpu, gpu = installed("onnxruntime"), installed("onnxruntime-gpu")
    window = _window(*REQUIRED["onnxruntime"])
    if cpu and gpu:
        found = f"onnxruntime {cpu} and onnxruntime-gpu {gpu}"
        return Check("onnxruntime", found, "one of the two: they overwrite each other's files", "fail", ORT_FIX)
    if not cpu and not gpu:
        return Check(
            "onnxruntime", "not installed", f"{window}; not needed on a board", "warn", "pip install onnxruntime"
        )
    name, version = ("onnxruntime", cpu) if cpu else ("onnxruntime-gpu", str(gpu))
    good = in_window(version, *REQUIRED["onnxruntime"])
    return Check(
        "onnxruntime", f"{name} {version}", window, "ok" if good else "fail", "" if good else f"pip install -U {name}"
    )


def _tensorrt_check(target: Target | None, board: str | None) -> Check:
    found = installed("tensorrt")
    wanted = (
        " or ".join(f"{x.tensorrt} (JetPack {x.jetpack})" for x in target.software) if target and board else ">=10.3"
    )
    expected = f"{wanted}; needed for mgvq build on a board"
    if found is None:
        fix = "sudo apt install nvidia-jetpack python3-libnvinfer" if board else ""
        return Check("tensorrt", "not installed", expected, "fail" if board else "ok", fix)
    allowed = [x.tensorrt for x in target.software] if target and board else []
    good = any(version_key(found)[:2] == version_key(x) for x in allowed) if allowed else in_window(found, "10.3", None)
    fix = (
        ""
        if good
        else "install the JetPack release the target names (mgvq targets), or bundle for the one that is here"
    )
    return Check("tensorrt", found, expected, "ok" if good else "fail", fix)


def _bindings_check(board: str | None) -> Check:
    found = installed("cuda-python")
    good = board is None if found is None else in_window(found, "12.6", None)
    fix = "" if good else "pip install -r requirements-board.txt of the bundle"
    expected = ">=12.6; needed to run engines"
    return Check("cuda-python", found or "not installed", expected, "ok" if good else "fail", fix)


def _tensorrt_rtx_check() -> Check:
    found = installed("tensorrt-rtx-cu13") or installed("tensorrt_rtx")
    expected = "any; needed for mgvq build --backend tensorrt_rtx"
    return Check("tensorrt_rtx", found or "not installed", expected, "ok", "" if found else RTX_FIX)


def _gpu_check(root: Path) -> Check:
    expected = "optional: runs quantized models and mgvq bench; no verb quantizes on it yet"
    if installed("torch") is None:
        present = (root / "dev/nvidiactl").exists() or (root / "dev/nvhost-gpu").exists()
        return Check("gpu", "an NVIDIA device" if present else "none", expected, "ok")
    try:
        import torch

        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Check("gpu", f"torch does not answer: {reason}", expected, "fail", "pip install --force-reinstall torch")
    return Check("gpu", ", ".join(names) or "none", expected, "ok")


def _kernels_check() -> Check:
    """The CUDA kernels' library: a warning where a GPU waits for it, a failure where the one there is of no use."""
    expected = f"ABI {ABI} with machine code for the GPU; optional without one"
    capabilities = _gpu_capabilities()
    try:
        path = find_library()
        library = None if path is None else KernelLibrary(path)
    except EnvironmentMismatch as error:
        return Check("kernels", str(error), expected, "fail", BUILD_COMMAND)
    if library is None:
        return Check("kernels", "not built", expected, "warn" if capabilities else "ok", BUILD_COMMAND)
    found = f"{library.path}: ABI {ABI}, architectures {' '.join(library.architectures)}"
    lacking = [f"sm_{a}{b}" for a, b in capabilities if not runs_on(library.architectures, (a, b))]
    if lacking:
        return Check("kernels", f"{found}; none for {' '.join(lacking)}", expected, "fail", BUILD_COMMAND)
    return Check("kernels", found, expected, "ok")


def _compiler_check() -> Check:
    """What `mgvq kernels build` needs. Nothing else does, so that what is missing is no more than said."""
    expected = f"nvcc of CUDA 12.6 or newer, its headers, cmake; only for {BUILD_COMMAND}"
    nvcc = build.find_nvcc()
    version, cmake = build.nvcc_version(nvcc) if nvcc else None, build.cmake_version()
    found = f"nvcc {_dotted(version)}{f' at {nvcc}' if nvcc else ''}, cmake {_dotted(cmake)}"
    missing = build.missing_tools()
    return Check("kernels build", found, expected, "ok", f"install {'; '.join(missing)}" if missing else "")


def _dotted(version: tuple[int, ...] | None) -> str:
    return ".".join(map(str, version)) if version else "not found"


def _gpu_capabilities() -> list[tuple[int, int]]:
    """Compute capabilities of the CUDA devices torch finds; none where it finds none or does not load."""
    if installed("torch") is None:
        return []
    try:
        import torch

        return [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    except (ImportError, OSError, RuntimeError):
        return []  # the gpu check says what is wrong


def _ram_check(root: Path) -> Check:
    expected = f"{FREE_RAM_BYTES >> 30} GiB available"
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    if not match:
        return Check("ram", "unknown (no /proc/meminfo)", expected, "warn", "check by hand that enough memory is free")
    free = int(match.group(1)) * 1024
    return _amount_check("ram", free, FREE_RAM_BYTES, expected, "close other programs, or work on a smaller model")


def _disk_check() -> Check:
    expected = f"{FREE_DISK_BYTES >> 30} GiB free in the current folder"
    return _amount_check(
        "disk", shutil.disk_usage(Path.cwd()).free, FREE_DISK_BYTES, expected, "free some, or choose -o on another disk"
    )


def _amount_check(name: str, free: int, wanted: int, expected: str, fix: str) -> Check:
    good = free >= wanted
    return Check(name, f"{free / 2**30:.1f} GiB", expected, "ok" if good else "warn", "" if good else fix)


def _board_check(target: Target | None, board: str | None) -> Check:
    if board is None:
        return Check("jetson", "not a Jetson", "a Jetson only for mgvq build --backend tensorrt", "ok")
    known = _releases([target] if target else map(load_target, list_targets()))
    good = any(version_key(board)[: len(version_key(x))] >= version_key(x) for x in known)
    expected = f"L4T {' or '.join(known)} or newer" if known else "a JetPack release that mgvq targets lists"
    return Check(
        "jetson", f"L4T {board}", expected, "ok" if good or not known else "fail", "" if good else "update JetPack"
    )


def _releases(targets: Iterable[Target]) -> list[str]:
    """L4T releases that the targets name, each once, sorted."""
    key: Callable[[str], tuple[int, ...]] = version_key
    return sorted({x.l4t for target in targets for x in target.software if x.l4t}, key=key)


def _read(path: Path) -> str:
    """The text of a file, or nothing where the system does not have it."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
