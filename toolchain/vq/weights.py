"""What every quantization method takes and gives back: the options, one layer's stored form, a group of layers.

A method is a function `(weights, moment, code, options, generator) -> VQGroup`; `quantize.baselines.registry`
lists the baselines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from toolchain.errors import NumericGateError, ShapeError, UnsupportedError, UsageError
from toolchain.values import PLAIN_CODE_NAMES, VQCode, format_text
from toolchain.vq import format as vq_format

# How what text and images lose is put together where bits are planned (`sensitivity.Sensitivity.totals`).
AVERAGE, WORST = "average", "worst"


@dataclass(frozen=True)
class FixedCodebook:
    """A codebook that is not the group's to change: `stored` [2^L, V] int8 or float16, whose entries are worth step ·
    stored at unit row scale; 1 for float16 pairs.
    """

    stored: Tensor
    step: float


@dataclass(frozen=True)
class Options:
    """What a method may be told. A round is a sweep, a scale refit and a codebook update; a codebook trains on
    `samples`.

    `codebooks` are given by code: a group in one of these codes takes the codebook as it is, rounds refit the scales
    alone. Codes that are not among them have a codebook trained. MGVQ alone takes them.
    """

    damping: float = 0.01  # of the mean diagonal of H; GPTQ's and VPTQ's default
    rounds: int = 3
    lloyd_rounds: int = 12
    # 64 for each of 256 entries. On the demo's layers, half-trained, twice as many took 1 to 3 % off the layer errors,
    # nothing off the KL divergence of the model, and up to half as long again.
    samples: int = 16_384
    batch_columns: int = 128
    token_power: float = 0.5  # of the gradient norm in a token's mass, where a recipe weighs tokens by gradients
    norm_quantile: float = 0.999  # of token norms, above which a token's mass falls, where a recipe caps them
    modalities: str = AVERAGE  # or WORST
    rotation_gain: float = 0.9  # a rotated layer must lose at most this share of what the plain one loses
    segment_spread: float = 16.0  # of energies in a layer, below which mixing gains less than codebooks and scales cost
    codebooks: Mapping[VQCode, FixedCodebook] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.modalities not in (AVERAGE, WORST):
            raise UsageError(f"option modalities: expected {AVERAGE} or {WORST}, found {self.modalities!r}")
        if not 0 < self.norm_quantile <= 1:
            raise UsageError(f"option norm_quantile: expected above 0 and at most 1, found {self.norm_quantile}")


@dataclass(frozen=True)
class VQWeights:
    """One quantized matrix as it is stored: codes uint8[bytes] in checkpoint order, codebook, scales float16[rows]."""

    code: VQCode
    rows: int
    columns: int
    codes: Tensor
    codebook: Tensor
    scales: Tensor

    def decode(self) -> Tensor:
        """Ŵ float32[rows, columns], by the format's definition."""
        codes, codebook, scales = (tensor.cpu().numpy() for tensor in (self.codes, self.codebook, self.scales))
        return torch.from_numpy(vq_format.decode(codes, codebook, scales, self.code, self.rows, self.columns))


@dataclass(frozen=True)
class SegmentedWeights:
    """One matrix in K-segments: neighbouring columns, first to last, each stored in a code of its own."""

    segments: tuple[VQWeights, ...]

    @property
    def rows(self) -> int:
        return self.segments[0].rows

    @property
    def columns(self) -> int:
        return sum(segment.columns for segment in self.segments)

    @property
    def code(self) -> str:
        """The format's text (`values.parse_format`)."""
        return format_text([(segment.columns, str(segment.code)) for segment in self.segments])

    def decode(self) -> Tensor:
        """Ŵ float32[rows, columns], segment beside segment."""
        return torch.cat([segment.decode() for segment in self.segments], dim=1)


@dataclass(frozen=True)
class VQGroup:
    """Layers that share code and codebook. `errors` are tr(E H Eᵀ) and `references` tr(W H Wᵀ), one float a layer."""

    layers: tuple[VQWeights, ...]
    errors: tuple[float, ...]
    references: tuple[float, ...]

    @property
    def loss(self) -> float:
        """tr(E H Eᵀ) summed over the group."""
        return sum(self.errors)


StoredWeights = VQWeights | SegmentedWeights


@dataclass(frozen=True)
class SegmentedGroup:
    """Layers in the same K-segments, which share code and codebook of each; `errors` and `references` as of `VQGroup`.

    `losses` are tr(E_s' S_s E_s'ᵀ), one float a segment: what it loses after those before it were answered for, in the
    damped moment S (equation 15). They add up to tr(E S Eᵀ).
    """

    layers: tuple[SegmentedWeights, ...]
    errors: tuple[float, ...]
    references: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def loss(self) -> float:
        """tr(E H Eᵀ) summed over the group."""
        return sum(self.errors)


GroupMethod = Callable[[list[Tensor], Tensor, VQCode, Options, torch.Generator], VQGroup]


@dataclass(frozen=True)
class Problem:
    """A group's stacked rows, padded to whole column groups: W float32[m, n], H float32[n, n], n % 16 == 0.

    `columns` is n before padding; `rows` are the layers' own row counts, and `held` those they take in W, m in all:
    with overlapping codes each layer is padded to whole row groups, because the padding's bits are its neighbours'.
    `row_weights` float32[m] say what an error in each row counts.
    """

    weight: Tensor
    moment: Tensor
    columns: int
    rows: tuple[int, ...]
    held: tuple[int, ...]
    row_weights: Tensor


def stack_group(
    weights: list[Tensor],
    moment: Tensor,
    code: VQCode,
    *,
    searches_paths: bool = False,
    row_weights: list[Tensor] | None = None,
) -> Problem:
    """The group as one matrix, columns padded with zeros (weights and H), and rows too where the code overlaps.

    Args:
        searches_paths: the method finds the windows of overlapping codes (`trellis`).
        row_weights: float32[m_i] a layer; 1 where None.

    Raises:
        ShapeError: the layers differ in columns, or H does not fit them.
        UnsupportedError: a code with L > k for a method that takes every block's nearest entry.
    """
    if code.window != code.shift and not searches_paths:
        names = " ".join(PLAIN_CODE_NAMES)
        raise UnsupportedError(
            f"code {code}: a method that takes the nearest entry of each block needs L = k; use one of {names}, "
            "or method mgvq"
        )
    columns = weights[0].shape[1]
    if any(w.ndim != 2 or w.shape[1] != columns for w in weights) or moment.shape != (columns, columns):
        shapes = [list(w.shape) for w in weights]
        raise ShapeError(f"expected weights [m_i, n] and a moment [n, n], found {shapes} and {list(moment.shape)}")
    extra = code.padded_shape(1, columns)[1] - columns
    padded = torch.nn.functional.pad(moment.float(), (0, extra, 0, extra))
    rows = tuple(w.shape[0] for w in weights)
    held = tuple(code.padded_shape(m, 1)[0] for m in rows) if code.window > code.shift else rows
    stacked = [torch.nn.functional.pad(w.float(), (0, extra, 0, m - len(w))) for w, m in zip(weights, held)]
    counts = row_weights or [torch.ones(m, device=w.device) for m, w in zip(rows, weights)]
    counted = torch.cat([torch.nn.functional.pad(r.float(), (0, m - len(r))) for r, m in zip(counts, held)])
    return Problem(torch.cat(stacked), padded, columns, rows, held, counted)


def decode_stacked(indices: Tensor, codebook: Tensor, scales: Tensor) -> Tensor:
    """Ŵ float32[m, n] from one index a lookup, integers [m, n / V]."""
    unit = codebook.float()[indices.long()].reshape(indices.shape[0], -1)
    return unit * scales.float()[:, None]


def output_errors(difference: Tensor, problem: Problem) -> Tensor:
    """float64[m]: each row's e H eᵀ, e its row of `difference` [m, n]."""
    return ((difference @ problem.moment) * difference).sum(dim=1, dtype=torch.float64)


def pack_group(problem: Problem, indices: Tensor, codebook: Tensor, scales: Tensor, code: VQCode) -> VQGroup:
    """The group in its stored form, with its errors.

    Args:
        indices: integers [m, n / V], below 2**L; windows of tail-biting chunks where L > k.
        codebook: in the code's codebook dtype.
        scales: float16[m].
    """
    error = output_errors(problem.weight - decode_stacked(indices, codebook, scales), problem)
    reference = output_errors(problem.weight, problem)
    layers = tuple(
        VQWeights(code, rows, problem.columns, pack_indices(part, code), codebook, scale[:rows].clone())
        for rows, part, scale in zip(problem.rows, indices.split(problem.held), scales.split(problem.held))
    )
    errors, references = (tuple(float(s.sum()) for s in v.split(problem.held)) for v in (error, reference))
    return VQGroup(layers, errors, references)


def pack_indices(indices: Tensor, code: VQCode) -> Tensor:
    """uint8[bytes] in checkpoint order from one index a lookup, integers [rows, n / V].

    Rows are padded with index 0 where L = k. Where L > k they come padded, and a symbol is its window's first k bits.

    Raises:
        NumericGateError: the symbols do not give back the windows: some chunk's path does not close.
    """
    padded_rows = code.padded_shape(indices.shape[0], 1)[0]
    matrix = vq_format.pad_matrix(indices.cpu().numpy().astype(np.uint16), padded_rows, indices.shape[1])
    windows = vq_format.chunks_from_matrix(matrix, code)
    symbols = (windows >> (code.window - code.shift)).astype(np.uint8)
    if code.window > code.shift:
        check_tail_biting(windows, symbols, code)
    return torch.from_numpy(vq_format.pack(symbols, code))


def check_tail_biting(windows: NDArray, symbols: NDArray, code: VQCode) -> None:
    """Refuse windows [R, 8, C, 16] that their symbols do not give back."""
    broken = (vq_format.windows_from_symbols(symbols, code) != windows).any(axis=-1)
    if broken.any():
        raise NumericGateError(
            f"code {code}: expected windows that follow each other round every chunk, found {int(broken.sum())} of "
            f"{broken.size} chunks that do not; this is a fault of the search, or rows were cut off its padding"
        )
