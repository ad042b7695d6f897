"""Coordinate descent on tr(S_o E S Eᵀ): codes are chosen again, each given all others, until few gain from it.

For column block k, with B = E S[:, k] and G = S_o B, row i's best code given the others is the nearest to
T_i = Ŵ_i − G_i S_kk⁻¹ / (S_o)_ii in the metric S_kk (mgvq-algorithm 2.6, equation 12; QuIP#'s tuning iterations where
S_o = I). One-sided feedback and a few such sweeps come to what two-sided feedback does, without its wavefront.

Rows are taken in subsets of whole chunks, all chunks of a subset at once. Where S_o couples them the choices are made
apart and taken together as far as the exact change of the objective allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toolchain.values import CHUNK_ROWS, ROW_STRIDE, VQCode
from toolchain.vq.assign import SCORES_AT_A_TIME
from toolchain.vq.kronecker import Objective, RowBlock
from toolchain.vq.solve import Solution, weighted_loss
from toolchain.vq.trellis import chunk_rows, tail_biting_paths
from toolchain.vq.weights import Problem, decode_stacked

# A change is taken where it gains more than this share of its own curvature: float32 knows the gain no better.
NOISE = 1e-5


@dataclass(frozen=True)
class Descent:
    """How codes are descended on.

    `subsets` parts the rows where S_o couples them: chunk g of its row group (or row g, where L = k) is in subset
    g mod subsets, and the rows of one subset are chosen at once. `least_gain` is what a changed chunk (a row, where
    L = k) must take off the objective. Sweeps end early when one takes off less than `least_share`.
    """

    sweeps: int = 4
    subsets: int = 8
    batch_columns: int = 128
    least_share: float = 1e-3
    least_gain: float = 0.0


def descend(
    problem: Problem,
    start: Solution,
    code: VQCode,
    damped: Tensor,
    row_factors: Sequence[Tensor | None] | None = None,
    settings: Descent | None = None,
) -> Solution:
    """The start's codes after sweeps of coordinate descent, with its codebook and scales; never worse than the start.

    Args:
        problem: W* and the layers' rows.
        start: of that problem.
        damped: float32[n, n], S: `Factors.damped` of the problem's moment.
        row_factors: S_o float32[m_i, m_i] a layer, of mean diagonal 1, damped; None, for a layer or for all, where
            rows are not coupled and count as `problem.row_weights`.

    Returns:
        Its `loss` is the problem's own, Σ r e H eᵀ; `kronecker.Objective.loss` tells what was descended on.
    """
    settings = settings or Descent()
    objective = Objective.of(problem, damped, row_factors)
    indices = start.indices.clone()
    entries, scales = start.codebook.float(), start.scales.float()
    for block in objective.blocks:
        rows = block.rows
        state = _State.of(block, objective, indices[rows], entries, scales[rows], code, settings)
        indices[rows] = state.descended(settings).to(indices.dtype)
    decoded = decode_stacked(indices, start.codebook, start.scales)
    if objective.loss(decoded) >= objective.loss(start.decode()):
        return start
    return Solution(indices, start.codebook, start.scales, weighted_loss(problem, decoded))


def search_order(rows: int, code: VQCode, subsets: int) -> tuple[Tensor, list[slice]]:
    """(order int64[m], spans): rows as they are searched, chunk after chunk, and the rows of each subset in it."""
    if code.window == code.shift:
        units = torch.arange(rows)[:, None]
        subset = units[:, 0] % subsets
    else:
        chunk = torch.arange(rows // CHUNK_ROWS)
        units = chunk_rows(chunk // ROW_STRIDE, chunk % ROW_STRIDE)
        subset = chunk % ROW_STRIDE % subsets
    parts = [units[subset == number].flatten() for number in range(subsets)]
    spans, first = [], 0
    for part in parts:
        if len(part):
            spans.append(slice(first, first + len(part)))
            first += len(part)
    return torch.cat(parts), spans


@dataclass
class _State:
    """Rows of one block in search order while codes change; E = Ŵ − W follows them."""

    code: VQCode
    moment: Tensor
    entries: Tensor
    features: Tensor  # [n / V, 2^L, V + 1]: entries, and their squared length in each S_kk
    order: Tensor
    spans: list[slice]
    factor: Tensor | None
    counts: Tensor
    scales: Tensor
    indices: Tensor
    weight: Tensor
    error: Tensor
    taken: float = 0.0  # off the objective, so far in this sweep

    @classmethod
    def of(
        cls,
        block: RowBlock,
        objective: Objective,
        indices: Tensor,
        entries: Tensor,
        scales: Tensor,
        code: VQCode,
        settings: Descent,
    ) -> _State:
        order, spans = search_order(len(indices), code, 1 if block.factor is None else settings.subsets)
        order = order.to(indices.device)
        weight, scales, indices = objective.weight[block.rows][order], scales[order], indices[order].long()
        vector = code.vector
        blocks = objective.moment.reshape(-1, vector, len(objective.moment) // vector, vector)
        metrics = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        norms = torch.einsum("kv,bvw,kw->bk", entries, metrics, entries)
        return cls(
            code=code,
            moment=objective.moment,
            entries=entries,
            features=torch.cat([entries.expand(len(norms), -1, -1), norms[:, :, None]], dim=2),
            order=order,
            spans=spans,
            factor=None if block.factor is None else block.factor[order][:, order].contiguous(),
            counts=block.counts[order],
            scales=scales,
            indices=indices,
            weight=weight,
            error=decode_stacked(indices, entries, scales) - weight,
        )

    def descended(self, settings: Descent) -> Tensor:
        """int64[m, n / V] indices after the sweeps, rows in their own order."""
        for _ in range(settings.sweeps):
            self.taken = 0.0
            left = self._sweep(settings)
            if self.taken <= settings.least_share * left:
                break
        found = torch.empty_like(self.indices)
        found[self.order] = self.indices
        return found

    def _sweep(self, settings: Descent) -> float:
        """One pass over all columns; the objective before it."""
        vector, columns = self.code.vector, len(self.moment)
        before = 0.0
        gains = []
        for first in range(0, columns, settings.batch_columns):
            last = min(first + settings.batch_columns, columns)
            pulled = self.error @ self.moment[:, first:last]
            for at in range(first, last, vector):
                block = slice(at, at + vector)
                old = self.error[:, block].clone()
                here = pulled[:, at - first : at - first + vector]
                gains += [self._update(at // vector, span, here, settings.least_gain) for span in self.spans]
                rest = slice(at + vector, last)
                pulled[:, at - first + vector :] += (self.error[:, block] - old) @ self.moment[block, rest]
        self.taken = -float(torch.stack(gains).sum(dtype=torch.float64))
        coupled = self.error @ self.moment
        coupled = self.counts[:, None] * coupled if self.factor is None else self.factor @ coupled
        before = float((coupled * self.error).sum(dtype=torch.float64)) + self.taken
        return before

    def _update(self, number: int, span: slice, here: Tensor, least_gain: float) -> Tensor:
        """Choose codes of column block `number` for the rows of one subset; the change of the objective.

        Args:
            here: float32[m, V], B = E S[:, k], kept up to date.
        """
        vector = self.code.vector
        block = slice(number * vector, (number + 1) * vector)
        metric = self.moment[block, block]
        counts, scales = self.counts[span], self.scales[span]
        gradient = counts[:, None] * here[span] if self.factor is None else self.factor[span] @ here
        old = self.indices[span, number]
        decoded = self.entries[old] * scales[:, None]
        # (T − a c) S_kk (T − a c)ᵀ in the coefficients of c and of c S_kk cᵀ; S_kk is never inverted.
        linear = (2 * scales)[:, None] * (gradient - counts[:, None] * (decoded @ metric))
        queries = torch.cat([linear, (counts * scales.square())[:, None]], dim=1)
        chosen = self._search(queries, self.features[number])
        change = self.entries[chosen] * scales[:, None] - decoded
        taken, gain = self._accept(change, gradient, metric, span, least_gain)
        change = change * taken[:, None]
        self.indices[span, number] = torch.where(taken, chosen, old)
        self.error[span, block] += change
        here[span] += change @ metric
        return gain

    def _search(self, queries: Tensor, features: Tensor) -> Tensor:
        """int64[m]: the cheapest entry of every row, or the windows of the cheapest tail-biting path of every chunk."""
        if self.code.window > self.code.shift:
            chunks = queries.view(-1, CHUNK_ROWS, queries.shape[1]).permute(1, 2, 0)
            return tail_biting_paths(chunks, features, self.code).T.reshape(-1)
        rows = max(1, SCORES_AT_A_TIME // len(features))
        return torch.cat([(part @ features.T).argmin(dim=1) for part in queries.split(rows)])

    def _accept(
        self, change: Tensor, gradient: Tensor, metric: Tensor, span: slice, least_gain: float
    ) -> tuple[Tensor, Tensor]:
        """(bool[m] rows whose change is taken, float32[] what it adds to the objective), whole chunks at a time.

        The change of a set of chunks A is Σ_A d_c + Σ_{c ≠ c' in A} M_cc'. Taken are all chunks that gain alone, or
        those that gain even if every M counts against them, which is sure to gain: whichever gains more.
        """
        size = CHUNK_ROWS if self.code.window > self.code.shift else 1
        pulled = change @ metric
        linear = 2 * (change * gradient).sum(dim=1)
        if self.factor is None:
            curved = self.counts[span] * (change * pulled).sum(dim=1)
            own = (linear + curved).view(-1, size).sum(dim=1)
            taken = own < -(NOISE * curved.view(-1, size).sum(dim=1) + least_gain)
            return taken.repeat_interleave(size), (own * taken).sum()
        pairs = self.factor[span, span] * (pulled @ change.T)
        if size > 1:
            chunks = len(pairs) // size
            pairs = pairs.view(chunks, size, chunks, size).sum(dim=(1, 3))
        curved = pairs.diagonal()
        own = linear.view(-1, size).sum(dim=1) + curved
        limit = -(NOISE * curved + least_gain)
        willing = own < limit
        cross = pairs - torch.diag(curved)
        safe = willing & (own + cross.abs() @ willing.to(cross.dtype) < limit)
        tried = torch.stack([safe, willing]).to(own.dtype)
        totals = tried @ own + ((tried @ cross) * tried).sum(dim=1)
        best = totals.argmin()
        return torch.stack([safe, willing])[best].repeat_interleave(size), totals[best]
