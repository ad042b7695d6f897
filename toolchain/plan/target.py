"""Boards we deploy to: one TOML per board and memory size under targets/, every figure with its kind and source.

The board itself reads JSON only (`target.json` of a bundle), because Python 3.10 has no TOML reader.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import InputDataError, UnsupportedError

# "derived" is arithmetic on figures the source names; "chosen" is a default of ours; "assumed" has no source yet.
KINDS = ("published", "measured", "derived", "assumed", "chosen")

_HERE = Path(__file__).resolve().parent.parent
_FOLDERS = (_HERE / "_targets", _HERE.parent / "targets")  # the wheel's copy, then the source checkout's


@dataclass(frozen=True)
class Software:
    """One release that runs on a board. Versions are prefixes: "10.3" stands for every 10.3.x; "" is not known."""

    jetpack: str
    l4t: str
    tensorrt: str
    cuda: str
    source: str


@dataclass(frozen=True)
class Target:
    """One board in one power mode. Bandwidths are bytes/s, clocks Hz, sizes bytes; targets/README.md explains each."""

    name: str
    title: str
    sm: str
    software: tuple[Software, ...]
    power_mode: str
    sm_count: int
    gpu_clock_hz: int
    fp16_flops_per_s: int
    matmul_efficiency: float
    memory_total_bytes: int
    memory_usable_bytes: int
    memory_usable_desktop_bytes: int
    bandwidth_pin_bytes_per_s: int
    bandwidth_read_bytes_per_s: int
    largest_block_bytes: int
    largest_block_default_bytes: int
    shared_memory_per_block_bytes: int
    l2_bytes: int
    max_image_pixels: int
    default_context_tokens: int
    sources: dict[str, dict[str, str]]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"software": [dataclasses.asdict(x) for x in self.software]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Target:
        """The target `to_json` wrote.

        Raises:
            InputDataError: a key is missing or unknown, or a figure is not of its type.
        """
        where = f"target {data.get('name', '?')}"
        _check_keys(data, {x.name for x in dataclasses.fields(cls)}, where)
        for name in FIGURES:
            _check_type(data[name], _FIGURE_TYPES[name], f"{where}: {name}")
        software = tuple(_software(x, where) for x in data["software"])
        return cls(**{**data, "software": software})


_IDENTITY = ("name", "title", "sm")
FIGURES = tuple(
    field.name for field in dataclasses.fields(Target) if field.name not in (*_IDENTITY, "software", "sources")
)
_FIGURE_TYPES = {name: {"power_mode": str, "matmul_efficiency": float}.get(name, int) for name in FIGURES}


def list_targets() -> tuple[str, ...]:
    """Names of the known targets, sorted."""
    return tuple(sorted(path.stem for path in _target_folder().glob("*.toml")))


def load_target(name: str) -> Target:
    """The target called `name`.

    Raises:
        UnsupportedError: no such target; the message lists the known ones and the closest match.
        InputDataError: its file has a missing, unknown or unsourced figure.
    """
    known = list_targets()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UnsupportedError(f"target {name!r} is not known; {hint}known targets: {', '.join(known)}")
    return read_target(_target_folder() / f"{name}.toml")


def read_target(path: Path) -> Target:
    """The target described by one TOML file; `name` in it must be the file's own.

    Raises:
        InputDataError: not TOML, or a key is missing, unknown, of the wrong type or without a source.
    """
    try:
        data = parse_toml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputDataError(
            f"{path}: cannot be read as a target ({error}); compare it with targets/README.md"
        ) from None
    _check_keys(data, {*_IDENTITY, "software", *FIGURES}, str(path))
    if data["name"] != path.stem:
        raise InputDataError(
            f"{path}: name is {data['name']!r}, expected the file's own name {path.stem!r}; rename one"
        )
    flat: dict[str, Any] = {key: data[key] for key in (*_IDENTITY, "software")}
    sources = {}
    for key in FIGURES:
        flat[key], sources[key] = _figure(data[key], f"{path}: {key}")
    return Target.from_json({**flat, "sources": sources})


def parse_toml(text: str) -> dict[str, Any]:
    """The content of a TOML document.

    Raises:
        ValueError: it is not TOML; the message gives line and column.
    """
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib  # type: ignore[no-redef]
    return tomllib.loads(text)


def _target_folder() -> Path:
    for folder in _FOLDERS:
        if folder.is_dir():
            return folder
    raise InputDataError(f"no target files in {' or '.join(map(str, _FOLDERS))}; install mgvq again")


def _figure(entry: Any, where: str) -> tuple[Any, dict[str, str]]:
    """(value, {"kind", "source"}) of one figure's table."""
    if not isinstance(entry, dict):
        raise InputDataError(f"{where}: expected a table with value, kind and source, found {entry!r}")
    _check_keys(entry, {"value", "kind", "source"}, where)
    if entry["kind"] not in KINDS or not str(entry["source"]).strip():
        raise InputDataError(f"{where}: expected kind in {KINDS} and a source, found kind {entry['kind']!r}")
    return entry["value"], {"kind": entry["kind"], "source": entry["source"]}


def _software(entry: Any, where: str) -> Software:
    _check_keys(entry, {x.name for x in dataclasses.fields(Software)}, f"{where}: software")
    return Software(**entry)


def _check_type(value: Any, kind: type, where: str) -> None:
    if type(value) is not kind:
        raise InputDataError(f"{where}: expected {kind.__name__}, found {value!r}")
    if isinstance(value, (int, float)) and value <= 0:
        raise InputDataError(f"{where}: expected a positive number, found {value}")


def _check_keys(data: dict[str, Any], expected: set[str], where: str) -> None:
    missing, unknown = sorted(expected - set(data)), sorted(set(data) - expected)
    if missing or unknown:
        raise InputDataError(f"{where}: missing keys {missing}, unknown keys {unknown}; see targets/README.md")
