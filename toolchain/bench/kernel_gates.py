"""What the kernels must reach, held against what `mgvq bench kernels` measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from toolchain.values import VQCode

LARGE_BYTES = 32_000_000  # packed; below it launch and table fill dominate, and figures are reported without a gate
INDEX_BYTES_PER_CLOCK = 14.0  # at 2 bits, decoding from the L2 cache
ROOF_SHARE = 0.80
SPEEDUP = 5.0  # at one token
PREFILL_TOKENS, PREFILL_RATIO = 2048, 1.25
DECODE, DECODE_SPEEDUP = "qwen2-vl-7b", 3.0
GATE_COLUMNS = ["gate", "wanted", "found", "where", "met"]
Row = dict[str, Any]


def gates(result: dict[str, Any]) -> list[Row]:
    """`bench.kernels.bench_kernels`'s result against every gate, JSON-clean: gate and wanted in words; found, None
    where nothing that it asks about was measured; where, the row that decides; is_met, None where found is.
    """
    single = [row for row in result["rows"] if row["tokens"] == 1]
    large = [row for row in single if row["packed_bytes"] >= LARGE_BYTES]
    resident = [row for row in result["resident"] if row["tokens"] == 1 and _bits(row) == 2]
    # The head sees one position of a prompt.
    prefill = [
        row for row in result["rows"] if row["tokens"] == PREFILL_TOKENS and row["group"].rsplit(" ", 1)[-1] != "head"
    ]
    decode = [row for row in result["decoders"] if row["decoder"] == DECODE]
    large_words = f"one token, at least {LARGE_BYTES // 10**6} MB packed"
    return [
        _gate(
            "index bytes a SM-clock, 2 bits, in L2",
            resident,
            lambda row: row["index_bytes_per_sm_clock"],
            max,
            INDEX_BYTES_PER_CLOCK,
        ),
        _gate(
            f"share of measured read bandwidth, {large_words}", large, lambda row: row["roof_share"], min, ROOF_SHARE
        ),
        _gate(f"times float16's speed, {large_words}", large, lambda row: row["speedup"], min, SPEEDUP),
        _gate(
            f"times float16's time, {PREFILL_TOKENS} tokens",
            prefill,
            lambda row: 1 / row["speedup"],
            max,
            PREFILL_RATIO,
            is_ceiling=True,
        ),
        _gate(f"times float16's tokens a second, {DECODE}", decode, lambda row: row["speedup"], min, DECODE_SPEEDUP),
    ]


def unmet(found: Iterable[Row]) -> list[str]:
    """The gates that were not met or not measured, in words."""
    return [
        f"{one['gate']}: {'not measured' if one['is_met'] is None else one['found']}, wanted {one['wanted']}"
        for one in found
        if not one["is_met"]
    ]


def gate_cells(one: Row) -> dict[str, str]:
    """A gate for people, by GATE_COLUMNS."""
    measured = one["is_met"] is not None
    cells = (
        one["gate"],
        one["wanted"],
        f"{one['found']:.3g}" if measured else "not measured",
        one["where"] or "-",
        ("yes" if one["is_met"] else "NO") if measured else "-",
    )
    return dict(zip(GATE_COLUMNS, cells, strict=True))


def _bits(row: Row) -> float:
    code = VQCode.parse(row["code"])
    return code.shift / code.vector


def _gate(
    name: str,
    rows: list[Row],
    figure: Callable[[Row], float | None],
    choose: Callable[..., Any],
    limit: float,
    is_ceiling: bool = False,
) -> Row:
    """`choose` picks the row that decides: the best of some, the worst of all."""
    known = [(value, row) for row in rows if (value := figure(row)) is not None]
    wanted = f"{'at most' if is_ceiling else 'at least'} {limit:g}"
    if not known:
        return {"gate": name, "wanted": wanted, "found": None, "where": None, "is_met": None}
    value, row = choose(known, key=lambda pair: pair[0])
    where = f"{row['group']} {row['code']}" if "group" in row else f"{row['decoder']} {row['code']}"
    met = value <= limit if is_ceiling else value >= limit
    return {"gate": name, "wanted": wanted, "found": value, "where": where, "is_met": met}
