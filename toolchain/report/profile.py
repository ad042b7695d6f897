"""The page about a profile: what profile.json holds, with its bars, in the style of the run's report."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolchain import __version__
from toolchain.report.html import Bar, bars, environment

BLOCKS_SHOWN = 48


def render_profile(data: Mapping[str, Any]) -> str:
    """The page as text; `data` is the content of profile.json (`toolchain.device.profile_result`)."""
    charts = {
        name: {"parts": _bars(found["parts"]), "blocks": _bars(found["blocks"][:BLOCKS_SHOWN])}
        for name, found in data["layers"].items()
    }
    template = environment().get_template("profile.html.j2")
    return template.render(title=f"Profile of {data['source']}", tool_version=__version__, data=data, charts=charts)


def write_profile(data: Mapping[str, Any], path: Path) -> None:
    """Write the page; a reader sees the old page or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(render_profile(data), encoding="utf-8")
    os.replace(temporary, path)


def _bars(rows: list[Mapping[str, Any]]) -> list[Bar]:
    """A bar a row. A negative rest (layers that overlapped) is shown as none, its figure stands beside it."""
    return bars([(row["name"], max(row["ms"], 0.0), f"{row['ms']:.3g} ms, {100 * row['share']:.1f} %") for row in rows])
