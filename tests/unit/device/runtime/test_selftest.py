"""The plugins' self-test: exact answers, stored and read back, and a wrong kernel that it catches."""

from __future__ import annotations

import numpy as np
import pytest
from board_bundles import correct_plugin

from toolchain.device.runtime import selftest
from toolchain.errors import InputDataError
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


def _fields(case) -> dict[str, int]:
    code = case.code
    return {
        "rows": case.rows, "columns": case.columns, "vector": code.vector, "shift": code.shift, "window": code.window,
    }  # fmt: skip
