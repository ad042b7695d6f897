"""The families there are, and the one a checkpoint belongs to."""

from __future__ import annotations

from toolchain.errors import UnsupportedError
from toolchain.models.configs import Config
from toolchain.models.family import Family
from toolchain.models.internvl import InternVL
from toolchain.models.qwen2_vl import Qwen2VL

FAMILIES: tuple[Family, ...] = (Qwen2VL(), InternVL())


def family_for(config: Config) -> Family:
    """The family of a checkpoint's config.json.

    Raises:
        UnsupportedError: `model_type` belongs to no family known here.
    """
    found = config.get("model_type")
    for family in FAMILIES:
        if found in family.model_types:
            return family
    known = sorted(t for f in FAMILIES for t in f.model_types)
    raise UnsupportedError(f"config.json: model_type {found!r} is not supported; mgvq knows {known} (mgvq models)")
