"""Choosing the next token: greedy, or drawn after temperature, top-k and top-p, in this order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toolchain.errors import NumericGateError, UsageError


@dataclass(frozen=True)
class SamplingPlan:
    """How tokens are chosen.

    Args:
        temperature: logits are divided by it; 0 takes the most probable token and draws nothing.
        top_k: only this many of the most probable are drawn from; 0 for all.
        top_p: of those, the fewest that have this share together (Holtzman et al. 2019, arXiv 1904.09751).
        seed: equal seeds give equal tokens for equal logits.

    Raises:
        UsageError: a number is out of its range, or has no effect because the temperature is 0.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (np.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature {self.temperature}: expected a number of at least 0; 0 is greedy")
        if self.top_k < 0 or not 0 < self.top_p <= 1 or self.seed < 0:
            raise UsageError(
                f"expected top-k and seed of at least 0 and top-p in (0, 1], found {self.top_k}, {self.seed} and "
                f"{self.top_p}"
            )
        if self.temperature == 0 and (self.top_k, self.top_p, self.seed) != (0, 1.0, 0):
            raise UsageError(
                "top-k, top-p and seed have no effect at temperature 0, which is greedy; set a temperature such as 0.7 "
                "or leave them out"
            )


class Sampler:
    """Tokens after a plan; one generator for all of them."""

    def __init__(self, plan: SamplingPlan | None = None) -> None:
        self.plan = plan or SamplingPlan()
        self._generator = np.random.default_rng(self.plan.seed)

    def choose(self, logits: NDArray[np.floating]) -> int:
        """One token id from logits [vocabulary]; of equal largest ones the first where it is greedy.

        Raises:
            NumericGateError: the largest is no number or infinite, so that any choice would be noise.
        """
        if not np.isfinite(logits.max()):  # NaN anywhere makes the largest NaN
            raise NumericGateError(
                f"logits: expected finite ones, found {int(np.isnan(logits).sum())} NaN and "
                f"{int(np.isposinf(logits).sum())} infinite of {logits.size}; a matrix product overflowed: ask with "
                "--backend ort to see whether the engines are at fault, and report it"
            )
        if self.plan.temperature == 0:
            return int(np.argmax(logits))
        tokens, shares = kept_shares(logits, self.plan)
        place = np.searchsorted(np.cumsum(shares), self._generator.random(), side="right")
        return int(tokens[min(int(place), len(tokens) - 1)])


def kept_shares(logits: NDArray[np.floating], plan: SamplingPlan) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(token ids, their probabilities) that a plan draws from, the most probable first; of equals the lower id."""
    scaled = logits.astype(np.float64) / plan.temperature
    tokens = np.argsort(-scaled, kind="stable")
    if plan.top_k:
        tokens = tokens[: plan.top_k]
    shares = np.exp(scaled[tokens] - scaled[tokens[0]])
    shares /= shares.sum()
    # The first token is always kept; a token is kept while those before it do not have the share yet.
    kept = int(np.searchsorted(np.cumsum(shares)[:-1], plan.top_p, side="left")) + 1
    return tokens[:kept], shares[:kept] / shares[:kept].sum()
