"""The device that `bench.kernels` times on: CUDA graphs, the SM clock, what the driver says."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from toolchain.bench.machine import checked_device
from toolchain.native import ops

LOAD_SECONDS = 0.05  # of launches before the clock is read: clocks follow the load within milliseconds
SPIN_CYCLES = 2_000_000  # about a millisecond, in which an event's error of some microseconds is less than a percent


class Timed(Protocol):
    """Launches that can be replayed; `seconds` is the time of one of them."""

    def seconds(self) -> float: ...


class Timing(Protocol):
    """A device, and how its launches are timed."""

    device: torch.device
    multiprocessors: int
    l2_bytes: int

    def context(self) -> Any:
        """Makes the device current."""

    def stream(self) -> int:
        """The current stream, as an integer."""

    def graph(self, calls: Sequence[Callable[[], Any]], launches: int) -> Timed:
        """`launches` calls, the given ones in turn."""

    def clock_behind(self, load: Timed) -> float | None:
        """Hz of the SM clock right behind that load; None where it cannot be read."""


class TorchTiming:
    """This machine's first CUDA device."""

    def __init__(self) -> None:
        """Find it.

        Raises:
            EnvironmentMismatch: there is no CUDA device, or no library for it.
        """
        self.device = torch.device(checked_device("cuda").type, 0)
        ops.device_library(0)
        facts = torch.cuda.get_device_properties(self.device)
        self.multiprocessors, self.l2_bytes = facts.multi_processor_count, facts.L2_cache_size

    @contextmanager
    def context(self) -> Iterator[None]:
        with torch.cuda.device(self.device), torch.inference_mode():
            yield

    def stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream

    def graph(self, calls: Sequence[Callable[[], Any]], launches: int) -> Graph:
        return Graph(calls, launches)

    def clock_behind(self, load: Timed) -> float | None:
        """Cycles over seconds of a kernel that counts SM cycles: no driver's permission is needed, and nothing idles
        between the load and it.
        """
        spin = getattr(torch.cuda, "_sleep", None)
        if spin is None:
            return None
        began = time.perf_counter()
        while time.perf_counter() - began < LOAD_SECONDS:
            load.seconds()
        spun = Graph([lambda: spin(SPIN_CYCLES)], 1)
        load.seconds()
        return SPIN_CYCLES / spun.seconds()


class Graph:
    """A CUDA graph of `launches` calls, the given ones in turn. `seconds()` replays it once, timed a launch."""

    def __init__(self, calls: Sequence[Callable[[], Any]], launches: int) -> None:
        self.launches = launches
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what a first call allocates or loads must not be captured
            for call in calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for number in range(launches):
                calls[number % len(calls)]()

    def seconds(self) -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        self.graph.replay()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) / 1000 / self.launches


def interleaved(graphs: Sequence[Timed], rounds: int) -> list[list[float]]:
    """Seconds of each graph, round after round, all of them once a round."""
    found: list[list[float]] = [[] for _ in graphs]
    for _ in range(rounds):
        for graph, seconds in zip(graphs, found):
            seconds.append(graph.seconds())
    return found


def driver_says(field: str) -> str | None:
    """What nvidia-smi reports for a field of the first device, with its unit; None where it does not."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--id=0", f"--query-gpu={field}", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return found.stdout.strip() or None if found.returncode == 0 else None
