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

    def to_json(self, name: str = "kl") -> dict[str, float]:
        """{name, name_low, name_high}: with "kl", the keys of every figure of a divergence."""
        return {name: self.mean, f"{name}_low": self.low, f"{name}_high": self.high}


@dataclass(frozen=True)
class Paired:
    """One model's divergence beside another's, both over the same drawn images.

    `ratio` is theirs over the other's, None where the other's is zero; `difference` is theirs less the other's.
    """

    ratio: Interval | None
    difference: Interval


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

    Questions about one image go wrong together, so images are drawn, not questions.

    Args:
        divergences: one [t_i] a sample.
        clusters: what each sample belongs to; equal values are one cluster.
    """
    sums, tokens = _cluster_sums(divergences, clusters)
    drawn = _draw_clusters(len(sums), seed, draws)
    means = sums[drawn].sum(dim=1) / tokens[drawn].sum(dim=1)
    return _interval(float(sums.sum() / tokens.sum()), means, level)


def paired_bootstrap(
    divergences: Sequence[Tensor],
    others: Sequence[Tensor],
    clusters: Sequence[Hashable],
    seed: int,
    draws: int = DRAWS,
    level: float = LEVEL,
) -> Paired:
    """The ratio and the difference of two means over the same tokens, and the intervals of both.

    Every draw takes the same clusters for both models, so that what makes an image hard for both cancels. With the
    same seed the clusters drawn are those of `bootstrap`.

    Args:
        divergences: one [t_i] a sample, nats.
        others: the same of the model it is held against.

    Raises:
        ShapeError: the two are not of the same samples and tokens.
    """
    lengths, expected = [len(d) for d in divergences], [len(d) for d in others]
    if lengths != expected:
        raise ShapeError(f"expected two models asked about the same tokens, found {lengths} and {expected} of them")
    sums, tokens = _cluster_sums(divergences, clusters)
    other_sums, _ = _cluster_sums(others, clusters)
    drawn = _draw_clusters(len(sums), seed, draws)
    mine, theirs, count = (x[drawn].sum(dim=1) for x in (sums, other_sums, tokens))
    apart = _interval(float((sums.sum() - other_sums.sum()) / tokens.sum()), (mine - theirs) / count, level)
    if not bool((theirs > 0).all()):
        return Paired(None, apart)
    return Paired(_interval(float(sums.sum() / other_sums.sum()), mine / theirs, level), apart)


def _cluster_sums(divergences: Sequence[Tensor], clusters: Sequence[Hashable]) -> tuple[Tensor, Tensor]:
    """(Σ of the divergences, tokens), float64[clusters] each."""
    place: dict[Hashable, int] = {}
    owner = torch.tensor([place.setdefault(cluster, len(place)) for cluster in clusters])
    sums, tokens = torch.zeros(2, len(place), dtype=torch.float64)
    sums.index_add_(0, owner, torch.stack([d.double().sum() for d in divergences]))
    tokens.index_add_(0, owner, torch.tensor([float(len(d)) for d in divergences], dtype=torch.float64))
    return sums, tokens


def _draw_clusters(count: int, seed: int, draws: int) -> Tensor:
    """int64[draws, count]: as many clusters as there are, drawn with replacement."""
    return torch.randint(count, (draws, count), generator=torch.Generator().manual_seed(seed))


def _interval(mean: float, drawn: Tensor, level: float) -> Interval:
    tail = (1 - level) / 2
    low, high = torch.quantile(drawn, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(mean, low, high)
