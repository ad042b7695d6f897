"""One self-contained HTML page from a run's figures: inline style, inline SVG charts, pictures as data URIs.

`data` holds any of these; a section without data is left out, nothing is made up:

    title          str
    headline       {"accuracy": {name: share 0…1}, "samples": int, "bits": {name: bits}, "note": str}
    parts          [{"part", "index_bits", "real_bits", "bytes", "bytes_fp16"}]
    layers         [{"name", "part", "code", "bits", "bytes", "error"}]   error: relative output error
    kept           {tensor name: elements}                                 what stays in 16 bits
    memory         MemoryPlan.to_json(), with "advice": [{"text"}]
    latency        LatencyPlan.to_json()
    validation     [{"verdict": "pass" | "fail", any other columns}]       in the order they are shown
    questions      [{"image": path or bytes, "prompt", "expected", "answers": {name: text}}]
    engines        build.json
    versions       {name: version}
    commands       [str]                                                   to make the run again
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from toolchain import __version__
from toolchain.errors import InputDataError, UsageError

SECTIONS = (
    *("headline", "parts", "layers", "kept", "memory", "latency"),
    *("validation", "questions", "engines", "versions", "commands"),
)
_SIGNATURES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp", b"GIF8": "image/gif"}


_LABEL = 56


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
        InputDataError: a picture cannot be read or is of no kind a browser shows.
    """
    unknown = sorted(set(data) - {*SECTIONS, "title"})
    if unknown:
        raise UsageError(f"report: sections {unknown} are not known; expected any of {', '.join(SECTIONS)}")
    sections = {name: data.get(name) or None for name in SECTIONS}
    charts = {"errors": _layer_bars(data, "error"), "bits": _layer_bars(data, "bits"), "memory": _memory_bars(data)}
    template = environment().get_template("report.html.j2")
    return template.render(title=data.get("title", "mgvq run"), tool_version=__version__, charts=charts, **sections)


def environment() -> Environment:
    """Templates of this package: everything is escaped, a name that is not there is an error."""
    made = Environment(
        loader=PackageLoader("toolchain.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(size=size_text, share=share_text, number=number_text, picture=data_uri)
    return made


def write_report(data: Mapping[str, Any], path: Path) -> None:
    """Write the page; a reader sees the old page or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(render_report(data), encoding="utf-8")
    os.replace(temporary, path)


def bars(values: Sequence[tuple[str, float, str]]) -> list[Bar]:
    """Bars from (label, value, text), lengths relative to the largest. Long labels keep their end."""
    longest = max((value for _, value, _ in values), default=0.0)
    return [
        Bar(label if len(label) <= _LABEL else "…" + label[1 - _LABEL :], text, value / longest if longest > 0 else 0.0)
        for label, value, text in values
    ]


def _layer_bars(data: Mapping[str, Any], key: str) -> list[Bar]:
    layers = [x for x in data.get("layers") or [] if x.get(key) is not None]
    if len({x[key] for x in layers}) == 1:
        return []  # equal bars tell nothing that the table does not
    return bars([(x["name"], float(x[key]), number_text(x[key])) for x in layers])


def _memory_bars(data: Mapping[str, Any]) -> list[Bar]:
    parts = (data.get("memory") or {}).get("parts", {})
    return bars([(name.replace("_", " "), size, size_text(size)) for name, size in parts.items()])


def size_text(size: float) -> str:
    """Bytes for people: "1.24 GiB", "3.1 MiB", "812 B"."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if abs(size) >= unit:
            return f"{size / unit:.3g} {name}" if size / unit < 1000 else f"{size / unit:,.0f} {name}"
    return f"{size:.0f} B"


def share_text(share: float) -> str:
    return f"{100 * share:.1f} %"


def number_text(value: Any) -> str:
    """Four significant digits for floats, thousands apart for integers, everything else as it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def data_uri(image: Path | str | bytes) -> str:
    """A picture file, or its bytes, as a data URI."""
    try:
        content = image if isinstance(image, bytes) else Path(image).read_bytes()
    except OSError as error:
        raise InputDataError(
            f"report: picture {image!s} cannot be read ({error}); give the path the run used"
        ) from None
    for signature, kind in _SIGNATURES.items():
        if content.startswith(signature):
            return f"data:{kind};base64,{base64.b64encode(content).decode()}"
    where = "given as bytes" if isinstance(image, bytes) else str(image)
    raise InputDataError(f"report: picture {where} is not PNG, JPEG, WebP or GIF; convert it to PNG")
