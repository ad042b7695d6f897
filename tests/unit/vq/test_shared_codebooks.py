"""One codebook for many groups: drawn in each one's own metric, none drowned by one of large inputs, better than any
one's own.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layer_problems import random_layer

from toolchain.values import CODES, parse_format
from toolchain.vq.factor import factor_moment
from toolchain.vq.shared_codebooks import Piece, Pool, draw_piece, pieces_of
from toolchain.vq.solve import quantize_group
from toolchain.vq.weights import Options

FAST = Options(lloyd_rounds=6, samples=6_000)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def piece(rows: int, columns: int, seed: int) -> Piece:
    weight, moment = random_layer(rows, columns, seed)
    return Piece([weight], moment, FAST.damping)


def heavy(rows: int, columns: int, seed: int) -> Piece:
    """One whose weights have far heavier tails."""
    one = piece(rows, columns, seed)
    tails = torch.exp(0.9 * torch.randn(rows, columns, generator=generator(seed)))
    return replace(one, weights=[one.weights[0] * tails])


def pooled(pieces, code):
    pool = Pool(code, sum(one.count for one in pieces))
    for number, one in enumerate(pieces):
        pool.add(one, FAST.samples, generator(number))
    return pool


def loss(one: Piece, code, codebook) -> float:
    """The share of its output that a piece loses with a codebook that is given."""
    options = replace(FAST, codebooks={code: codebook})
    group = quantize_group(one.weights, one.moment, code, options, generator())
    return group.loss / sum(group.references)


@pytest.mark.parametrize("name", ["4,8,8", "2,4,8"])
def test_how_loud_a_piece_is_changes_nothing(name):
    one = piece(130, 64, 0)
    loud = replace(one, moment=4096 * one.moment, weights=[w / 32 for w in one.weights])
    first, second = (draw_piece(p, CODES[name], 2_000, generator()) for p in (one, loud))
    torch.testing.assert_close(first.vectors, second.vectors)
    torch.testing.assert_close(first.metrics, second.metrics, rtol=1e-3, atol=1e-5)
    assert float(first.metrics.diagonal(dim1=1, dim2=2).sum(dim=1).mean()) == pytest.approx(1, rel=1e-4)


def test_pieces_draw_by_their_share_of_the_weights():
    pool = pooled([piece(128, 64, 0), piece(384, 64, 1)], CODES["4,8,8"])
    assert [len(drawn.vectors) for drawn in pool.drawn] == [1_500, 4_500]


@pytest.mark.parametrize("name", ["4,8,8", "2,4,8"])
def test_a_joint_codebook_serves_both_better_than_the_others_own(name):
    code = CODES[name]
    plain, tailed = piece(256, 64, 0), heavy(256, 64, 1)
    joint = pooled([plain, tailed], code).codebook(FAST, generator())
    own = [pooled([one], code).codebook(FAST, generator()) for one in (plain, tailed)]
    assert loss(tailed, code, joint) < loss(tailed, code, own[0])
    both = [loss(plain, code, codebook) + loss(tailed, code, codebook) for codebook in (joint, *own)]
    assert both[0] == min(both)


def test_a_pool_of_one_piece_is_as_good_as_its_own_codebook():
    code, one = CODES["2,4,8"], piece(256, 64, 2)
    given = pooled([one], code).codebook(FAST, generator())
    own = quantize_group(one.weights, one.moment, code, replace(FAST, rounds=1), generator())
    assert loss(one, code, given) < 1.05 * own.loss / sum(own.references)


def test_segments_are_drawn_in_the_pivots_of_one_sweep_over_all_columns():
    weight, moment = random_layer(128, 128)
    whole = factor_moment(moment, 128, 2, FAST.damping).pivots
    segments = parse_format("2,6,8@64+2,3,8", 128)
    first, second = pieces_of([weight], moment, segments, FAST.damping)
    assert torch.equal(torch.cat([first.weights[0], second.weights[0]], dim=1), weight)
    found = [factor_moment(one.moment, 64, 2, one.damping).pivots for one in (first, second)]
    torch.testing.assert_close(torch.cat(found), whole, rtol=1e-2, atol=1e-6 * float(whole.max()))


def test_the_same_seeds_give_the_same_bytes():
    pieces = [piece(128, 64, 0), heavy(128, 32, 1)]
    codebooks = [pooled(pieces, CODES["4,8,9"]).codebook(FAST, generator(7)) for _ in range(2)]
    assert torch.equal(codebooks[0].stored, codebooks[1].stored)
    assert codebooks[0].step == codebooks[1].step
