"""The C++ reference is the format: bit for bit the NumPy decoder, and exact where sums are."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from kernel_problems import ALL_CODES, SEGMENTED, Problem, problem

from toolchain.native.library import CMatrix, Segment, matrix

SHAPES = [(1, 1), (128, 16), (130, 33), (300, 72), (257, 100)]


class Call:
    """A problem in host memory, and calls of the reference on it."""

    def __init__(self, library: ctypes.CDLL, given: Problem) -> None:
        self.library, self.given = library, given
        self.arrays = (given.in_device_order(), given.tables, given.scales)  # the structure points into them
        each = zip(given.codes, given.columns, *self.arrays, strict=True)
        segments = tuple(Segment(code, n, *(a.ctypes.data for a in arrays)) for code, n, *arrays in each)
        self.matrix: CMatrix = matrix(segments, given.rows)
        self.shape = given.rows, sum(given.columns)

    def decode(self) -> np.ndarray:
        out = np.full(self.shape, np.nan, dtype=np.float32)
        self.run("decode", out)
        return out

    def linear(self, x: np.ndarray, bias: np.ndarray | None, in_float: bool = False) -> np.ndarray:
        out = np.full((len(x), self.shape[0]), np.nan, dtype=np.float32 if in_float else np.float64)
        rest = () if in_float else (None,)
        self.run("linear_float" if in_float else "linear", x, bias, len(x), out, *rest)
        return out

    def run(self, name: str, *arguments) -> None:
        pointers = [
            ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else a if a is None else ctypes.c_int64(a)
            for a in arguments
        ]
        status = getattr(self.library, f"mgvq_reference_{name}")(ctypes.byref(self.matrix), *pointers)
        assert status == 0, self.library.mgvq_reference_reason()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("code", ALL_CODES, ids=str)
def test_decode_is_the_formats_bit_for_bit(reference, code, shape):
    rows, columns = shape
    given = problem((code, columns), rows=rows, seed=rows)
    assert np.array_equal(Call(reference, given).decode(), given.decoded())


@pytest.mark.parametrize("rows", [5, 200])
def test_segments_stand_side_by_side(reference, rows):
    given = problem(*SEGMENTED, rows=rows)
    assert np.array_equal(Call(reference, given).decode(), given.decoded())


@pytest.mark.parametrize("segments", [*([(code, 50)] for code in ALL_CODES), SEGMENTED], ids=str)
def test_linears_are_exact_where_sums_are(reference, segments):
    given = problem(*segments, rows=131, seed=1, is_exact=True)
    rng = np.random.default_rng(2)
    x = rng.integers(-16, 17, size=(3, sum(given.columns))).astype(np.float32)
    bias = rng.integers(-100, 101, size=given.rows).astype(np.float32)
    expected = x.astype(np.float64) @ given.decoded().astype(np.float64).T + bias
    call = Call(reference, given)
    assert np.array_equal(call.linear(x, bias), expected)
    assert np.array_equal(call.linear(x, bias, in_float=True), expected)
    assert np.array_equal(call.linear(x, None), expected - bias)


def test_linear_in_float_is_near_the_one_in_double(reference):
    given = problem(*SEGMENTED, rows=40)
    x = np.random.default_rng(0).normal(size=(2, sum(given.columns))).astype(np.float32)
    call = Call(reference, given)
    magnitude = np.abs(x.astype(np.float64)) @ np.abs(given.decoded().astype(np.float64)).T
    # Sums of n terms one after another: at most n half units of float32 in the last place of Σ|w·x|, and rarely near.
    used = np.abs(call.linear(x, None, in_float=True) - call.linear(x, None)) / (232 * 2.0**-24 * magnitude)
    print(f"share of the bound used: {used.max():.3f}")
    assert used.max() <= 1


def test_embedding_rows_are_the_weights(reference):
    given = problem(*SEGMENTED, rows=140)
    ids = np.array([139, 0, -1, 77, 140, 139], dtype=np.int64)
    out = np.full((len(ids), sum(given.columns)), np.nan, dtype=np.float32)
    Call(reference, given).run("embedding", ids, len(ids), out)
    is_row = (ids >= 0) & (ids < 140)
    assert np.array_equal(out[is_row], given.decoded()[ids[is_row]])
    assert not out[~is_row].any()


def test_half_conversions_are_numpys(reference):
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bits.view(np.float16).astype(np.float32)
    found = np.array([reference.mgvq_reference_float_from_half(b) for b in bits.tolist()], dtype=np.float32)
    assert np.array_equal(found, values, equal_nan=True)
    rng = np.random.default_rng(0)
    floats = rng.integers(0, 1 << 32, size=20_000, dtype=np.uint32).view(np.float32)
    more = (rng.normal(size=20_000), rng.uniform(-7e4, 7e4, size=20_000))
    floats = np.concatenate([floats[~np.isnan(floats)], *(x.astype(np.float32) for x in more)])
    with np.errstate(over="ignore"):
        expected = floats.astype(np.float16).view(np.uint16)
    halves = np.array([reference.mgvq_reference_half_from_float(f) for f in floats.tolist()], dtype=np.uint16)
    assert np.array_equal(halves, expected)
