"""Real column counts, ragged shapes and every number of tokens, on one row group or two of each library there is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_problems import ALL_CODES, PLUGINS, problem
from kernel_products import ALL_TOKENS, check_product, one_hot_rows
from layer_table import header, layer_shapes

from toolchain.native import launch

# 896 is the width of a 0.5B decoder, which no model of the table has.
COLUMNS = sorted({896, *(columns for _, columns in layer_shapes())})
RAGGED = [(1, 1), (1, 17), (127, 63), (129, 65), (130, 100), (200, 1176), (136, 15)]


@pytest.fixture
def kernels(emulated_kernels):
    """The emulated kernels as `check_product` wants them."""

    class Emulated:
        library, device, stream = emulated_kernels, "cpu", 0

    return Emulated


def test_the_table_in_c_is_the_models():
    table = PLUGINS.parent / "tests" / "plugins" / "kernels" / "layer_shapes.h"
    assert table.read_text(encoding="utf-8") == header()


# Every column count with three of the codes, numbers of tokens and rows, each taken in turn.
IN_TURN = [
    (columns, ALL_CODES[i % len(ALL_CODES)], (1, 5, 16, 33)[i % 4], (40, 136, 128)[i % 3])
    for i, columns in enumerate(COLUMNS * 3)
]
EVERY_COUNT = [(tokens, ALL_CODES[i % len(ALL_CODES)]) for i, tokens in enumerate(ALL_TOKENS)]
EVERY_SHAPE = [(shape, ALL_CODES[i % len(ALL_CODES)]) for i, shape in enumerate(RAGGED * 3)]


@pytest.mark.parametrize(("columns", "code", "tokens", "rows"), IN_TURN, ids=str)
def test_real_column_counts(kernels, columns, code, tokens, rows):
    check_product(kernels, problem((code, columns), rows=rows, seed=columns), tokens)


@pytest.mark.slow(reason="kernels of real widths on the emulator")
@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("code", ALL_CODES, ids=str)
def test_real_column_counts_in_every_code(kernels, code, columns, tokens):
    check_product(kernels, problem((code, columns), rows=136, seed=columns), tokens)


@pytest.mark.parametrize(("tokens", "code"), EVERY_COUNT, ids=str)
def test_every_number_of_tokens(kernels, tokens, code):
    check_product(kernels, problem((code, 400), rows=136, seed=tokens), tokens)


@pytest.mark.slow(reason="kernels of real widths on the emulator")
@pytest.mark.parametrize("tokens", ALL_TOKENS)
@pytest.mark.parametrize("code", ALL_CODES, ids=str)
def test_every_code_with_every_number_of_tokens(kernels, code, tokens):
    check_product(kernels, problem((code, 528), rows=300, seed=tokens), tokens)


@pytest.mark.parametrize(("shape", "code"), EVERY_SHAPE, ids=str)
@pytest.mark.parametrize("tokens", [3, 35])
def test_ragged_shapes_in_every_type(kernels, shape, code, tokens):
    given = problem((code, shape[1]), rows=shape[0], seed=tokens)
    for dtype in launch.ACTIVATIONS:
        check_product(kernels, given, tokens, dtype)


@pytest.mark.slow(reason="kernels of real widths on the emulator")
def test_the_head_of_a_7b_model(kernels):
    """152,064 x 3,584, whole: probes of the first columns see the first, middle and last rows' weights."""
    code = ALL_CODES[0]
    given = problem((code, 3584), rows=152064)
    weight = given.weight()
    x = next(one_hot_rows(3584, "cpu"))
    y = launch.linear(kernels.library, x, weight, None, 0)
    assert y.shape == (8, 152064)
    for begin in (0, 75_904, 152_064 - 128):
        part = problem_rows(given, begin)
        assert torch.equal(y[:, begin : begin + 128], torch.from_numpy(part.decoded()[:, :8]).half().T)


def problem_rows(given, begin: int):
    """128 rows of a problem of one segment as a problem of their own."""
    size = given.codes[0].codes_bytes(128, given.columns[0])
    at = begin // 128 * size
    return replace(
        given, rows=128, stored=(given.stored[0][at : at + size],), scales=(given.scales[0][begin : begin + 128],)
    )
