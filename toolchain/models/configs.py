"""What stands in a checkpoint folder's JSON files, under the names that releases of transformers gave it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolchain.errors import InputDataError
from toolchain.files.folders import read_json

Config = dict[str, Any]


def read_config(folder: Path) -> Config:
    """config.json of a checkpoint folder.

    Raises:
        InputDataError: the folder or the file is missing, or it is not JSON.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise InputDataError(f"checkpoint {folder} does not exist; expected a folder with config.json and safetensors")
    if not path.is_file():
        raise InputDataError(f"checkpoint {folder} has no config.json; expected a transformers checkpoint folder")
    return read_json(path)


def image_settings(folder: Path) -> dict[str, Any]:
    """The image processor's settings, from preprocessor_config.json or the image part of processor_config.json."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            data = read_json(folder / name)
            return data.get("image_processor", data)
    raise InputDataError(f"{folder}: expected preprocessor_config.json or processor_config.json; copy it from the hub")


def chat_template(folder: Path) -> str:
    """The chat template: chat_template.jinja, chat_template.json, or the one inside tokenizer_config.json."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            template = read_json(folder / name).get("chat_template")
            if isinstance(template, str):
                return template
    raise InputDataError(f"{folder}: no chat template; expected chat_template.jinja or one in tokenizer_config.json")


def stop_ids(config: Config, folder: Path) -> list[int]:
    """Token ids that end an answer, from generation_config.json, else from config.json."""
    path = folder / "generation_config.json"
    found = read_json(path).get("eos_token_id") if path.is_file() else None
    found = found if found is not None else text_config(config).get("eos_token_id")
    if found is None:
        raise InputDataError(f"{folder}: no eos_token_id in generation_config.json or config.json")
    return [found] if isinstance(found, int) else list(found)


def text_config(config: Config) -> Config:
    """The decoder's part of a config: nested since transformers 5, flat in older published checkpoints."""
    return config.get("text_config") or config


def head_dim(text: Config) -> int:
    return text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
