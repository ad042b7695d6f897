"""A rotation keeps lengths and losses, spreads what stands out, and undoes itself."""

from __future__ import annotations

import pytest
import torch

from toolchain.errors import ShapeError
from toolchain.vq.rotation import (
    BLOCKS,
    block_of,
    hadamard,
    inverse_rotate,
    rotate,
    rotate_moment,
    rotation_block,
    rudin_shapiro,
)


def random_matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_the_block_by_hand():
    half = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    assert torch.equal(hadamard(4), half)
    assert rudin_shapiro(8).tolist() == [1, 1, 1, -1, 1, 1, -1, 1]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_is_orthogonal_exact_in_float16_and_spreads_a_constant_evenly(block):
    matrix = rotation_block(block)
    assert torch.equal(matrix @ matrix.T, torch.eye(block))
    assert torch.equal(matrix.half().float(), matrix)
    assert torch.equal((torch.ones(1, block) @ matrix).abs(), torch.ones(1, block))
    assert torch.equal(matrix.abs(), torch.full_like(matrix, block**-0.5))  # and so a lone column


@pytest.mark.parametrize(("columns", "block"), [(3584, 64), (18944, 64), (4304, 16), (1152, 64), (3420, 0), (17, 0)])
def test_blocks_of_published_layers(columns, block):
    assert block_of(columns) == block


@pytest.mark.parametrize("block", BLOCKS)
def test_weight_moment_and_inputs_turn_together(block):
    weight, inputs = random_matrix(7, 128), random_matrix(300, 128, 1)
    moment = inputs.T @ inputs
    turned, turned_inputs = rotate(weight, block), rotate(inputs, block)
    torch.testing.assert_close(turned_inputs @ turned.T, inputs @ weight.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rotate_moment(moment, block), turned_inputs.T @ turned_inputs, atol=1e-3, rtol=1e-4)
    before, after = (float(((w @ h) * w).sum()) for w, h in ((weight, moment), (turned, rotate_moment(moment, block))))
    assert after == pytest.approx(before, rel=1e-5)
    torch.testing.assert_close(inverse_rotate(turned, block), weight, atol=1e-6, rtol=0)


def test_it_serves_gradients_after_it_served_inference():
    with torch.inference_mode():
        rotate(random_matrix(2, 64).double(), 64)
    x = random_matrix(2, 64).double().requires_grad_()
    rotate(x, 64).sum().backward()
    torch.testing.assert_close(x.grad, rotation_block(64).double().sum(dim=1).expand(2, -1), atol=1e-12, rtol=0)


def test_other_blocks_and_columns_are_refused():
    with pytest.raises(ShapeError, match="expected one of"):
        rotation_block(32)
    with pytest.raises(ShapeError, match="expected columns in whole blocks, found 65"):
        rotate(random_matrix(2, 65), 64)
