"""The plugins' self-test: exact answers, stored and read back, and a wrong kernel that it catches."""

from __future__ import annotations

import numpy as np
import pytest
from board_bundles import correct_plugin
from simulated_cuda import SimulatedCuda

from toolchain.device.runtime import board as boards
from toolchain.device.runtime import selftest
from toolchain.device.runtime.cuda import Cuda
from toolchain.errors import InputDataError, NumericGateError
from toolchain.values import CODES


class TestSelfTest:
    def test_answers_are_exact_in_any_order_of_sums(self):
        """Worked the other way round, in float64 and with columns reversed: the same bits."""
        for case in selftest.make_cases(CODES.values()):
            assert case.expected.dtype == np.float32
            assert np.array_equal(case.expected, correct_plugin(case.op, _fields(case), list(case.inputs.values())))
            if case.op != selftest.LINEAR:
                continue
            stored = [case.inputs[key] for key in ("codes", "table", "scales")]
            unit = correct_plugin(selftest.EMBEDDING, _fields(case), [np.arange(case.rows), *stored])
            x, bias = case.inputs["x"].astype(np.float64), case.inputs["bias"]
            slow = x[:, ::-1] @ unit.astype(np.float64).T[::-1] + bias
            assert np.array_equal(case.expected.astype(np.float64), slow)
            assert np.array_equal(case.inputs["x"], case.inputs["x"].astype(np.float16))

    def test_what_is_stored_comes_back_and_equal_codes_give_equal_bytes(self, tmp_path):
        for name in ("a", "b"):
            selftest.write_cases([CODES["2,3,8"], CODES["4,8,9"]], tmp_path / name)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        made, read = selftest.make_cases([CODES["4,8,9"], CODES["2,3,8"]]), selftest.read_cases(tmp_path / "a")
        assert [case.name for case in made] == [case.name for case in read]
        for one, other in zip(made, read):
            assert one.inputs.keys() == other.inputs.keys()
            assert all(np.array_equal(one.inputs[key], other.inputs[key]) for key in one.inputs)
            assert np.array_equal(one.expected, other.expected)

    def test_a_file_that_is_no_self_test(self, tmp_path):
        (tmp_path / "x").write_bytes(b"12345678")
        with pytest.raises(InputDataError, match="expected the plugins' self-test"):
            selftest.read_cases(tmp_path / "x")

    def test_the_kernels_library_passes_and_a_wrong_answer_is_caught(self, tmp_path_factory):
        """The C++ reference behind kernels.h, through the same ctypes calls that reach the CUDA kernels."""
        from kernel_problems import PLUGINS, ROOT, compiled

        from toolchain.native.library import KernelLibrary

        tests = ROOT / "tests" / "plugins"
        sources = [tests / "reference_kernels.cpp", PLUGINS / "vq_linear" / "reference.cpp"]
        path = compiled(tmp_path_factory.mktemp("k"), "libreference.so", sources, [PLUGINS, tests / "without_cuda"])
        cuda, cases = SimulatedCuda(), selftest.make_cases(CODES.values())
        selftest.check_kernels(KernelLibrary(path), Cuda(cuda), cases)
        assert cuda.sizes == {}
        cases[5].expected[0, 3] += 1
        with pytest.raises(NumericGateError, match=r"libreference.so gives .* at \(0, 3\).*1 of \d+ differ"):
            selftest.check_kernels(KernelLibrary(path), Cuda(SimulatedCuda()), cases)

    @pytest.mark.gpu
    def test_the_kernels_pass_on_a_gpu(self):
        from toolchain.native.library import find_library, load_library

        pytest.importorskip("cuda.bindings.runtime", reason="needs CUDA's Python bindings (pip install cuda-python)")
        if boards.gpu() is None:
            pytest.skip("needs a CUDA device")
        if find_library() is None:
            pytest.skip("needs the kernels' library (mgvq kernels build)")
        selftest.check_kernels(load_library(), Cuda(), selftest.make_cases(CODES.values()))


def _fields(case) -> dict[str, int]:
    code = case.code
    return {
        "rows": case.rows, "columns": case.columns, "vector": code.vector, "shift": code.shift, "window": code.window,
    }  # fmt: skip
