"""How far a model's answers are from another's: KL divergence per token, and how sure its mean is."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toolchain.errors import ShapeError

DRAWS = 2_000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and the bounds of its bootstrap interval. One cluster alone shows no spread: all three are equal."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} ({self.low:.4f} – {self.high:.4f})"

    def to_json(self) -> dict[str, float]:
        """{"kl", "kl_low", "kl_high"}, the keys of every figure of a divergence."""
        return {"kl": self.mean, "kl_low": self.low, "kl_high": self.high}


def log_probabilities(logits: Tensor) -> Tensor:
    """float32[..., v]: log-softmax over the last dimension."""
    return torch.log_softmax(logits.float(), dim=-1)


def token_divergences(reference: Tensor, other: Tensor) -> Tensor:
    """float32[t]: KL(p ‖ q) = Σ p · (log p − log q) in nats, a token each, from log-probabilities float32[t, v].

    Raises:
        ShapeError: the shapes differ.
    """
    if reference.shape != other.shape:
        raise ShapeError(
            f"expected log-probabilities of one shape, found {list(reference.shape)} and {list(other.shape)}"
        )
    return torch.where(reference > -torch.inf, reference.exp() * (reference - other), 0.0).sum(dim=-1)


def bootstrap(
    divergences: Sequence[Tensor], clusters: Sequence[Hashable], seed: int, draws: int = DRAWS, level: float = LEVEL
) -> Interval:
    """The mean over all tokens, and the interval its percentiles span when whole clusters are drawn again.

    Questions about one picture go wrong together, so pictures are drawn, not questions.

    Args:
        divergences: one [t_i] a sample.
        clusters: what each sample belongs to; equal values are one cluster.
    """
    place: dict[Hashable, int] = {}
    owner = torch.tensor([place.setdefault(cluster, len(place)) for cluster in clusters])
    sums, tokens = torch.zeros(2, len(place), dtype=torch.float64)
    sums.index_add_(0, owner, torch.stack([d.double().sum() for d in divergences]))
    tokens.index_add_(0, owner, torch.tensor([float(len(d)) for d in divergences], dtype=torch.float64))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(place), (draws, len(place)), generator=generator)
    means = sums[drawn].sum(dim=1) / tokens[drawn].sum(dim=1)
    tail = (1 - level) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(float(sums.sum() / tokens.sum()), low, high)
