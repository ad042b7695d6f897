"""A stand-in for CUDA's Python bindings in host memory: same calls, same results in the same order, no GPU.

Device memory is host memory that begins as NaN, every copy is checked against what was allocated, and a capture records
what is enqueued instead of doing it. It shows that calls, pointers and sizes are right; it says nothing of a GPU.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum

import numpy as np

ALIGNMENT = 256


class Status(IntEnum):
    success = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35


class SimulatedCuda:
    """The functions of cuda.bindings.runtime that `device.runtime.cuda` calls. `calls` has their names in order."""

    cudaError_t = Status

    class cudaMemcpyKind(IntEnum):
        cudaMemcpyHostToDevice = 1
        cudaMemcpyDeviceToHost = 2
        cudaMemcpyDeviceToDevice = 3

    class cudaStreamCaptureMode(IntEnum):
        cudaStreamCaptureModeThreadLocal = 1

    def __init__(self, total_bytes: int = 1 << 30, driver: Status = Status.success) -> None:
        self.total_bytes, self.driver = total_bytes, driver
        self.blocks: dict[int, np.ndarray] = {}
        self.sizes: dict[int, int] = {}
        self.calls: list[str] = []
        self.graphs: list[list] = []
        self.recording: list | None = None
        self.alive = 0  # graphs ready to be launched

    def enqueue(self, name: str, work) -> None:
        """Do what was enqueued, or record it while a capture is on."""
        self.calls.append(name)
        if self.recording is None:
            work()
        else:
            self.recording.append(work)

    def check(self, pointer: int, size: int) -> None:
        """Every byte is in one block that was allocated and not freed."""
        inside = [start for start in self.sizes if start <= pointer and pointer + size <= start + self.sizes[start]]
        assert inside, f"{size} bytes at {pointer:#x} are in no allocated block"

    def cudaGetErrorString(self, error):
        return Status.success, error.name.encode()

    def cudaStreamCreate(self):
        return self.driver, 77

    def cudaMalloc(self, size):
        if sum(self.sizes.values()) + size > self.total_bytes:
            return Status.cudaErrorMemoryAllocation, None
        block = np.full(size + ALIGNMENT, 0xFF, dtype=np.uint8)  # NaN as float16 and float32
        pointer = -(-block.ctypes.data // ALIGNMENT) * ALIGNMENT
        self.blocks[pointer], self.sizes[pointer] = block, size
        return Status.success, pointer

    def cudaFree(self, pointer):
        del self.blocks[pointer], self.sizes[pointer]
        return (Status.success,)

    def cudaMemcpyAsync(self, to, source, size, kind, stream):
        self.check(*(to, size) if kind == 1 else (source, size))
        assert self.recording is None, "host memory is not copied inside a capture"
        self.enqueue("copy", lambda: ctypes.memmove(to, source, size))
        return (Status.success,)

    def cudaMemcpy2DAsync(self, to, to_pitch, source, source_pitch, width, rows, kind, stream):
        assert width <= min(to_pitch, source_pitch)
        for row in range(rows):
            self.check(to + row * to_pitch, width)
            self.check(source + row * source_pitch, width)

        def work():
            for row in range(rows):
                ctypes.memmove(to + row * to_pitch, source + row * source_pitch, width)

        self.enqueue("copy2d", work)
        return (Status.success,)

    def cudaMemsetAsync(self, pointer, value, size, stream):
        self.check(pointer, size)
        self.enqueue("set", lambda: ctypes.memset(pointer, value, size))
        return (Status.success,)

    def cudaStreamSynchronize(self, stream):
        self.calls.append("synchronize")
        return (Status.success,)

    def cudaStreamBeginCapture(self, stream, mode):
        self.recording = []
        return (Status.success,)

    def cudaStreamEndCapture(self, stream):
        graph, self.recording = self.recording, None
        self.graphs.append(graph)
        return Status.success, graph

    def cudaGraphInstantiate(self, graph, flags):
        self.alive += 1
        return Status.success, graph

    def cudaGraphExecDestroy(self, graph):
        self.alive -= 1
        return (Status.success,)

    def cudaGraphDestroy(self, graph):
        return (Status.success,)

    def cudaGraphLaunch(self, graph, stream):
        self.calls.append("launch")
        for work in graph:
            work()
        return (Status.success,)
