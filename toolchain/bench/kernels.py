"""How fast the kernels are on this GPU: cold caches, CUDA graphs, float16 of the dense library beside them in one run.

Each shape is checked against float64 before it is timed. Ours and the dense library's graphs are replayed in turn,
round after round, so that clocks and heat are shared. `kernel_figures` makes figures of the seconds, `kernel_gates`
holds them against what was promised, `kernel_timing` is the device; this is the order of work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from toolchain.bench.decoder import Decoder, coded_maker, dense_maker
from toolchain.bench.kernel_figures import Roof, Spread, copies_for, decoder_row, packed_bytes, row, spread
from toolchain.bench.kernel_gates import gates
from toolchain.bench.kernel_timing import Timing, TorchTiming, driver_says, interleaved
from toolchain.bench.machine import machine_facts
from toolchain.bench.shapes import decoder_shape, matrix_shapes
from toolchain.checkpoint.modules import decode_weight
from toolchain.errors import NumericGateError, UsageError
from toolchain.native import ops, order
from toolchain.native.library import DEFAULT_TACTIC
from toolchain.values import ROW_GROUP, SILENT, Progress, VQCode

Keep = Callable[[dict[str, Any]], None]
TOKENS = (1, 2, 4, 8, 16, 128, 512, 2048)
DECODER_GROUPS = ("qkv", "o", "gate_up", "down", "head")
LAUNCHES = 20  # of a graph, at least: one launch is a few microseconds, as long as an event's own error
ROUNDS, DROPPED = 9, 2
ROOF_BYTES = 1 << 30
CHECKED_TOKENS = 16  # first and last ones of a product that are compared with float64
DENSE_TOKENS = 512  # from here on the way over a dense copy of the weight is timed too
RESIDENT_SHARE = 0.75  # of the L2 cache: what a weight may fill and still be found there by the next launch
CHECKED_ROWS = 64 * ROW_GROUP  # decoded at a time for that
HALF_ULP = 2.0**-11


@dataclass(frozen=True)
class KernelRequest:
    """What to time: matrices of the published models `shapes` in `codes` with `tokens` rows of activations; `decoders`
    are timed end to end with a cache of `context` positions.
    """

    shapes: tuple[str, ...] = ("qwen2-vl-2b", "qwen2-vl-7b")
    codes: tuple[str, ...] = ("2,4,8",)
    groups: tuple[str, ...] = DECODER_GROUPS
    tokens: tuple[int, ...] = TOKENS
    decoders: tuple[str, ...] = ("qwen2-vl-2b", "qwen2-vl-7b")
    context: int = 1024
    rounds: int = ROUNDS
    seed: int = 0


def check_request(request: KernelRequest) -> list[tuple[str, str, tuple[int, int]]]:
    """(model, group, shape) of every matrix asked for, each shape once.

    Raises:
        UsageError, UnsupportedError: something is unknown, or nothing is asked for.
    """
    for code in request.codes:
        VQCode.parse(code)
    for name in request.decoders:
        decoder_shape(name)
    if request.rounds <= DROPPED + 4:
        raise UsageError(f"rounds {request.rounds}: expected at least {DROPPED + 5}, of which {DROPPED} are dropped")
    if not request.tokens or min(request.tokens) < 1 or request.context < 1:
        raise UsageError("tokens and context: expected at least 1 each")
    found: dict[tuple[int, int], tuple[str, str]] = {}
    for name in request.shapes:
        known = matrix_shapes(name)
        unknown = [group for group in request.groups if group not in known]
        if unknown:
            raise UsageError(f"groups {','.join(unknown)!r}: expected some of {','.join(known)} for {name}")
        for group in request.groups:
            found.setdefault(known[group], (name, group))
    if not found and not request.decoders:
        raise UsageError("nothing to time: expected shapes and groups, or decoders")
    return [(name, group, shape) for shape, (name, group) in found.items()]


def bench_kernels(
    request: KernelRequest, progress: Progress = SILENT, timing: Timing | None = None, keep: Keep | None = None
) -> dict[str, Any]:
    """What was measured on this machine's first CUDA device, JSON-clean:

        request, machine    as `bench.quantize`; machine has also multiprocessors, l2_bytes, the library's file and
                            architectures, and power_limit where the driver tells it
        roof                `kernel_figures.Roof`: read_bytes_per_s by the library's own reader, clock_hz behind it
        rows                `kernel_figures.row` a matrix, code and number of tokens, caches cold; with clock_hz, the SM
                            clock behind its own launches, and from DENSE_TOKENS on dequantized_seconds: the weight made
                            dense, then the dense library
        resident            the same with one copy, where its codes fit RESIDENT_SHARE of the L2 cache: how fast
                            decoding itself is
        decoders            `kernel_figures.decoder_row`
        gates               `kernel_gates.gates`

    Args:
        timing: the device; this machine's first one if None.
        keep: given every row as soon as it is there, so that a run that is cut off loses nothing: {kind, row}.

    Raises:
        UsageError, UnsupportedError: the request asks for something unknown.
        EnvironmentMismatch: there is no CUDA device, or no library for it.
        NumericGateError: a kernel computes something else than the weight says.
    """
    matrices = check_request(request)
    timing = TorchTiming() if timing is None else timing
    result: dict[str, Any] = {"request": asdict(request)}
    kept: dict[str, list[dict[str, Any]]] = {"rows": [], "resident": [], "decoders": []}

    def add(kind: str, found: dict[str, Any]) -> None:
        kept[kind].append(found)
        if keep:
            keep({"kind": kind, "row": found})

    jobs = [(m, VQCode.parse(c), tokens) for m in matrices for c in request.codes for tokens in request.tokens]
    with timing.context():
        result["machine"] = machine_of(timing)
        roof = measured_roof(timing, request.rounds)
        result["roof"] = asdict(roof)
        for number, ((name, group, shape), code, tokens) in enumerate(jobs):
            progress.step(number, len(jobs), f"{name} {group} {code} M={tokens}")
            case = Case(shape, code, tokens, request.seed, timing.device)
            for kind, found in timed_rows(case, f"{name} {group}", roof, timing, request.rounds):
                add(kind, found)
        for name in request.decoders:
            for text in request.codes:
                add("decoders", end_to_end(name, VQCode.parse(text), request.context, request.rounds, timing))
    result |= kept
    return result | {"gates": gates(result)}


def machine_of(timing: Timing) -> dict[str, Any]:
    """The device, the library and what limits their speed."""
    library = ops.device_library(timing.device.index or 0)
    return machine_facts(timing.device) | {
        "multiprocessors": timing.multiprocessors,
        "l2_bytes": timing.l2_bytes,
        "library": str(library.path),
        "architectures": list(library.architectures),
        "power_limit": driver_says("power.limit"),
    }


def measured_roof(timing: Timing, rounds: int) -> Roof:
    """Bytes a second of reading ROOF_BYTES once, by the library's reader, and the SM clock behind it."""
    library = ops.device_library(timing.device.index or 0)
    data = torch.zeros(ROOF_BYTES, dtype=torch.uint8, device=timing.device)
    sink = torch.zeros(1, dtype=torch.int32, device=timing.device)
    graph = timing.graph(
        [lambda: library.read(data.data_ptr(), ROOF_BYTES, sink.data_ptr(), timing.stream())], LAUNCHES
    )
    (seconds,) = interleaved((graph,), rounds)
    return Roof(ROOF_BYTES / spread(seconds, DROPPED).seconds, timing.multiprocessors, timing.clock_behind(graph))


def timed_rows(case: Case, label: str, roof: Roof, timing: Timing, rounds: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """("rows" or "resident", row) of one matrix, code and number of tokens."""
    shape, size = (case.rows, case.columns), packed_bytes(case.code, case.rows, case.columns)
    dense = 2 * case.rows * case.columns
    copies = {"rows": (copies_for(size, timing.l2_bytes), copies_for(dense, timing.l2_bytes))}
    if size <= RESIDENT_SHARE * timing.l2_bytes:
        copies["resident"] = (1, 1)
    for kind, (ours, theirs) in copies.items():
        found = case.timed(timing, ours, theirs, rounds)
        own_roof = replace(roof, clock_hz=found.clock_hz)
        one = row(label, shape, case.code, len(case.x), found.ours, found.dense, own_roof)
        through = None if found.dequantized is None else found.dequantized.seconds
        yield kind, one | {"clock_hz": found.clock_hz, "dequantized_seconds": through}


@dataclass(frozen=True)
class Timed:
    """Ours, float16 in the dense library, ours by way of a dense copy (None for few tokens), and the SM clock."""

    ours: Spread
    dense: Spread
    dequantized: Spread | None
    clock_hz: float | None


class Case:
    """One matrix with random codes in one code, and activations of one number of tokens."""

    def __init__(self, shape: tuple[int, int], code: VQCode, tokens: int, seed: int, device: torch.device) -> None:
        self.rows, self.columns = shape
        self.code, self.device = code, device
        generator = torch.Generator(device).manual_seed(seed)
        self.draw: dict[str, Any] = {"generator": generator, "device": device}
        self.x = torch.randn(tokens, self.columns, **self.draw).half()
        self.table = torch.randn(code.entries, code.vector, **self.draw)
        self.table = self.table.mul(40).clamp(-127, 127).to(torch.int8) if code.vector == 4 else self.table.half()
        self.scales = torch.rand(self.rows, **self.draw).mul(0.01).add(0.001).half()

    def codes(self, copies: int) -> list[Tensor]:
        """Random codes in device order; any bytes are a weight."""
        size = self.code.codes_bytes(self.rows, self.columns)
        return [torch.randint(0, 256, (size,), dtype=torch.uint8, **self.draw) for _ in range(copies)]

    def ours(self, codes: Tensor) -> Tensor:
        code = self.code
        formats = [code.vector, code.shift, code.window, self.columns]
        return ops.linear(self.x, [codes], [self.table], [self.scales], formats, self.rows, None, DEFAULT_TACTIC)

    def through_dense(self, codes: Tensor) -> Tensor:
        """The same by way of a float16 copy of the weight, made anew."""
        code = self.code
        formats = [code.vector, code.shift, code.window, self.columns]
        return torch.matmul(self.x, ops.dequantize([codes], [self.table], [self.scales], formats, self.rows).T)

    def timed(self, timing: Timing, copies: int, dense_copies: int, rounds: int) -> Timed:
        """Checked, then everybody in turn, each over that many copies of its weight: four times the cache together,
        or one.
        """
        codes = self.codes(copies)
        self.check(codes[0])
        weights = [torch.randn(self.rows, self.columns, dtype=torch.float16, **self.draw) for _ in range(dense_copies)]
        # A graph must run through all copies, or the ones it uses stay in the cache from replay to replay.
        contenders = [
            timing.graph([partial(self.ours, c) for c in codes], max(LAUNCHES, copies)),
            timing.graph([partial(torch.matmul, self.x, w.T) for w in weights], max(LAUNCHES, dense_copies)),
        ]
        if len(self.x) >= DENSE_TOKENS:
            contenders.append(timing.graph([partial(self.through_dense, c) for c in codes], max(LAUNCHES, copies)))
        ours, dense, *more = (spread(seconds, DROPPED) for seconds in interleaved(contenders, rounds))
        return Timed(ours, dense, more[0] if more else None, timing.clock_behind(contenders[0]))

    def slices(self, codes: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first row, float64[rows, columns]) of the weight, some thousand rows at a time: a head is gigabytes."""
        checkpoint = order.checkpoint_from_device(codes, self.code, self.rows, self.columns)
        row_bytes = self.code.codes_bytes(ROW_GROUP, self.columns) // ROW_GROUP
        for begin in range(0, self.rows, CHECKED_ROWS):
            end = min(begin + CHECKED_ROWS, self.rows)
            bytes_ = checkpoint[begin * row_bytes : -(-end // ROW_GROUP) * ROW_GROUP * row_bytes]
            stored = (bytes_, self.table, self.scales[begin:end], self.code, end - begin, self.columns)
            yield begin, decode_weight(*stored, torch.float32).double()

    def check(self, codes: Tensor) -> None:
        """Refuse a product that differs from float64's by more than float32 sums in any order and one rounding can.

        Raises:
            NumericGateError: it does.
        """
        picked = sorted(
            {*range(min(CHECKED_TOKENS, len(self.x))), *range(max(0, len(self.x) - CHECKED_TOKENS), len(self.x))}
        )
        found, x = self.ours(codes)[picked].double(), self.x[picked].double()
        worst = 0.0
        for begin, weight in self.slices(codes):
            expected, magnitude = x @ weight.T, x.abs() @ weight.abs().T
            allowed = 1e-5 * magnitude + HALF_ULP * expected.abs() + 2.0**-25
            part = found[:, begin : begin + len(weight)]
            worst = max(worst, ((part - expected).abs() / allowed).nan_to_num(float("inf")).max().item())
        if worst > 1:
            raise NumericGateError(
                f"{self.rows}x{self.columns} in code {self.code} with {len(self.x)} tokens: the kernel's product "
                f"differs from float64's by {worst:.3g} times what rounding allows; nothing was timed"
            )


def end_to_end(name: str, code: VQCode, context: int, rounds: int, timing: Timing) -> dict[str, Any]:
    """Tokens a second of a decoder with our linears and with float16 ones, one token a replayed graph."""
    options: dict[str, Any] = {"dtype": torch.float16, "device": timing.device}
    graphs = []
    for make in (coded_maker(code, options), dense_maker(options)):
        decoder = Decoder(name, make, context, options)
        x = torch.randn(1, decoder_shape(name).groups[0].columns, **options)
        graphs.append(timing.graph([partial(decoder, x)], 1))
    ours, dense = interleaved(graphs, rounds)
    return decoder_row(name, code, context, spread(ours, DROPPED), spread(dense, DROPPED))
