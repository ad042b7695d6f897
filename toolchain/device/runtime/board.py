"""What a board is and has: its release, CUDA, compute capability, free memory and largest block.

Readers take the root of the file system, or the function that loads the driver, so that they can be shown any board.
"""

from __future__ import annotations

import ctypes
import json
import platform
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
Loader = Callable[[str], ctypes.CDLL]


@dataclass(frozen=True)
class Gpu:
    """The first GPU: its name, and its compute capability without the dot, such as "87"."""

    name: str
    sm: str


@dataclass(frozen=True)
class Board:
    """What is installed; None where it was not found. `machine` is the processor's, such as aarch64."""

    machine: str
    l4t: str | None
    jetpack: str | None
    cuda: str | None
    gpu: Gpu | None

    def text(self, tensorrt: str) -> str:
        """The board in one line, with the TensorRT that was imported."""
        jetpack = f"JetPack {self.jetpack}" if self.jetpack else "no package nvidia-jetpack"
        gpu = f"{self.gpu.name} (SM {self.gpu.sm})" if self.gpu else "no GPU that CUDA's driver shows"
        return f"{jetpack}, L4T {self.l4t or 'none'}, TensorRT {tensorrt}, CUDA {self.cuda or 'none'}, {gpu}"


@dataclass(frozen=True)
class Memory:
    """Bytes: what a process can get now, and the pool of contiguous blocks (CMA), in all and free; None without one."""

    available_bytes: int
    cma_total_bytes: int | None
    cma_free_bytes: int | None


def read_board(root: Path = Path("/"), load: Loader = ctypes.CDLL) -> Board:
    """This board."""
    return Board(
        platform.machine(), jetson_release(root), package_version("nvidia-jetpack", root), cuda_version(root), gpu(load)
    )


def machine_name(root: Path = Path("/")) -> str:
    """What a board or processor is called: by the device tree, else by the kernel's list of processors."""
    tree, listing = root / "proc/device-tree/model", root / "proc/cpuinfo"
    if tree.is_file():
        return tree.read_text(encoding="utf-8", errors="replace").strip("\0 \n")
    text = listing.read_text(encoding="utf-8", errors="replace") if listing.is_file() else ""
    named = re.search(r"^model name\s*:\s*(\S.*)$", text, re.MULTILINE | re.IGNORECASE)
    return named[1].strip() if named else platform.processor() or platform.machine()


def package_version(name: str, root: Path = Path("/")) -> str | None:
    """The version of an installed Debian package, from dpkg's own list; None where it is not installed."""
    path = root / "var/lib/dpkg/status"
    if not path.is_file():
        return None
    for entry in path.read_text(encoding="utf-8", errors="replace").split("\n\n"):
        fields = dict(re.findall(r"^([\w-]+): (.*)$", entry, re.MULTILINE))
        if fields.get("Package") == name and fields.get("Status", "").endswith(" installed"):
            return fields.get("Version")
    return None


def cuda_version(root: Path = Path("/")) -> str | None:
    """The version of the CUDA toolkit, from its version.json; None where there is none."""
    path = root / "usr/local/cuda/version.json"
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["cuda"]["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def gpu(load: Loader = ctypes.CDLL) -> Gpu | None:
    """The first GPU by CUDA's driver, asked directly; None where there is no driver or no device."""
    try:
        driver = load("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    calls = (
        lambda: driver.cuInit(0),
        lambda: driver.cuDeviceGet(ctypes.byref(device), 0),
        lambda: driver.cuDeviceGetName(name, len(name), device),
        lambda: driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device),
        lambda: driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device),
    )
    if any(call() != 0 for call in calls):
        return None
    return Gpu(name.value.decode(errors="replace"), f"{major.value}{minor.value}")


def gpu_uuid(load: Loader = ctypes.CDLL) -> str | None:
    """The first GPU as nvidia-smi calls it, GPU-8-4-4-4-12 hexadecimal digits; None where the driver does not say.

    The first is CUDA's, with CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER: nvidia-smi numbers GPUs by their slots.
    """
    try:
        driver = load("libcuda.so.1")
    except OSError:
        return None
    device, content = ctypes.c_int(), ctypes.create_string_buffer(16)
    calls = (
        lambda: driver.cuInit(0),
        lambda: driver.cuDeviceGet(ctypes.byref(device), 0),
        lambda: driver.cuDeviceGetUuid(content, device),  # _v2 would name a MIG instance
    )
    return None if any(call() != 0 for call in calls) else f"GPU-{uuid.UUID(bytes=content.raw)}"


def read_memory(root: Path = Path("/")) -> Memory | None:
    """Free memory by /proc/meminfo; None where the system has no such file or line."""
    path = root / "proc/meminfo"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    sizes = {name: int(count) * 1024 for name, count in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    if "MemAvailable" not in sizes:
        return None
    has_pool = bool(sizes.get("CmaTotal"))
    pool = (sizes["CmaTotal"], sizes.get("CmaFree")) if has_pool else (None, None)
    return Memory(sizes["MemAvailable"], *pool)


def jetson_release(root: Path = Path("/")) -> str | None:
    """The L4T release of a Jetson such as "36.4.3", or None on other machines."""
    path = root / "etc/nv_tegra_release"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    match = re.search(r"# R(\d+) \(release\), REVISION: ([\d.]+)", text)
    return f"{match.group(1)}.{match.group(2)}" if match else None
