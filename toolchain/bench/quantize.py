"""How long quantizing a published model's decoder takes here: one block's groups measured, the others multiplied.

Weights and inputs are random; times depend on their shapes. Only identical layers stand for one another: a group that
was measured whole is multiplied by the decoder's blocks, and nothing else is extrapolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from toolchain.bench.machine import checked_device, forget_peak, machine_facts, peak_bytes
from toolchain.bench.parts import OURS, PART_OF_SWEEP, PARTS, PEER, Clock, Timing, time_group
from toolchain.bench.shapes import DecoderShape, GroupShape, chosen_groups, decoder_shape
from toolchain.errors import UsageError
from toolchain.values import SILENT, Progress, VQCode
from toolchain.vq.weights import Options

EXCLUDED = (
    "the model's own forward passes, backward passes for output curvature, the dry runs that choose codes, "
    "fine-tuning; vision tower, projector, embedding and head"
)
WARM_UP = GroupShape("warm-up", (128,), 64)
WARM_UP_TOKENS = 128


@dataclass(frozen=True)
class Request:
    """What to time. `layers` blocks are measured, each with weights of its own; `groups` None means all of a block.

    `tokens` are those statistics are taken over. With shares below 1 only the first rows or columns of every layer are
    quantized, and nothing is extrapolated.
    """

    shapes: str
    layers: int = 1
    codes: tuple[str, ...] = ("2,4,8",)
    groups: tuple[str, ...] | None = None
    parts: tuple[str, ...] = PARTS
    device: str = "cpu"
    tokens: int = 2048
    rows_share: float = 1.0
    columns_share: float = 1.0
    peers: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Measured:
    """One group: its shape in the decoder, the shape that was quantized, each layer's timings, and peak memory."""

    group: GroupShape
    quantized: GroupShape
    timings: tuple[tuple[Timing, ...], ...]
    peak_bytes: int

    @property
    def is_whole(self) -> bool:
        return self.quantized == self.group


def bench_quantize(request: Request, progress: Progress = SILENT) -> dict[str, Any]:
    """Seconds a group, a block and a decoder, and what they were measured on, JSON-clean:

        request     the Request, as asked
        machine     `machine.machine_facts`: device, name, threads, load_average, torch, mgvq, system
        options     the method's options (`vq.weights.Options`)
        decoder     name, blocks
        groups      a group: group, rows [a layer], columns, quantized_rows, quantized_columns, is_whole, peak_bytes
                    (`machine.peak_bytes`; on a CPU everything the process did before counts too)
        rows        a group, method, code and part: seconds [a measured layer], mean_seconds, mean_cpu_seconds (all
                    threads, without waiting), is_in_sums, and decoder_seconds, the mean times the blocks; null where
                    the group was not measured whole
        totals      a code of ours: the parts summed over, measured_seconds and measured_cpu_seconds of the groups
                    measured, and block_seconds, decoder_seconds and decoder_cpu_seconds, null unless every group of a
                    block was measured whole
        ratios      a group and code of ours: its sweep over GPTQ's (`against`) at 2 bits, same weights and moments, in
                    wall seconds (ratio) and in CPU seconds (cpu_ratio)
        busy_share  CPU time over wall time times threads, of all that was timed; null on CUDA. Low where others ran on
                    the machine, whose work is then in the wall seconds, or where not all threads had work
        measured, extrapolated, excluded    the same in words

    Raises:
        UsageError, UnsupportedError: the request asks for nothing, or for something unknown.
        EnvironmentMismatch: there is no such device.
    """
    shape, groups = check_request(request)
    device = checked_device(request.device)
    facts = machine_facts(device)
    codes = tuple(VQCode.parse(code) for code in request.codes)
    time_group(WARM_UP, WARM_UP_TOKENS, codes, request.peers, Clock(device, request.parts), request.seed)
    found = []
    for number, group in enumerate(groups):
        part = group.limited(request.rows_share, request.columns_share)
        forget_peak(device)
        timings = []
        for layer in range(request.layers):
            progress.step(number * request.layers + layer, len(groups) * request.layers, f"{group.name} {layer}")
            clock = Clock(device, request.parts)
            time_group(part, request.tokens, codes, request.peers, clock, request.seed + layer)
            timings.append(tuple(clock.timings))
        found.append(Measured(group, part, tuple(timings), peak_bytes(device)))
    return {
        "request": asdict(request),
        "machine": facts,
        "options": asdict(Options()),
        "busy_share": busy_share(found, facts["threads"]) if device.type == "cpu" else None,
        **summary(shape, request, found),
    }


def check_request(request: Request) -> tuple[DecoderShape, tuple[GroupShape, ...]]:
    """The decoder and the groups asked for, refused before any work where something is wrong.

    Raises:
        UsageError, UnsupportedError: as `bench_quantize`.
    """
    shape = decoder_shape(request.shapes)
    groups = chosen_groups(shape, request.groups)
    if not 1 <= request.layers <= shape.blocks:
        raise UsageError(f"layers {request.layers}: expected 1 to {shape.blocks}, the blocks of {shape.name}")
    unknown = [part for part in request.parts if part not in PARTS]
    if unknown or not request.parts:
        raise UsageError(f"parts {','.join(request.parts)!r}: expected some of {','.join(PARTS)}")
    if not request.codes or len(set(request.codes)) < len(request.codes):
        raise UsageError(f"codes {' '.join(request.codes)!r}: expected one or more, each once, such as 2,4,8")
    for code in request.codes:
        VQCode.parse(code)
    if request.tokens < 2:
        raise UsageError(f"tokens {request.tokens}: expected at least 2, one for either half of the samples")
    for what, share in (("rows", request.rows_share), ("columns", request.columns_share)):
        if not 0 < share <= 1:
            raise UsageError(f"{what} {share:g}: expected a share above 0 and at most 1")
    return shape, groups


def summary(shape: DecoderShape, request: Request, found: Sequence[Measured]) -> dict[str, Any]:
    """`bench_quantize`'s groups, rows, totals, ratios and words, from what was measured."""
    rows = [row for one in found for row in part_rows(one, shape.blocks)]
    every = {one.group for one in found if one.is_whole} == set(shape.groups)
    return {
        "decoder": {"name": shape.name, "blocks": shape.blocks},
        "groups": [group_facts(one) for one in found],
        "rows": rows,
        "totals": [total(rows, code, shape.blocks, every) for code in request.codes],
        "ratios": ratios(rows),
        **words(shape, request, found, every),
    }


def group_facts(one: Measured) -> dict[str, Any]:
    """A group's shapes and peak memory."""
    return {
        "group": one.group.name,
        "rows": list(one.group.rows),
        "columns": one.group.columns,
        "quantized_rows": list(one.quantized.rows),
        "quantized_columns": one.quantized.columns,
        "is_whole": one.is_whole,
        "peak_bytes": one.peak_bytes,
    }


def part_rows(one: Measured, blocks: int) -> list[dict[str, Any]]:
    """A row for each part of a group: every layer's seconds, their mean, and all blocks' where the group is whole."""
    rows = []
    for same in zip(*one.timings, strict=True):
        seconds = [timing.seconds for timing in same]
        mean = sum(seconds) / len(seconds)
        rows.append(
            {
                "group": one.group.name,
                "method": same[0].method,
                "code": same[0].code,
                "part": same[0].part,
                "seconds": seconds,
                "mean_seconds": mean,
                "mean_cpu_seconds": sum(timing.cpu_seconds for timing in same) / len(same),
                "is_in_sums": same[0].method == OURS and same[0].part != PART_OF_SWEEP,
                "decoder_seconds": mean * blocks if one.is_whole else None,
            }
        )
    return rows


def total(rows: Sequence[dict[str, Any]], code: str, blocks: int, every: bool) -> dict[str, Any]:
    """Our method in one code: what the measured groups sum to, and the decoder where `every` group is whole."""
    own = [row for row in rows if row["is_in_sums"] and row["code"] in (None, code)]
    seconds, cpu_seconds = (sum(row[key] for row in own) for key in ("mean_seconds", "mean_cpu_seconds"))
    return {
        "method": OURS,
        "code": code,
        "parts": list(dict.fromkeys(row["part"] for row in own)),
        "measured_seconds": seconds,
        "measured_cpu_seconds": cpu_seconds,
        "block_seconds": seconds if every else None,
        "decoder_seconds": seconds * blocks if every else None,
        "decoder_cpu_seconds": cpu_seconds * blocks if every else None,
    }


def busy_share(found: Sequence[Measured], threads: int) -> float:
    """CPU seconds over wall seconds times threads, of every timing."""
    timings = [timing for one in found for layer in one.timings for timing in layer]
    return sum(timing.cpu_seconds for timing in timings) / (threads * sum(timing.seconds for timing in timings))


def ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Our sweeps over the peer's, group by group, PEER_CODE included; none where no peer was timed."""
    sweeps = [row for row in rows if row["part"] == "sweep"]
    peers = {row["group"]: row for row in sweeps if row["method"] == PEER}
    return [
        {
            "group": row["group"],
            "code": row["code"],
            "against": PEER,
            "ratio": row["mean_seconds"] / peers[row["group"]]["mean_seconds"],
            "cpu_ratio": row["mean_cpu_seconds"] / peers[row["group"]]["mean_cpu_seconds"],
        }
        for row in sweeps
        if row["method"] == OURS and row["group"] in peers
    ]


def words(shape: DecoderShape, request: Request, found: Sequence[Measured], every: bool) -> dict[str, str]:
    """What was measured, what is extrapolated from it, and what is in neither."""
    names = ", ".join(one.group.name for one in found)
    layers = "1 block" if request.layers == 1 else f"{request.layers} blocks"
    measured = f"{names} of {layers} of {shape.blocks}, random weights, {request.tokens} tokens of synthetic inputs"
    cut = [one for one in found if not one.is_whole]
    if cut:
        parts = (f"{one.group.name} cut to {sum(one.quantized.rows)}x{one.quantized.columns}" for one in cut)
        return {
            "measured": f"{measured}; {', '.join(parts)}",
            "extrapolated": "nothing from groups that were cut: their time is not in proportion to their size",
            "excluded": EXCLUDED,
        }
    missing = [group.name for group in shape.groups if group not in {one.group for one in found}]
    extrapolated = f"decoder = mean x {shape.blocks}, because the blocks are identical"
    if not every:
        extrapolated += f"; no block or decoder total, {', '.join(missing)} not measured"
    return {"measured": measured, "extrapolated": extrapolated, "excluded": EXCLUDED}
