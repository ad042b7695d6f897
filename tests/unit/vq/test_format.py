"""The format's definition, on cases worked by hand and as properties over every legal code."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain.errors import ShapeError, UnsupportedError
from toolchain.values import CODES, VQCode
from toolchain.vq import format as vq_format

ALL_CODES = [VQCode(v, k, window) for v in (2, 4) for k in range(1, 9) for window in range(k, 10)]


def random_symbols(code: VQCode, rows: int, columns: int, seed: int) -> np.ndarray:
    shape = (*code.chunk_shape(rows, columns), 16)
    return np.random.default_rng(seed).integers(0, 1 << code.shift, size=shape, dtype=np.uint8)


def chunk_at(codes: np.ndarray, code: VQCode, columns: int, group: int, column_chunk: int) -> np.ndarray:
    """A view of the bytes of chunk (R = 0, group, column_chunk)."""
    chunks = codes.reshape(*code.chunk_shape(128, columns), code.chunk_bytes)
    return chunks[0, group, column_chunk]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ALL_CODES), st.integers(1, 300), st.integers(1, 70), st.integers(0, 2**32))
def test_unpack_inverts_pack(code, rows, columns, seed):
    symbols = random_symbols(code, rows, columns, seed)
    codes = vq_format.pack(symbols, code)
    assert codes.shape == (code.codes_bytes(rows, columns),)
    assert np.array_equal(vq_format.unpack(codes, code, rows, columns), symbols)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ALL_CODES), st.integers(1, 300), st.integers(1, 70), st.integers(0, 2**32))
def test_device_order_is_a_permutation_with_an_exact_inverse(code, rows, columns, seed):
    size = code.codes_bytes(rows, columns)
    codes = np.random.default_rng(seed).integers(0, 256, size=size, dtype=np.uint8)
    device = vq_format.device_from_checkpoint(codes, code, rows, columns)
    assert np.array_equal(vq_format.checkpoint_from_device(device, code, rows, columns), codes)
    places = vq_format.device_from_checkpoint(np.arange(size), code, rows, columns)
    assert np.array_equal(np.sort(places), np.arange(size))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 12), st.integers(0, 2**32))
def test_chunks_and_matrix_are_inverse(row_groups, column_chunks, seed):
    matrix = np.random.default_rng(seed).integers(0, 256, size=(128 * row_groups, column_chunks), dtype=np.uint8)
    code = CODES["4,8,8"]
    assert np.array_equal(vq_format.matrix_from_chunks(vq_format.chunks_from_matrix(matrix, code)), matrix)


@pytest.mark.parametrize("code", [c for c in ALL_CODES if c.window == c.shift], ids=str)
def test_plain_windows_are_the_symbols(code):
    symbols = random_symbols(code, 128, 16, seed=1)
    assert np.array_equal(vq_format.windows_from_symbols(symbols, code), symbols)


def test_decode_of_a_quad_by_hand():
    code, columns = CODES["4,8,8"], 16
    codes = np.zeros(code.codes_bytes(128, columns), dtype=np.uint8)
    chunk_at(codes, code, columns, group=3, column_chunk=1)[2] = 5  # window 2 of group 3: row 3 + 8 · 2 = 19
    codebook = np.zeros((256, 4), dtype=np.int8)
    codebook[5] = (1, -2, 3, -128)
    scales = np.full(128, 0.5, dtype=np.float16)
    decoded = vq_format.decode(codes, codebook, scales, code, 128, columns)
    expected = np.zeros((128, columns), dtype=np.float32)
    expected[19, 4:8] = (0.5, -1, 1.5, -64)
    assert np.array_equal(decoded, expected)


def test_decode_of_six_bit_symbols_by_hand():
    code, columns = CODES["2,6,6"], 16
    codes = np.zeros(code.codes_bytes(128, columns), dtype=np.uint8)
    # Symbols 1 and 33 first: 000001 100001 0000…, in bytes 00000110 00010000. Rows 1 and 9 of group 1, columns 4 and 5.
    chunk_at(codes, code, columns, group=1, column_chunk=2)[:2] = (0b00000110, 0b00010000)
    codebook = np.zeros((64, 2), dtype=np.float16)
    codebook[1], codebook[33] = (1.5, -2), (0.25, 8)
    scales = np.ones(128, dtype=np.float16)
    scales[9] = 3
    decoded = vq_format.decode(codes, codebook, scales, code, 128, columns)
    expected = np.zeros((128, columns), dtype=np.float32)
    expected[1, 4:6], expected[9, 4:6] = (1.5, -2), (0.75, 24)
    assert np.array_equal(decoded, expected)


def test_overlapping_windows_wrap_inside_the_chunk_by_hand():
    code = VQCode(2, 4, 8)
    codes = np.zeros(code.codes_bytes(128, 16), dtype=np.uint8)
    chunk_at(codes, code, 16, group=0, column_chunk=0)[:] = (0xAB, 0, 0, 0, 0, 0, 0, 0xC5)
    windows = vq_format.windows_from_symbols(vq_format.unpack(codes, code, 128, 16), code)[0, 0, 0]
    assert windows.tolist() == [0xAB, 0xB0, *[0] * 11, 0x0C, 0xC5, 0x5A]


def test_device_order_of_quads_by_hand():
    code, columns = CODES["4,8,8"], 32
    codes = np.zeros(code.codes_bytes(128, columns), dtype=np.uint8)
    chunk_at(codes, code, columns, group=2, column_chunk=5)[:] = range(1, 17)
    device = vq_format.device_from_checkpoint(codes, code, 128, columns)
    at = (32 + 4 * 2 + 1) * 16  # column block 1, lane 4 · 2 + quarter 1
    assert device[at : at + 16].tolist() == list(range(1, 17))
    assert np.count_nonzero(device) == 16


def test_device_order_of_pairs_splits_lanes_in_planes_by_hand():
    code = CODES["2,6,6"]
    codes = np.zeros(code.codes_bytes(128, 16), dtype=np.uint8)
    chunk_at(codes, code, 16, group=1, column_chunk=6)[:] = range(1, 13)
    device = vq_format.device_from_checkpoint(codes, code, 128, 16)
    # Lane 4 · 1 + 2, second half: its bytes 12 to 23, four in the plane of 16 and eight in the plane of 8.
    assert device[6 * 16 + 12 : 6 * 16 + 16].tolist() == [1, 2, 3, 4]
    assert device[32 * 16 + 6 * 8 : 32 * 16 + 6 * 8 + 8].tolist() == [5, 6, 7, 8, 9, 10, 11, 12]


def test_wrong_shapes_are_refused():
    code = CODES["4,8,8"]
    codebook, scales = np.zeros((256, 4), dtype=np.int8), np.zeros(128, dtype=np.float16)
    codes = np.zeros(code.codes_bytes(128, 16), dtype=np.uint8)
    with pytest.raises(ShapeError, match=r"expected uint8\[512\]"):
        vq_format.decode(codes[:-1], codebook, scales, code, 128, 16)
    with pytest.raises(ShapeError, match=r"expected int8\[256, 4\]"):
        vq_format.decode(codes, codebook[:, :2], scales, code, 128, 16)
    with pytest.raises(ShapeError, match=r"scales of shape \[100\]"):
        vq_format.decode(codes, codebook, scales, code, 100, 16)
    with pytest.raises(ShapeError, match="symbol 64 does not fit 6 bits"):
        vq_format.pack(np.full((1, 8, 8, 16), 64, dtype=np.uint8), CODES["2,6,6"])


@pytest.mark.parametrize("text", ["4,8", "4,8,x", "3,8,8", "4,9,9", "4,8,7", "2,0,4"])
def test_illegal_codes_are_refused(text):
    with pytest.raises(UnsupportedError, match="code"):
        VQCode.parse(text)
