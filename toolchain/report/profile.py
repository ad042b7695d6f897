"""The page about a profile: what profile.json holds, with its bars, in the style of the run's report."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolchain import __version__
from toolchain.report.html import Bar, bars, environment, ms_text, share_text

BLOCKS_SHOWN = 40
MAD = "mad is the median distance from the median, not scaled (1.48 of it is a normal distribution's deviation)."


def render_profile(data: Mapping[str, Any]) -> str:
    """The page as text; `data` is the content of profile.json (`toolchain.device.profile.result`)."""
    charts = {
        name: {"parts": _bars(found["parts"]), "blocks": _bars(_largest(found["blocks"]))}
        for name, found in data["layers"].items()
    }
    template = environment().get_template("profile.html.j2")
    known, unknown = _facts(data["telemetry"]) if data["telemetry"] else ([], [])
    return template.render(
        title=f"Profile of {data['source']}", tool_version=__version__, data=data, charts=charts, known=known,
        unknown=unknown, mad=MAD,
    )  # fmt: skip


def write_profile(data: Mapping[str, Any], path: Path) -> None:
    """Write the page; a reader sees the old page or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(render_profile(data), encoding="utf-8")
    os.replace(temporary, path)


def _largest(rows: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The largest rows, the others in one, and the two that close the list."""
    named, closing = rows[:-2], rows[-2:]
    others = named[BLOCKS_SHOWN:]
    if not others:
        return rows
    sums = {key: sum(row[key] for row in others) for key in ("ms", "share", "layers")}
    return [*named[:BLOCKS_SHOWN], {"name": f"{len(others)} smaller ones", "part": "several", **sums}, *closing]


def _facts(telemetry: Mapping[str, Any]) -> tuple[list[tuple[str, Any, str]], list[str]]:
    """Of the machine's settings and clocks: (name, value, unit) of what is known, and names of what is not."""
    settings = telemetry["settings"]
    facts = [
        ("power mode", settings["power_mode"], ""),
        ("GPU clock, median where busy", telemetry["gpu_mhz_median"], "MHz"),
        ("GPU clock, least where busy", telemetry["gpu_mhz_min"], "MHz"),
        ("GPU clock allowed", settings["gpu_max_mhz"], "MHz"),
        ("GPU load, median", telemetry["gpu_load_median"], "%"),
        ("memory clock, median", telemetry["emc_mhz_median"], "MHz"),
        ("memory clock allowed", settings["emc_max_mhz"], "MHz"),
    ]
    known = [fact for fact in facts if fact[1] is not None]
    return known, [name for name, value, _ in facts if value is None]


def _bars(rows: list[Mapping[str, Any]]) -> list[Bar]:
    """A bar a row. A negative rest (layers that overlapped) is shown as none, its figure stands beside it."""
    return bars(
        [(row["name"], max(row["ms"], 0.0), f"{ms_text(row['ms'])} ms, {share_text(row['share'])}") for row in rows]
    )
