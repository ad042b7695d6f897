"""CUDA through NVIDIA's Python bindings, as little of it as running engines takes: memory, copies, one stream, graphs.

Pointers are integers. Everything is enqueued on the one stream; `download` and `synchronize` wait for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from toolchain.errors import BudgetError, EnvironmentMismatch

# cuda-python's name for the runtime since 12.6, and the one before it.
MODULES = ("cuda.bindings.runtime", "cuda.cudart")
INSTALL = "pip install 'cuda-python>=12.6,<12.7' (JetPack 6) or 'cuda-python>=13.0,<13.1' (JetPack 7, CUDA 13)"
_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
_FIRST_OF_LAUNCHES = 700  # cudaErrorIllegalAddress; from here on an earlier kernel may be what failed


def load_bindings() -> ModuleType:
    """The bindings of CUDA's runtime.

    Raises:
        EnvironmentMismatch: they are not installed, or do not load.
    """
    reasons = []
    for name in MODULES:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            reasons.append(str(error))
    raise EnvironmentMismatch(
        f"running engines needs CUDA's Python bindings ({MODULES[0]}), found none ({reasons[0]}); {INSTALL}, or use "
        "--backend ort"
    )


class Cuda:
    """The current device, with one stream of its own."""

    def __init__(self, bindings: Any = None) -> None:
        """Open the device.

        Raises:
            EnvironmentMismatch: no bindings, no driver or no device.
        """
        self._cuda = load_bindings() if bindings is None else bindings
        self._pending: list[NDArray] = []  # host memory that copies under way still read
        found, self._stream = self._try("cudaStreamCreate")
        if found:
            raise EnvironmentMismatch(
                f"CUDA does not start: cudaStreamCreate: {self._text(found)}; it needs an NVIDIA GPU and a driver of "
                "this CUDA or a newer one: see mgvq doctor, run it on the board, or use --backend ort"
            )

    @property
    def stream(self) -> int:
        return int(self._stream)

    def allocate(self, size: int, what: str) -> int:
        """A pointer to `size` bytes, at least one, aligned to 256 as cudaMalloc aligns. `what` is for the refusal.

        Raises:
            BudgetError: there is not that much.
        """
        found, pointer = self._try("cudaMalloc", max(size, 1))
        if found == _OUT_OF_MEMORY:
            raise BudgetError(
                f"{what}: {size / 2**20:,.1f} MiB of device memory are wanted and not to be had; close other programs, "
                "stop the desktop, or make the bundle again with a smaller plan.context or plan.image"
            )
        self._check("cudaMalloc", found)
        return int(pointer)

    def free(self, pointer: int) -> None:
        self._call("cudaFree", pointer)

    def upload(self, pointer: int, array: NDArray) -> None:
        """Copy a whole array to the device; the array may change only after `synchronize`."""
        source = np.ascontiguousarray(array)
        if not source.nbytes:
            return
        self._pending.append(source)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", pointer, source.ctypes.data, source.nbytes, kind, self._stream)

    def download(self, pointer: int, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray:
        """An array of what is at `pointer` once everything enqueued so far is done."""
        result = np.empty(shape, dtype=dtype)
        if result.nbytes:
            kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
            self._call("cudaMemcpyAsync", result.ctypes.data, pointer, result.nbytes, kind, self._stream)
        self.synchronize()
        return result

    def zero(self, pointer: int, size: int) -> None:
        self._call("cudaMemsetAsync", pointer, 0, size, self._stream)

    def copy_rows(self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        """Copy `rows` pieces of `width` bytes, each pitch bytes after the last, within the device."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpy2DAsync", to, to_pitch, source, source_pitch, width, rows, kind, self._stream)

    def synchronize(self) -> None:
        self._call("cudaStreamSynchronize", self._stream)
        self._pending.clear()

    def capture(self, work: Callable[[], None]) -> Any:
        """A graph of what `work` enqueues, which is recorded and not run; `launch` runs it."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        try:
            work()
        except BaseException:
            # The stream has to leave the capture, which what failed may have broken: its error counts, not ours.
            broken, graph = self._try("cudaStreamEndCapture", self._stream)
            if not broken:
                self._try("cudaGraphDestroy", graph)
            raise
        graph = self._call("cudaStreamEndCapture", self._stream)
        ready = self._call("cudaGraphInstantiate", graph, 0)
        self._call("cudaGraphDestroy", graph)
        return ready

    def launch(self, graph: Any) -> None:
        self._call("cudaGraphLaunch", graph, self._stream)

    def free_graph(self, graph: Any) -> None:
        """Give back what `capture` made; a launch of it that is under way ends first."""
        self._call("cudaGraphExecDestroy", graph)

    def _call(self, name: str, *arguments: Any) -> Any:
        found, value = self._try(name, *arguments)
        self._check(name, found)
        return value

    def _try(self, name: str, *arguments: Any) -> tuple[int, Any]:
        """(status, first result or None) of one function of the runtime.

        Raises:
            EnvironmentMismatch: the bindings lack the function, or find no library behind it.
        """
        try:
            status, *values = getattr(self._cuda, name)(*arguments)
        except (AttributeError, RuntimeError) as error:
            raise EnvironmentMismatch(
                f"{name}: CUDA's Python bindings do not call it ({error}); install those of this machine's CUDA: "
                f"{INSTALL}, and see mgvq doctor for the driver"
            ) from None
        return int(status), values[0] if values else None

    def _check(self, name: str, status: int) -> None:
        if not status:
            return
        advice = "check the driver (mgvq doctor)"
        if status >= _FIRST_OF_LAUNCHES:
            advice = "an error of an earlier launch shows here: run with CUDA_LAUNCH_BLOCKING=1 to see whose it is"
        raise EnvironmentMismatch(f"{name}: {self._text(status)}; {advice}")

    def _text(self, status: int) -> str:
        """ "CUDA error 35 (what the runtime calls it)"."""
        try:
            text = self._cuda.cudaGetErrorString(self._cuda.cudaError_t(status))[1]
        except ValueError:  # a status that is newer than the bindings
            text = "unknown to these bindings"
        return f"CUDA error {status} ({text.decode() if isinstance(text, bytes) else text})"
