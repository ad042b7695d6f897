"""Verbs that measure us on this machine: bench quantize, bench kernels."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from toolchain.cli.common import Format, FormatOption, SeedOption, TerminalProgress, emit, size, table
from toolchain.errors import UsageError

bench = typer.Typer(help="Measure mgvq itself on this machine.", no_args_is_help=True, rich_markup_mode=None)

COLUMNS = ["group", "rows x columns", "method", "code", "part", "seconds", "CPU seconds", "all blocks"]
MODELS = "qwen2-vl-2b, qwen2-vl-7b, llava-onevision-7b, internvl2-8b or demo"
BUSY = 0.9  # share of its threads' wall time below which a run was not alone, or does not fill them
GROUPS_HELP = "Matrices: qkv,o,gate_up,down,head and, of a whole model, vision.qkv, vision.fc1, projector.1 and so on."
PARTS_HELP = "Parts with commas between: statistics,drift,factor,sweep,descent (factor is done inside sweep too)."


class Device(str, Enum):
    cpu = "cpu"
    cuda = "cuda"


@bench.command()
def quantize(
    shapes: Annotated[str, typer.Option(help=f"Decoder: {MODELS}.")],
    layers: Annotated[int, typer.Option(min=1, help="Blocks to measure; the others are identical.")] = 1,
    code: Annotated[list[str] | None, typer.Option("--code", help='"V,k,L", repeatable; 2,4,8 when absent.')] = None,
    groups: Annotated[str | None, typer.Option(help="Groups of a block: qkv,o,gate_up,down; all when absent.")] = None,
    parts: Annotated[str | None, typer.Option(help=PARTS_HELP)] = None,
    device: Annotated[Device, typer.Option(help="Where to quantize.")] = Device.cpu,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens that statistics are taken over.")] = 2048,
    rows: Annotated[float, typer.Option(help="Share of every layer's rows; below 1 nothing is extrapolated.")] = 1.0,
    columns: Annotated[float, typer.Option(help="Share of its columns; below 1 nothing is extrapolated.")] = 1.0,
    peers: Annotated[bool, typer.Option(help="Sweep by GPTQ and in code 4,8,8 too.")] = True,
    seed: SeedOption = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for bench-quantize.json; must be new.")
    ] = None,
    form: FormatOption = Format.text,
) -> None:
    """Time quantization at the layer shapes of a published model, with random weights. Needs no checkpoint."""
    from toolchain.bench.parts import PARTS
    from toolchain.bench.quantize import Request, bench_quantize
    from toolchain.files.folders import check_output, staged_folder, write_json

    if output is not None:
        check_output(output)
    request = Request(
        shapes,
        layers,
        tuple(code or ["2,4,8"]),
        None if groups is None else listed(groups),
        PARTS if parts is None else listed(parts),
        device.value,
        tokens,
        rows,
        columns,
        peers,
        seed,
    )
    progress = TerminalProgress()
    progress.stage(f"quantizing layers of {shapes} on {device.value}")
    result = bench_quantize(request, progress)
    progress.done(result["measured"])
    if output is not None:
        with staged_folder(output) as folder:
            write_json(folder / "bench-quantize.json", result)
    emit(result, result_text(result), form)


@bench.command()
def kernels(
    shapes: Annotated[str, typer.Option(help=f"Models with commas between: {MODELS}.")] = "qwen2-vl-2b,qwen2-vl-7b",
    code: Annotated[list[str] | None, typer.Option("--code", help='"V,k,L", repeatable; 2,4,8 when absent.')] = None,
    groups: Annotated[str, typer.Option(help=GROUPS_HELP)] = "qkv,o,gate_up,down,head",
    tokens: Annotated[str, typer.Option(help="Rows of activations.")] = "1,2,4,8,16,128,512,2048",
    decoders: Annotated[str, typer.Option(help="Models to decode with end to end; empty for none.")] = (
        "qwen2-vl-2b,qwen2-vl-7b"
    ),
    context: Annotated[int, typer.Option(min=1, help="Positions in the cache of those.")] = 1024,
    rounds: Annotated[int, typer.Option(help="Rounds, of which the first two are dropped.")] = 9,
    gates: Annotated[bool, typer.Option("--gates", help="End with exit code 4 unless every gate is met.")] = False,
    seed: SeedOption = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder for bench-kernels.json; must be new. Rows go to FOLDER.partial at once."
        ),
    ] = None,
    form: FormatOption = Format.text,
) -> None:
    """Time the CUDA kernels against cuBLAS in float16, with cold caches. Needs a CUDA device and the library."""
    from toolchain.bench.kernel_gates import unmet
    from toolchain.bench.kernels import KernelRequest, bench_kernels
    from toolchain.errors import NumericGateError
    from toolchain.files.folders import check_output, staged_folder, write_json

    if output is not None:
        check_output(output)
    request = KernelRequest(
        listed(shapes),
        tuple(code or ["2,4,8"]),
        listed(groups),
        counts(tokens),
        listed(decoders),
        context,
        rounds,
        seed,
    )
    progress = TerminalProgress()
    progress.stage("timing kernels")
    partial = None if output is None else output.with_name(output.name + ".partial")
    result = bench_kernels(request, progress, keep=None if partial is None else appender(partial))
    progress.done(f"{len(result['rows'])} products timed")
    if output is not None:
        with staged_folder(output) as folder:
            write_json(folder / "bench-kernels.json", result)
    if partial is not None:
        partial.unlink(missing_ok=True)
    emit(result, kernels_text(result), form)
    if gates and (missed := unmet(result["gates"])):
        raise NumericGateError(f"{len(missed)} of {len(result['gates'])} gates are not met: {'; '.join(missed)}")


def appender(path: Path) -> Callable[[dict[str, Any]], None]:
    """Adds a line of JSON to the file for everything it is given, and closes it each time."""
    import json

    def append(one: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(one) + "\n")

    return append


def counts(text: str) -> tuple[int, ...]:
    """The numbers in "1,2,4".

    Raises:
        UsageError: one is no whole number.
    """
    try:
        return tuple(int(name) for name in listed(text))
    except ValueError:
        raise UsageError(f"{text!r}: expected whole numbers with commas between, such as 1,2,4") from None


def kernels_text(result: dict[str, Any]) -> str:
    """`bench.kernels.bench_kernels`'s result for people."""
    from toolchain.bench.kernel_figures import COLUMNS as KERNEL_COLUMNS
    from toolchain.bench.kernel_figures import DECODER_COLUMNS, decoder_cells, table_cells
    from toolchain.bench.kernel_gates import GATE_COLUMNS, gate_cells

    machine, roof = result["machine"], result["roof"]
    clock = "not known" if roof["clock_hz"] is None else f"{roof['clock_hz'] / 1e6:.0f} MHz under load"
    lines = [
        f"{machine['name']}, {roof['multiprocessors']} SMs, clock {clock}, power limit {machine['power_limit']}, CUDA "
        f"{machine['cuda']}, torch {machine['torch']}; reads {roof['read_bytes_per_s'] / 1e9:.0f} GB/s",
        table([table_cells(one) for one in result["rows"]], KERNEL_COLUMNS),
    ]
    if result["resident"]:
        lines += ["", "one copy, resident in the L2 cache: how fast decoding itself is"]
        lines.append(table([table_cells(one) for one in result["resident"]], KERNEL_COLUMNS))
    if result["decoders"]:
        lines += ["", "one token a step, CUDA graphs, random weights; rotary positions and sampling left out"]
        lines.append(table([decoder_cells(one) for one in result["decoders"]], DECODER_COLUMNS))
    lines += ["", table([gate_cells(one) for one in result["gates"]], GATE_COLUMNS)]
    return "\n".join(lines)


def listed(text: str) -> tuple[str, ...]:
    """The names in "a,b"."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def result_text(result: dict[str, Any]) -> str:
    """`bench.quantize.bench_quantize`'s result for people."""
    machine, decoder = result["machine"], result["decoder"]
    shapes = {
        one["group"]: f"{'+'.join(map(str, one['quantized_rows']))} x {one['quantized_columns']}"
        for one in result["groups"]
    }
    lines = [dict(zip(COLUMNS, _cells(row, shapes[row["group"]]), strict=True)) for row in result["rows"]]
    peaks = ", ".join(f"{one['group']} {size(one['peak_bytes'])}" for one in result["groups"])
    kind = "peak GPU memory" if machine["device"] == "cuda" else "peak resident memory of the process so far"
    return "\n".join(
        [
            f"{decoder['name']}, {decoder['blocks']} blocks, on {machine['name']}, {machine['threads']} threads, "
            f"torch {machine['torch']}, load {machine['load_average']}",
            table(lines, COLUMNS),
            "",
            *(_total_text(one) for one in result["totals"]),
            *(_ratio_text(one) for one in result["ratios"]),
            f"{kind}: {peaks}",
            *_busy_text(result["busy_share"]),
            f"measured: {result['measured']}",
            f"extrapolated: {result['extrapolated']}",
            f"not in it: {result['excluded']}",
        ]
    )


def _cells(row: dict[str, Any], shape: str) -> list[str]:
    part = row["part"] if row["is_in_sums"] or row["part"] == "sweep" else f"{row['part']} (in sweep)"
    all_blocks = "-" if row["decoder_seconds"] is None else duration(row["decoder_seconds"])
    seconds = [f"{row[key]:.3f}" for key in ("mean_seconds", "mean_cpu_seconds")]
    return [row["group"], shape, row["method"], row["code"] or "any", part, *seconds, all_blocks]


def _total_text(one: dict[str, Any]) -> str:
    parts = " + ".join(one["parts"])
    seconds, cpu_seconds = duration(one["measured_seconds"]), duration(one["measured_cpu_seconds"])
    text = f"{one['method']} {one['code']}, {parts}: {seconds} measured ({cpu_seconds} of CPU time)"
    if one["block_seconds"] is None:
        return text
    return f"{text}, a block {duration(one['block_seconds'])}, the decoder {duration(one['decoder_seconds'])}"


def _busy_text(share: float | None) -> list[str]:
    """A line where wall seconds may hold somebody else's work."""
    if share is None or share >= BUSY:
        return []
    return [
        f"CPU time was {share:.0%} of wall time x threads: others ran beside it, or not all threads had work; "
        "on a shared machine read the CPU seconds"
    ]


def _ratio_text(one: dict[str, Any]) -> str:
    times = f"{one['ratio']:.2f} x {one['against']}'s ({one['cpu_ratio']:.2f} x in CPU time)"
    return f"{one['group']}: sweep in {one['code']} takes {times}"


def duration(seconds: float) -> str:
    """Seconds for people: 3.2 s, 4.5 min, 2.1 h."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2f} s"
