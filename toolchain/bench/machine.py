"""The machine a figure was taken on, seconds that include all work a call began, and peak memory."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from toolchain import __version__
from toolchain.errors import EnvironmentMismatch

Result = TypeVar("Result")


def checked_device(name: str) -> torch.device:
    """The torch device of that name.

    Raises:
        EnvironmentMismatch: it is CUDA, and torch finds no CUDA device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise EnvironmentMismatch(
            f"device 'cuda': torch {torch.__version__} finds no CUDA device; check the driver and torch's build "
            "(mgvq doctor), or use --device cpu"
        )
    return torch.device(name)


def machine_facts(device: torch.device) -> dict[str, Any]:
    """`device`, `name` of the CPU or GPU, `threads` of torch on the CPU, `load_average` over the last minute (what else
    ran beside it), `torch`, `mgvq` and `system`; on CUDA also `cuda`, the version torch was built for.
    """
    facts = {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "mgvq": __version__,
        "system": f"{platform.system()} {platform.machine()}",
    }
    return facts | ({"cuda": torch.version.cuda} if device.type == "cuda" else {})


def cpu_model(listing: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as the kernel lists it, or what Python knows of it where there is no such list."""
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip().lower() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def timed(device: torch.device, call: Callable[[], Result]) -> tuple[Result, float, float]:
    """(what `call` returns, wall seconds until the device has finished all of it, seconds of this process's CPU time).

    CPU time counts every thread and no waiting: on a machine shared with others it is the steadier of the two.
    """
    _finish(device)
    began, began_cpu = time.perf_counter(), time.process_time()
    result = call()
    _finish(device)
    return result, time.perf_counter() - began, time.process_time() - began_cpu


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget_peak(device: torch.device) -> None:
    """Start a new peak on CUDA. A process's resident peak cannot be started anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """On CUDA the most that torch held at once since `forget_peak`; on a CPU the process's highest resident size so
    far, Python and torch themselves included.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024  # KiB but on macOS (getrusage(2))
