"""One codebook for many groups: trained on samples of all of them, each in the metric that its own sweep pays in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from toolchain.values import Segment, VQCode
from toolchain.vq.codebook import Samples, round_codebook
from toolchain.vq.factor import factor_moment
from toolchain.vq.scales import rms_scales
from toolchain.vq.segments import ROUNDING_DAMPING, damped_steps
from toolchain.vq.solve import draw_problem, train_samples
from toolchain.vq.weights import FixedCodebook, Options, stack_group


@dataclass(frozen=True)
class Piece:
    """A group, or a K-segment of one, as its sweep meets it: weights float32[m_i, n] at hand, S float32[n, n], and
    what damps it; `row_weights` as of `weights.stack_group`.
    """

    weights: list[Tensor]
    moment: Tensor
    damping: float
    row_weights: list[Tensor] | None = None

    @property
    def count(self) -> int:
        """Of its weights."""
        return sum(weight.numel() for weight in self.weights)


def pieces_of(
    weights: list[Tensor],
    moment: Tensor,
    segments: Sequence[Segment],
    damping: float,
    row_weights: list[Tensor] | None = None,
) -> list[Piece]:
    """The group as one piece, or a piece a segment in its metric D_s (`segments.segment_steps`).

    Args:
        weights: float32[m_i, n].
        moment: float32[n, n], the second moment H of their input.
    """
    if len(segments) == 1:
        return [Piece(weights, moment, damping, row_weights)]
    steps = damped_steps(moment, segments, damping)
    return [
        Piece(
            [weight[:, s.first : s.first + s.columns] for weight in weights],
            step.metric,
            ROUNDING_DAMPING,
            row_weights,
        )
        for s, step in zip(segments, steps, strict=True)
    ]


def draw_piece(piece: Piece, code: VQCode, count: int, generator: torch.Generator) -> Samples:
    """At most `count` vectors at unit row scale, in whole chunks where windows overlap.

    Metrics come with a mean trace of 1: what is then minimised is the share of its output that each piece loses, or
    one with high-energy inputs would have the codebook to itself.
    """
    problem = stack_group(piece.weights, piece.moment, code, searches_paths=True, row_weights=piece.row_weights)
    factors = factor_moment(problem.moment, problem.columns, code.vector, piece.damping)
    scales = rms_scales(problem.weight, problem.columns)
    found = draw_problem(problem, factors.pivots, scales, code, count, generator)
    mean = float(found.metrics.diagonal(dim1=1, dim2=2).sum(dim=1).mean())
    return replace(found, metrics=found.metrics / mean) if mean > 0 else found


@dataclass
class Pool:
    """Samples of all pieces that share a codebook of a code; each may give as many as its share of their weights."""

    code: VQCode
    weights: int
    drawn: list[Samples] = field(default_factory=list)

    def add(self, piece: Piece, samples: int, generator: torch.Generator) -> None:
        """Draw a piece's share of `samples` vectors."""
        share = max(1, round(samples * piece.count / self.weights))
        self.drawn.append(draw_piece(piece, self.code, share, generator))

    def codebook(self, options: Options, generator: torch.Generator) -> FixedCodebook:
        """The codebook of locally least loss over all that was drawn, as it is stored."""
        vectors, metrics = (torch.cat([getattr(one, name) for one in self.drawn]) for name in ("vectors", "metrics"))
        trained = train_samples(Samples(vectors, metrics), self.code, options.lloyd_rounds, generator)
        stored, step = round_codebook(*trained, self.code)
        return FixedCodebook(stored.contiguous(), step)
