"""The host half of each VLM family: images and prompts to the inputs of the three graphs, with no torch.

One class per family, in a file of its name. The workstation and the board run the same code, so that what was
calibrated, validated and shipped saw the same pixels and ids. Everything a host needs to know stands in `host.json`.

May import `bundle` and what stands above it.
"""

from __future__ import annotations

import json
from pathlib import Path

from toolchain.device.families.base import Host, Prepared, Turn
from toolchain.device.families.internvl import InternVLHost
from toolchain.device.families.qwen2_vl import Qwen2VLHost
from toolchain.errors import InputDataError, UnsupportedError

HOSTS: dict[str, type[Host]] = {"qwen2_vl": Qwen2VLHost, "internvl": InternVLHost}

__all__ = ["HOSTS", "Host", "Prepared", "Turn", "host_from_folder"]


def host_from_folder(folder: Path) -> Host:
    """The host described by `host.json`, `tokenizer.json` and `chat_template.jinja` of a folder.

    Raises:
        InputDataError: a file is missing or does not parse.
        UnsupportedError: `host.json` names a family this version does not have.
    """
    missing = [n for n in ("host.json", "tokenizer.json", "chat_template.jinja") if not (folder / n).is_file()]
    if missing:
        raise InputDataError(f"{folder}: expected host.json, tokenizer.json and chat_template.jinja, missing {missing}")
    try:
        settings = json.loads((folder / "host.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputDataError(f"{folder / 'host.json'} is not JSON ({error}); copy the folder again") from None
    if settings.get("family") not in HOSTS:
        raise UnsupportedError(
            f"{folder / 'host.json'}: family {settings.get('family')!r} is not one of {sorted(HOSTS)}; update mgvq"
        )
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return HOSTS[settings["family"]](settings, (folder / "tokenizer.json").read_bytes(), template)
