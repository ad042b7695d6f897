"""What a kernel's timings say: medians with spread, bytes a second, share of the measured roof, bytes an SM-clock.

Plain arithmetic on seconds that were measured elsewhere; nothing here touches a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from toolchain.errors import UsageError
from toolchain.values import VQCode


@dataclass(frozen=True)
class Spread:
    """Seconds of one launch: the median over rounds, and the median distance from it."""

    seconds: float
    mad_seconds: float


@dataclass(frozen=True)
class Roof:
    """What a device gave when it was measured. `clock_hz` is the SM clock under load, None where nothing reads it."""

    read_bytes_per_s: float
    multiprocessors: int
    clock_hz: float | None


def spread(rounds: Sequence[float], dropped: int) -> Spread:
    """The rounds after the first `dropped`, which warm clocks and caches up.

    Raises:
        UsageError: none is left.
    """
    kept = rounds[dropped:]
    if not kept:
        raise UsageError(f"rounds: expected more than the {dropped} that are dropped, found {len(rounds)}")
    middle = median(kept)
    return Spread(middle, median(abs(seconds - middle) for seconds in kept))


def packed_bytes(code: VQCode, rows: int, columns: int) -> int:
    """Bytes a launch must read of a weight: codes with their padding, scales, one table."""
    return code.codes_bytes(rows, columns) + 2 * rows + code.codebook_bytes


def copies_for(size: int, l2_bytes: int, least: int = 2) -> int:
    """Copies of something of `size` bytes that are four times the L2 cache together: the first is cold again when the
    last has been read.
    """
    return max(least, -(-4 * l2_bytes // size))


def row(
    group: str, shape: tuple[int, int], code: VQCode, tokens: int, ours: Spread, dense: Spread, roof: Roof
) -> dict[str, Any]:
    """One line of the result, JSON-clean.

    group, rows, columns, code, tokens; seconds and mad_seconds of ours, dense_seconds and dense_mad_seconds of float16
    in the dense library; speedup, dense over ours; packed_bytes (`packed_bytes`), packed_bytes_per_s, roof_share of the
    measured read bandwidth, and index_bytes_per_sm_clock, codes alone, None where the clock is not known.
    """
    rows, columns = shape
    size = packed_bytes(code, rows, columns)
    return {
        "group": group,
        "rows": rows,
        "columns": columns,
        "code": str(code),
        "tokens": tokens,
        "seconds": ours.seconds,
        "mad_seconds": ours.mad_seconds,
        "dense_seconds": dense.seconds,
        "dense_mad_seconds": dense.mad_seconds,
        "speedup": dense.seconds / ours.seconds,
        "packed_bytes": size,
        "packed_bytes_per_s": size / ours.seconds,
        "roof_share": size / ours.seconds / roof.read_bytes_per_s,
        "index_bytes_per_sm_clock": index_bytes_per_sm_clock(code.codes_bytes(rows, columns), ours.seconds, roof),
    }


def index_bytes_per_sm_clock(codes_bytes: int, seconds: float, roof: Roof) -> float | None:
    """Bytes of codes that each multiprocessor decoded in one of its clocks."""
    if roof.clock_hz is None:
        return None
    return codes_bytes / (seconds * roof.clock_hz * roof.multiprocessors)


def decoder_row(name: str, code: VQCode, context: int, ours: Spread, dense: Spread) -> dict[str, Any]:
    """End to end: tokens a second of a decoder whose linears are ours or float16, everything else the same."""
    return {
        "decoder": name,
        "code": str(code),
        "context": context,
        "tokens_per_s": 1 / ours.seconds,
        "mad_seconds": ours.mad_seconds,
        "dense_tokens_per_s": 1 / dense.seconds,
        "dense_mad_seconds": dense.mad_seconds,
        "speedup": dense.seconds / ours.seconds,
    }


COLUMNS = ["group", "shape", "code", "M", "us", "+-", "fp16 us", "x fp16", "dense us", "GB/s", "of roof", "B/SM-clock"]
DECODER_COLUMNS = ["decoder", "code", "context", "tokens/s", "fp16 tokens/s", "x fp16"]


def table_cells(one: dict[str, Any]) -> dict[str, str]:
    """A `row` for people, by COLUMNS; "dense us": the weight dequantized, then float16's product, where timed."""
    clock, through = one["index_bytes_per_sm_clock"], one.get("dequantized_seconds")
    cells = (
        one["group"],
        f"{one['rows']}x{one['columns']}",
        one["code"],
        str(one["tokens"]),
        f"{one['seconds'] * 1e6:.1f}",
        f"{one['mad_seconds'] * 1e6:.1f}",
        f"{one['dense_seconds'] * 1e6:.1f}",
        f"{one['speedup']:.2f}",
        "-" if through is None else f"{through * 1e6:.1f}",
        f"{one['packed_bytes_per_s'] / 1e9:.0f}",
        f"{one['roof_share']:.0%}",
        "-" if clock is None else f"{clock:.1f}",
    )
    return dict(zip(COLUMNS, cells, strict=True))


def decoder_cells(one: dict[str, Any]) -> dict[str, str]:
    """A `decoder_row` for people, by DECODER_COLUMNS."""
    cells = (
        one["decoder"],
        one["code"],
        str(one["context"]),
        f"{one['tokens_per_s']:.1f}",
        f"{one['dense_tokens_per_s']:.1f}",
        f"{one['speedup']:.2f}",
    )
    return dict(zip(DECODER_COLUMNS, cells, strict=True))
