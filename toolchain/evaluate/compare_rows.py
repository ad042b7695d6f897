"""What was measured of a method, as one row of `compare.compare_methods`: means over seeds, intervals, ratios."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from toolchain.bits.bitplan import BitCount
from toolchain.vq.divergence import Interval, bootstrap, paired_bootstrap

FULL_PRECISION = "fp"
PAIRED = ("kl_ratio", "kl_difference")
ERRORS = ("relative_error", "error_text", "error_image", "error_both")


@dataclass(frozen=True)
class Measured:
    """A model quantized with one seed: what it costs, how its layers came out, how its answers moved.

    `divergences` are float32[t_i] a sample, KL(full precision ‖ model) in nats at each token of the answer; `layers` as
    in a row; `accuracy` 0 to 1.
    """

    seed: int
    bits: dict[str, BitCount]
    layers: tuple[dict[str, Any], ...]
    seconds: float
    accuracy: float
    divergences: tuple[Tensor, ...]


@dataclass(frozen=True)
class Images:
    """Which image each sample belongs to, and the seed that draws images again."""

    clusters: tuple[Hashable, ...]
    seed: int


def full_precision_row(bits: float, size: int, accuracy: float) -> dict[str, Any]:
    """The first row: bits a weight and bytes of the file, no divergence from itself, nothing quantized."""
    none: dict[str, Any] = {"index_bits": None, "requested_bits": None}
    rest: dict[str, Any] = {"accuracy": accuracy, "seconds": 0.0, "seeds": [], "per_seed": [], "layers": []}
    costs = {"bits": bits, "language_bits": bits, "bytes": size}
    return {"method": FULL_PRECISION} | costs | none | Interval(0.0, 0.0, 0.0).to_json() | no_pair() | rest


def row_of(
    method: str, requested: float, found: Sequence[Measured], images: Images, pair: dict[str, Any]
) -> dict[str, Any]:
    """One row: every figure is the mean over the seeds in `found`, and its interval that over images.

    Seeds are averaged, not drawn again: a handful is too few. How far they lie apart stands in `per_seed`.

    Args:
        pair: `pair_with` what the row is held against, or `no_pair`.
    """
    kl = bootstrap(mean_divergences(found), images.clusters, images.seed)
    return (
        {"method": method}
        | _costs(found)
        | {"requested_bits": requested}
        | kl.to_json()
        | pair
        | {
            "accuracy": fmean(one.accuracy for one in found),
            "seconds": fmean(one.seconds for one in found),
            "seeds": [one.seed for one in found],
            "per_seed": [_seed_row(one, images) for one in found],
            "layers": mean_layers(found),
        }
    )


def no_pair() -> dict[str, Any]:
    """The keys of `pair_with` where a row is held against nothing."""
    keys = [f"{name}{end}" for name in PAIRED for end in ("", "_low", "_high")]
    return {"against": None} | dict.fromkeys(keys)


def pair_with(against: str, others: Sequence[Measured], found: Sequence[Measured], images: Images) -> dict[str, Any]:
    """{"against", "kl_ratio…", "kl_difference…"}: theirs over, and less, the other's, over the same drawn images.

    The ratio is null where the other's divergence is zero.
    """
    pair = paired_bootstrap(mean_divergences(found), mean_divergences(others), images.clusters, images.seed)
    ratio = pair.ratio.to_json("kl_ratio") if pair.ratio else {}
    return no_pair() | {"against": against} | ratio | pair.difference.to_json("kl_difference")


def mean_divergences(found: Sequence[Measured]) -> list[Tensor]:
    """float32[t_i] a sample: each token's divergence averaged over the seeds."""
    return [torch.stack(tokens).mean(dim=0) for tokens in zip(*(one.divergences for one in found), strict=True)]


def mean_layers(found: Sequence[Measured]) -> list[dict[str, Any]]:
    """The layers of the first seed with their errors averaged over all; codes that differ stand side by side, "a/b"."""
    layers = []
    for same in zip(*(one.layers for one in found), strict=True):
        means = {key: _mean_or_none([layer[key] for layer in same]) for key in ERRORS}
        code = "/".join(dict.fromkeys(layer["code"] for layer in same))
        layers.append(same[0] | {"code": code} | means)
    return layers


def _mean_or_none(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _costs(found: Sequence[Measured]) -> dict[str, Any]:
    totals = [one.bits["total"] for one in found]
    return {
        "bits": fmean(total.real for total in totals),
        "language_bits": fmean(one.bits["language"].real for one in found),
        "index_bits": fmean(total.index for total in totals),
        "bytes": round(fmean(total.bytes for total in totals)),
    }


def _seed_row(one: Measured, images: Images) -> dict[str, Any]:
    kl = bootstrap(one.divergences, images.clusters, images.seed)
    rest = {"accuracy": one.accuracy, "seconds": one.seconds}
    return {"seed": one.seed} | _costs([one]) | kl.to_json() | rest
