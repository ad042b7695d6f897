"""CUDA through its Python bindings: a simulated device, and the real bindings as far as they go without a GPU."""

from __future__ import annotations

import ast
import inspect
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from simulated_cuda import SimulatedCuda, Status

from toolchain.device.runtime import cuda as ours
from toolchain.device.runtime.cuda import Cuda, load_bindings
from toolchain.errors import BudgetError, EnvironmentMismatch

MIB = 2**20


def test_bindings_that_are_missing_are_named(monkeypatch):
    for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EnvironmentMismatch, match=r"needs CUDA's Python bindings .*pip install 'cuda-python"):
        load_bindings()


def test_no_memory_is_a_budget_error_that_says_for_what():
    with pytest.raises(BudgetError, match=r"keys and values: 2.0 MiB of device memory are wanted"):
        Cuda(SimulatedCuda(total_bytes=MIB)).allocate(2 * MIB, "keys and values")


def test_what_goes_up_comes_down_and_rows_move_between_pitches():
    cuda = Cuda(SimulatedCuda())
    source, to = cuda.allocate(12, "a"), cuda.allocate(40, "b")
    rows = np.arange(12, dtype=np.uint8).reshape(3, 4)
    cuda.upload(source, rows[:, ::-1])
    assert np.array_equal(cuda.download(source, (3, 4), np.uint8), rows[:, ::-1])
    cuda.zero(to, 40)
    cuda.copy_rows(to + 1, 10, source, 4, 3, 3)
    moved = cuda.download(to, (4, 10), np.uint8)
    assert np.array_equal(moved[:3, 1:4], rows[:, ::-1][:, :3])
    assert moved.sum() == rows[:, ::-1][:, :3].sum()


def failing(name: str, how) -> SimulatedCuda:
    """A simulated device one of whose functions gives a status, or raises."""
    found = SimulatedCuda()

    def call(*_):
        if isinstance(how, Exception):
            raise how
        return how, None

    setattr(found, name, call)
    return found


def test_a_driver_that_is_too_old_is_exit_6_with_the_call_and_what_to_do():
    with pytest.raises(EnvironmentMismatch, match=r"does not start: cudaStreamCreate: CUDA error 35 .*--backend ort"):
        Cuda(SimulatedCuda(driver=Status.cudaErrorInsufficientDriver))


def test_bindings_that_find_no_library_are_exit_6_with_the_call_and_their_words():
    absent = RuntimeError("Failed to dlopen libcudart.so.12")
    with pytest.raises(EnvironmentMismatch, match=r"cudaStreamCreate: .*do not call it \(Failed to dlopen libcudart"):
        Cuda(failing("cudaStreamCreate", absent))
    with pytest.raises(EnvironmentMismatch, match=r"cudaMalloc: .* \(Failed to dlopen") as caught:
        Cuda(failing("cudaMalloc", absent)).allocate(1, "a")
    assert caught.value.exit_code == 6


def test_bindings_without_a_function_are_exit_6_with_its_name():
    older = SimpleNamespace(cudaStreamCreate=lambda: (Status.success, 7))
    with pytest.raises(EnvironmentMismatch, match=r"cudaStreamSynchronize: .*no attribute"):
        Cuda(older).synchronize()


class LaunchStatus(int):
    name = "cudaErrorIllegalAddress"


def test_only_errors_that_launches_leave_are_blamed_on_launches():
    failed = failing("cudaStreamSynchronize", LaunchStatus(700))
    failed.cudaError_t = LaunchStatus
    with pytest.raises(EnvironmentMismatch, match=r"cudaStreamSynchronize: CUDA error 700 .*CUDA_LAUNCH_BLOCKING"):
        Cuda(failed).synchronize()
    with pytest.raises(EnvironmentMismatch, match=r"cudaFree: CUDA error 35 .*; check the driver"):
        Cuda(failing("cudaFree", Status.cudaErrorInsufficientDriver)).free(1)


def test_a_status_that_the_bindings_do_not_know_is_still_named():
    with pytest.raises(EnvironmentMismatch, match=r"cudaFree: CUDA error 12345 \(unknown to these bindings\)"):
        Cuda(failing("cudaFree", 12345)).free(1)


def test_what_fails_inside_a_capture_is_what_is_raised_and_the_capture_ends():
    simulated = SimulatedCuda()
    cuda = Cuda(simulated)

    def work():
        raise EnvironmentMismatch("engine decoder does not run")

    with pytest.raises(EnvironmentMismatch, match="engine decoder does not run"):
        cuda.capture(work)
    assert simulated.recording is None
    broken = failing("cudaStreamEndCapture", LaunchStatus(901))
    with pytest.raises(EnvironmentMismatch, match="engine decoder does not run"):
        Cuda(broken).capture(work)


def called_names() -> set[str]:
    """Every function and enumeration of the runtime that cuda.py names."""
    tree = ast.parse(inspect.getsource(ours))
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {name for name in texts | attributes if name.startswith("cuda") and name.isidentifier()}


def test_the_real_bindings_have_everything_that_is_called():
    runtime = pytest.importorskip(
        "cuda.bindings.runtime", reason="needs CUDA's Python bindings (pip install mgvq[board])"
    )
    names = called_names()
    assert {"cudaMalloc", "cudaGraphLaunch", "cudaMemcpyKind", "cudaMemcpyHostToDevice"} <= names
    kinds = (runtime, runtime.cudaMemcpyKind, runtime.cudaStreamCaptureMode)
    assert not sorted(name for name in names if not any(hasattr(kind, name) for kind in kinds))


def test_the_real_bindings_without_a_driver_are_exit_6_in_words():
    runtime = pytest.importorskip(
        "cuda.bindings.runtime", reason="needs CUDA's Python bindings (pip install mgvq[board])"
    )
    try:
        status, count = runtime.cudaGetDeviceCount()
    except RuntimeError:
        status, count = 1, 0
    if not int(status) and count:
        pytest.skip("this machine has a GPU")
    with pytest.raises(EnvironmentMismatch, match=r"cudaStreamCreate: .+"):
        Cuda()
