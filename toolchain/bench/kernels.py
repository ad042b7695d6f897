"""How fast the kernels are on this GPU: cold caches, CUDA graphs, float16 of the dense library beside them in one run.

Each shape is checked against float64 before it is timed. Ours and the dense library's graphs are replayed in turn,
round after round, so that clocks and heat are shared. `kernel_figures` makes figures of the seconds; this is the device
loop.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from toolchain.bench.decoder import Decoder, coded_maker, dense_maker
from toolchain.bench.kernel_figures import Roof, Spread, copies_for, decoder_row, packed_bytes, row, spread
from toolchain.bench.machine import checked_device, machine_facts
from toolchain.bench.shapes import decoder_shape, matrix_shapes
from toolchain.errors import NumericGateError, UsageError
from toolchain.kernels import ops, order
from toolchain.kernels.library import DEFAULT_TACTIC
from toolchain.modules import decode_weight
from toolchain.values import ROW_GROUP, VQCode

Watch = Callable[[int, int, str], None]
TOKENS = (1, 2, 4, 8, 16, 128, 512, 2048)
DECODER_GROUPS = ("qkv", "o", "gate_up", "down", "head")
LAUNCHES = 20  # of a graph, at least: one launch is a few microseconds, as long as an event's own error
ROUNDS, DROPPED = 9, 2
ROOF_BYTES = 1 << 30
CHECKED_TOKENS = 16  # first and last ones of a product that are compared with float64
CLOCK_SECONDS = 1.0
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


def bench_kernels(request: KernelRequest, watch: Watch | None = None) -> dict[str, Any]:
    """What was measured on this machine's first CUDA device, JSON-clean:

        request, machine    as `bench.quantize`; machine has also multiprocessors, l2_bytes, the library's file and
                            architectures, and power_limit where the driver tells it
        roof                `kernel_figures.Roof`: read_bytes_per_s by the library's own reader, clock_hz under load
        rows                `kernel_figures.row` a matrix, code and number of tokens, caches cold
        resident            the same with one copy, where its codes fit half of the L2 cache: how fast decoding itself
        is decoders            `kernel_figures.decoder_row`

    Raises:
        UsageError, UnsupportedError: the request asks for something unknown.
        EnvironmentMismatch: there is no CUDA device, or no library for it.
        NumericGateError: a kernel computes something else than the weight says.
    """
    matrices = check_request(request)
    device = torch.device(checked_device("cuda").type, 0)
    library = ops.device_library(0)
    facts = torch.cuda.get_device_properties(device)
    with torch.cuda.device(device), torch.inference_mode():
        read = read_bandwidth(device, request.rounds)
        roof = Roof(read, facts.multi_processor_count, clock_under_load(device))
        rows, resident = [], []
        jobs = [(m, VQCode.parse(c), tokens) for m in matrices for c in request.codes for tokens in request.tokens]
        for number, ((name, group, shape), code, tokens) in enumerate(jobs):
            if watch:
                watch(number, len(jobs), f"{name} {group} {code} M={tokens}")
            case = Case(shape, code, tokens, request.seed, device)
            label = f"{name} {group}"
            rows.append(row(label, shape, code, tokens, *case.cold(facts.L2_cache_size, request.rounds), roof))
            if 2 * packed_bytes(code, *shape) <= facts.L2_cache_size:
                resident.append(row(label, shape, code, tokens, *case.resident(request.rounds), roof))
        decoders = [
            end_to_end(name, VQCode.parse(code), request.context, request.rounds, device)
            for name in request.decoders
            for code in request.codes
        ]
    machine = machine_facts(device) | {
        "multiprocessors": facts.multi_processor_count,
        "l2_bytes": facts.L2_cache_size,
        "library": str(library.path),
        "architectures": list(library.architectures),
        "power_limit": driver_says("power.limit"),
    }
    return {
        "request": asdict(request),
        "machine": machine,
        "roof": asdict(roof),
        "rows": rows,
        "resident": resident,
        "decoders": decoders,
    }


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

    def cold(self, l2_bytes: int, rounds: int) -> tuple[Spread, Spread]:
        """Ours and the dense library's, each over copies that are four times the cache together."""
        packed, dense = packed_bytes(self.code, self.rows, self.columns), 2 * self.rows * self.columns
        return self._timed(copies_for(packed, l2_bytes), copies_for(dense, l2_bytes), rounds)

    def resident(self, rounds: int) -> tuple[Spread, Spread]:
        """The same over one copy."""
        return self._timed(1, 1, rounds)

    def _timed(self, copies: int, dense_copies: int, rounds: int) -> tuple[Spread, Spread]:
        codes = self.codes(copies)
        self.check(codes[0])
        weights = [torch.randn(self.rows, self.columns, dtype=torch.float16, **self.draw) for _ in range(dense_copies)]
        # A graph must run through all copies, or the ones it uses stay in the cache from replay to replay.
        ours = Graph([partial(self.ours, c) for c in codes], max(LAUNCHES, copies))
        dense = Graph([partial(torch.matmul, self.x, w.T) for w in weights], max(LAUNCHES, dense_copies))
        first, second = interleaved((ours, dense), rounds)
        return spread(first, DROPPED), spread(second, DROPPED)

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


class Graph:
    """A CUDA graph of `launches` calls, the given ones in turn. `seconds()` replays it once, timed a launch."""

    def __init__(self, calls: Sequence[Callable[[], Any]], launches: int) -> None:
        self.launches = launches
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what a first call allocates or loads must not be captured
            for call in calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for number in range(launches):
                calls[number % len(calls)]()

    def seconds(self) -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        self.graph.replay()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) / 1000 / self.launches


def interleaved(graphs: Sequence[Graph], rounds: int) -> list[list[float]]:
    """Seconds of each graph, round after round, all of them once a round."""
    found: list[list[float]] = [[] for _ in graphs]
    for _ in range(rounds):
        for graph, seconds in zip(graphs, found):
            seconds.append(graph.seconds())
    return found


def read_bandwidth(device: torch.device, rounds: int) -> float:
    """Bytes a second of reading ROOF_BYTES once, by the library's reader: the roof that shares are of."""
    library = ops.device_library(device.index)
    data = torch.zeros(ROOF_BYTES, dtype=torch.uint8, device=device)
    sink = torch.zeros(1, dtype=torch.int32, device=device)

    def call() -> None:
        library.read(data.data_ptr(), ROOF_BYTES, sink.data_ptr(), torch.cuda.current_stream().cuda_stream)

    (seconds,) = interleaved((Graph([call], LAUNCHES),), rounds)
    return ROOF_BYTES / spread(seconds, DROPPED).seconds


def clock_under_load(device: torch.device) -> float | None:
    """Hz of the SM clock while a matrix product keeps the device busy; None where neither pynvml nor nvidia-smi reads
    it.

    The driver's order of devices is taken to be torch's, as it is where one device is visible.
    """
    left = torch.randn(4096, 4096, dtype=torch.float16, device=device)
    graph = Graph([lambda: torch.matmul(left, left)], LAUNCHES)
    began = time.perf_counter()
    once = graph.seconds() * LAUNCHES
    for _ in range(min(10_000, int(CLOCK_SECONDS / once) + 1)):
        graph.graph.replay()
    found = _nvml_clock(device.index)
    if found is None:
        text = driver_says("clocks.sm")  # such as "1980 MHz"
        number = text.split()[0] if text else ""
        found = float(number) * 1e6 if number.replace(".", "", 1).isdigit() else None
    torch.cuda.synchronize()
    # A reading taken after the device had finished is an idle clock.
    return found if time.perf_counter() - began >= CLOCK_SECONDS / 2 else None


def _nvml_clock(index: int) -> float | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        return pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM) * 1e6
    except pynvml.NVMLError:
        return None


def driver_says(field: str) -> str | None:
    """What nvidia-smi reports for a field of the first device, with its unit; None where it does not."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--id=0", f"--query-gpu={field}", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return found.stdout.strip() or None if found.returncode == 0 else None


def end_to_end(name: str, code: VQCode, context: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Tokens a second of a decoder with our linears and with float16 ones, one token a replayed graph."""
    options: dict[str, Any] = {"dtype": torch.float16, "device": device}
    graphs = []
    for make in (coded_maker(code, options), dense_maker(options)):
        decoder = Decoder(name, make, context, options)
        x = torch.randn(1, decoder_shape(name).groups[0].columns, **options)
        graphs.append(Graph([partial(decoder, x)], 1))
    ours, dense = interleaved(graphs, rounds)
    return decoder_row(name, code, context, spread(ours, DROPPED), spread(dense, DROPPED))
