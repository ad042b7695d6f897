"""What `mgvq build` says of what it built: build.json."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class BuiltEngine:
    """One engine. `dense_bytes` is the size of the same graph's engine with 16-bit weights, where asked for."""

    graph: str
    file: str
    bytes: int
    seconds: float
    layers: int
    sha256: str = ""
    plugin_layers: int = 0
    profiles: int = 1
    dense_bytes: int | None = None


@dataclass(frozen=True)
class BuildReport:
    """What was built, from what, with what, for which device; this is build.json.

    `check` is what stored calls say of the engines (engine_check.py), None where they were not asked.
    """

    backend: str
    builder_version: str
    sm: str
    bundle: str
    engines: tuple[BuiltEngine, ...]
    warnings: tuple[str, ...]
    device: dict[str, Any] | None = None
    plugin: dict[str, str] | None = None
    selftest_cases: int = 0
    pools: dict[str, int] = field(default_factory=dict)
    timing_cache: dict[str, Any] | None = None
    lowest_available_bytes: int | None = None
    check: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
