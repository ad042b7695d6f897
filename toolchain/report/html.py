"""One self-contained HTML page from a run's figures: inline style, bars of plain elements, images as data URIs.

`data` holds any of these; a section without data is left out, nothing is made up:

    title          str
    headline       {"accuracy": {name: share 0…1}, "samples": int, "bits": {name: bits}, "note": str}
    parts          [{"part", "index_bits", "real_bits", "bytes", "bytes_fp16"}]
    layers         [{"name", "part", "code", "bits", "bytes", "error"}]   error: relative output error
    kept           {tensor name: elements}                                 what stays in 16 bits
    memory         MemoryPlan.to_json(), with "advice": [{"text"}]
    latency        LatencyPlan.to_json()
    validation     [{"verdict": "pass" | "fail" | "not gated", others}]    summed up by "compared" where rows have it
    questions      [{"image": path or bytes, "prompt", "expected", "answers": {name: text}}]
    engines        build.json
    versions       {name: version}
    commands       [str]                                                   to make the run again
"""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from toolchain import __version__
from toolchain.errors import InputDataError, UsageError

SECTIONS = (
    *("headline", "parts", "memory", "latency", "questions", "validation"),
    *("engines", "layers", "kept", "versions", "commands"),
)
_SIGNATURES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp", b"GIF8": "image/gif"}

ERRORS_SHOWN = 12
NOT_GATED, NONE = "not gated", "none"  # verdict and budget of a comparison that is told and decides nothing
_MEMORY = {"kept16": "kept in 16 bits", "kv": "keys and values"}


@dataclass(frozen=True)
class Bar:
    """One bar of a chart: `share` of the longest is its length; `text` stands at its end."""

    label: str
    text: str
    share: float


def render_report(data: Mapping[str, Any]) -> str:
    """The page as text.

    Raises:
        UsageError: a key is not one of the sections.
        InputDataError: an image cannot be read or is of no kind a browser shows.
    """
    unknown = sorted(set(data) - {*SECTIONS, "title"})
    if unknown:
        raise UsageError(f"report: sections {unknown} are not known; expected any of {', '.join(SECTIONS)}")
    sections = {name: data.get(name) or None for name in SECTIONS}
    charts = {"errors": _error_bars(data), "bits": _bits_bars(data), "memory": _memory_bars(data)}
    template = environment().get_template("report.html.j2")
    title, checks = data.get("title", "mgvq run"), _checks(sections["validation"] or [])
    return template.render(title=title, tool_version=__version__, charts=charts, checks=checks, **sections)


def environment() -> Environment:
    """Templates of this package: everything is escaped, a name that is not there is an error."""
    made = Environment(
        loader=PackageLoader("toolchain.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        size=size_text, share=share_text, percent=percent_text, number=number_text, ms=ms_text, image=data_uri
    )
    return made


def write_report(data: Mapping[str, Any], path: Path) -> None:
    """Write the page; a reader sees the old page or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(render_report(data), encoding="utf-8")
    os.replace(temporary, path)


def bars(values: Sequence[tuple[str, float, str]]) -> list[Bar]:
    """Bars from (label, value, text), lengths relative to the largest."""
    longest = max((value for _, value, _ in values), default=0.0)
    return [Bar(label, text, value / longest if longest > 0 else 0.0) for label, value, text in values]


def _error_bars(data: Mapping[str, Any]) -> list[Bar]:
    layers = [x for x in data.get("layers") or [] if x.get("error") is not None]
    worst = sorted(layers, key=lambda x: -x["error"])[:ERRORS_SHOWN]
    return bars([(x["name"], float(x["error"]), percent_text(x["error"])) for x in worst])


def _bits_bars(data: Mapping[str, Any]) -> list[Bar]:
    layers = [x for x in data.get("layers") or [] if x.get("bits") is not None]
    if len({x["bits"] for x in layers}) == 1:
        return []  # equal bars tell nothing that the table does not
    return bars([(x["name"], float(x["bits"]), number_text(x["bits"])) for x in layers])


def _memory_bars(data: Mapping[str, Any]) -> list[Bar]:
    parts = (data.get("memory") or {}).get("parts", {})
    return bars([(_MEMORY.get(name, name.replace("_", " ")), size, size_text(size)) for name, size in parts.items()])


def _checks(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Validation in a row for each pair that was compared; empty where rows do not say what they compare."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if "compared" in row:
            groups.setdefault(row["compared"], []).append(row)
    return [_check(name, found) for name, found in groups.items()]


def _check(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    errors = [row["relative error"] for row in rows if "relative error" in row]
    used = [float(row["relative error"]) / float(row["budget"]) for row in rows if row.get("budget", NONE) != NONE]
    failed = sum(row["verdict"] == "fail" for row in rows)
    gated = any(row["verdict"] != NOT_GATED for row in rows)
    return {
        "compared": name,
        "places": len(rows),
        "largest": max(errors, key=float, default="–"),
        "used": f"{100 * max(used):.0f} %" if used else "–",
        "verdict": f"fail: {failed}" if failed else "pass" if gated else NOT_GATED,
    }


def size_text(size: float) -> str:
    """Bytes for people: "1.24 GiB", "3.1 MiB", "812 B"."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if abs(size) >= unit:
            return f"{size / unit:.3g} {name}" if size / unit < 1000 else f"{size / unit:,.0f} {name}"
    return f"{size:.0f} B"


def share_text(share: float) -> str:
    return f"{100 * share:.1f} %"


def percent_text(share: float) -> str:
    """Three significant digits, for shares that may be small: "0.0537 %"."""
    return f"{100 * share:.3g} %"


def ms_text(value: float) -> str:
    """Three significant digits without an exponent, at most four decimals: "1,460", "41.0", "0.0063"."""
    if not value:
        return "0"
    return f"{value:,.{min(max(2 - math.floor(math.log10(abs(value))), 0), 4)}f}"


def number_text(value: Any) -> str:
    """Four significant digits for floats, thousands apart for integers, everything else as it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def data_uri(image: Path | str | bytes) -> str:
    """An image file, or its bytes, as a data URI."""
    try:
        content = image if isinstance(image, bytes) else Path(image).read_bytes()
    except OSError as error:
        raise InputDataError(f"report: image {image!s} cannot be read ({error}); give the path the run used") from None
    for signature, kind in _SIGNATURES.items():
        if content.startswith(signature):
            return f"data:{kind};base64,{base64.b64encode(content).decode()}"
    where = "given as bytes" if isinstance(image, bytes) else str(image)
    raise InputDataError(f"report: image {where} is not PNG, JPEG, WebP or GIF; convert it to PNG")
