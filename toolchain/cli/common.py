"""What verbs share: option types, output as text or JSON, progress that suits where it goes."""

from __future__ import annotations

import json
import os
import sys
import time
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from toolchain.bits.allocation import DEFAULT_BITS, HIGHEST_BITS, LOWEST_BITS, LOWEST_PLAIN_BITS
from toolchain.device.runtime.backends import BACKENDS
from toolchain.errors import UsageError


class Format(str, Enum):
    text = "text"
    json = "json"


class Provider(str, Enum):
    cpu = "cpu"
    cuda = "cuda"


FormatOption = Annotated[Format, typer.Option("--format", help="Format of the result on stdout.")]
ModelOption = Annotated[Path, typer.Option("--model", "-m", help="Folder of a transformers checkpoint.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist or be empty.")]
CalibOption = Annotated[
    Path,
    typer.Option(
        "--calib",
        help='Calibration data (.jsonl): one {"image", "prompt"[, "answer"]} a line, paths relative to the file.',
    ),
]
TargetOption = Annotated[str, typer.Option("--target", help="Board to plan for; see mgvq targets.")]
BITS_HELP = (
    f"Average index bits of the quantized weights, {LOWEST_BITS:g} to {HIGHEST_BITS:g}; methods with plain codes start "
    f"at {LOWEST_PLAIN_BITS:g}. Default: {DEFAULT_BITS:g}, unless --budget is given."
)
BitsOption = Annotated[float | None, typer.Option("--bits", min=LOWEST_BITS, max=HIGHEST_BITS, help=BITS_HELP)]
BudgetOption = Annotated[
    str | None,
    typer.Option(
        "--budget",
        help="Size limit of all weights, such as 3GiB. Alone it chooses the bits; with --bits it is a check.",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Random seed.")]
AnswerTokensOption = Annotated[
    int,
    typer.Option(
        min=0, help="Maximum tokens of the model's own answers to calibration lines without one; 0 for no answers."
    ),
]
ProviderOption = Annotated[Provider, typer.Option("--provider", help="Execution provider of onnxruntime.")]
EnginesOption = Annotated[
    Path | None, typer.Option("--engines", help="Folder that mgvq build wrote, for tensorrt and tensorrt_rtx.")
]


def check_engine_flags(backend: str, engines: Path | None, provider: Provider) -> None:
    """Refuse --engines and --provider where they have no effect on a backend, and engines that are missing.

    Raises:
        UsageError: one of the three.
    """
    if backend not in BACKENDS:
        if engines is not None:
            raise UsageError(
                f"--engines has no effect with --backend {backend}; leave it out, or choose the backend that built them"
            )
        return
    if engines is None:
        raise UsageError(f"--backend {backend} needs --engines, the folder that `mgvq build` wrote")
    if provider is not Provider.cpu:
        raise UsageError(f"--provider has no effect with --backend {backend}; leave it out")


def emit(data: dict[str, Any], text: str, form: Format) -> None:
    """Print the result: `data` as JSON or `text` for people."""
    print(json.dumps(data, indent=2, default=str) if form is Format.json else text)


class TerminalProgress:
    """Progress on stderr: a live line on a terminal, else a plain line when a stage starts and every 30 seconds."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._last, self._began = 0.0, time.monotonic()
        self._first = (0, 0, self._began)  # of a count: where it began, of how many, when

    def stage(self, title: str) -> None:
        """A new stage begins."""
        self._clear()
        self._last = self._began = time.monotonic()
        self._first = (0, 0, self._began)
        print(title, file=sys.stderr, flush=True)

    def step(self, done: int, total: int, what: str = "") -> None:
        """`done` of `total` alike; estimates the time left of this count from all of it but the first step, which
        bears what came before. A stage may count several times.
        """
        now = time.monotonic()
        begun, of, since = self._first
        if total != of or done <= begun:
            begun, of, since = self._first = (done, total, now)
        self._say(done, total, what, (now - since) / (done - begun) * (total - done) if done > begun else None)

    def layer(self, done: int, total: int, name: str, seconds_left: float | None) -> None:
        """`done` of `total` layers, which are not alike: `seconds_left` is the caller's, None where it is not known."""
        self._first = (0, 0, time.monotonic())
        self._say(done, total, name, seconds_left)

    def _say(self, done: int, total: int, what: str, seconds_left: float | None) -> None:
        now = time.monotonic()
        is_known = seconds_left is not None and done < total
        line = f"  {done}/{total} {what}" + (f"  about {seconds_left:.0f} s left of these" if is_known else "")
        if self._live:
            print(f"\r\033[K{line[:100]}", end="", file=sys.stderr, flush=True)
        elif now - self._last >= 30:
            self._last = now
            print(line, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """What stays on the screen, once."""
        self._clear()
        print(f"  note: {text}", file=sys.stderr, flush=True)

    def done(self, summary: str) -> None:
        """The stage is over; `summary` says what came of it."""
        self._clear()
        print(f"  {summary}  ({time.monotonic() - self._began:.0f} s)", file=sys.stderr, flush=True)

    def _clear(self) -> None:
        if self._live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Rows as a plain aligned table with a header."""
    cells = [columns] + [[str(row.get(c, "")) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(v.ljust(w) for v, w in zip(line, widths)).rstrip() for line in cells)


def size(count: float) -> str:
    """Bytes for people: 1.4 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def bits_or_budget(bits: float | None, budget: str | None) -> tuple[float | None, int | None]:
    """(index bits on average, budget in bytes) of the two flags: bits are None where the budget is to be spent.

    Raises:
        UsageError: the budget is no size.
    """
    if budget is None:
        return DEFAULT_BITS if bits is None else bits, None
    return bits, parse_size(budget)


def parse_size(text: str) -> int:
    """Bytes of "3GiB", "900MiB", "2.5GB" or a plain number.

    Raises:
        UsageError: not a size.
    """
    units = {"gib": 2**30, "mib": 2**20, "kib": 2**10, "gb": 10**9, "mb": 10**6, "kb": 10**3, "b": 1, "": 1}
    digits = text.strip().lower().rstrip("gimkb")
    unit = text.strip().lower()[len(digits) :]
    try:
        value = float(digits) * units[unit]
    except (ValueError, KeyError):
        raise UsageError(f"size {text!r}: expected a number with a unit, such as 3GiB or 900MiB") from None
    return int(value)
