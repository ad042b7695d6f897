"""Packages that a verb needs and this environment lacks: a board has a part of what the package depends on."""

from __future__ import annotations

import re
from importlib import metadata

DISTRIBUTION = "mgvq"
MODULES = {"PIL": "pillow"}  # module → distribution, where the name differs in more than its dashes


def absent_package(error: ModuleNotFoundError) -> str | None:
    """What to do about a module that was not found, if it is of a package that mgvq depends on; None if not."""
    module = (error.name or "").partition(".")[0]
    wanted = MODULES.get(module, module.replace("_", "-")).lower()
    requirement = next((line for line in requirements() if distribution_of(line) == wanted), None)
    if requirement is None:
        return None
    return (
        f"this needs the Python module {error.name}, found none; run it on the workstation, or pip install "
        f"'{requirement}' (a board builds, runs, chats and profiles with what requirements-board.txt lists)"
    )


def requirements() -> list[str]:
    """The package's own requirements, such as "numpy>=1.26", those of extras left out."""
    lines = metadata.requires(DISTRIBUTION) or []
    return [line.partition(";")[0].strip() for line in lines if "extra ==" not in line]


def distribution_of(requirement: str) -> str:
    """The distribution a requirement names, in lower case with dashes."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def installed(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def version_key(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" is (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def in_window(found: str, low: str, high: str | None) -> bool:
    """low <= found < high."""
    return version_key(low) <= version_key(found) and (high is None or version_key(found) < version_key(high))
