"""Calibration data as a user writes it: a manifest of images, prompts and answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from toolchain.errors import InputDataError
from toolchain.files.folders import sha256_file
from toolchain.values import Sample

REQUIRED_KEYS = ("image", "prompt")


OPTIONAL_KEYS = ("answer",)


def read_manifest(path: Path) -> list[Sample]:
    """The samples of a `.jsonl` manifest: one {"image", "prompt"[, "answer"]} a line, image paths relative to the file.

    Every image is opened and checked now, so that nothing fails an hour later.

    Raises:
        InputDataError: the file is missing or empty, or a line is not what it should be; names file and line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputDataError(f"manifest {path}: cannot be read ({error}); expected a UTF-8 .jsonl file") from None
    samples = [_sample(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not samples:
        raise InputDataError(f'manifest {path}: holds no samples; write one {{"image": …, "prompt": …}} a line')
    return samples


def samples_hash(samples: Sequence[Sample]) -> str:
    """SHA-256 over prompts, answers and image bytes, in order; where the files lie does not matter."""
    digest = hashlib.sha256()
    for sample in samples:
        line = [sha256_file(sample.image), sample.prompt, sample.answer]
        digest.update(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def _sample(path: Path, number: int, line: str) -> Sample:
    where = f"manifest {path}, line {number}"
    try:
        data = json.loads(line)
    except ValueError as error:
        raise InputDataError(f"{where}: not JSON ({error}); expected one object a line") from None
    if not isinstance(data, dict):
        raise InputDataError(f"{where}: expected a JSON object, found {type(data).__name__}")
    missing = [key for key in REQUIRED_KEYS if key not in data]
    unknown = sorted(set(data) - {*REQUIRED_KEYS, *OPTIONAL_KEYS})
    if missing or unknown:
        problem = f"missing {', '.join(missing)}" if missing else f"unknown {', '.join(unknown)}"
        raise InputDataError(f"{where}: {problem}; the keys are image, prompt and optionally answer")
    wrong = [key for key, value in data.items() if not (isinstance(value, str) or (key == "answer" and value is None))]
    if wrong:
        raise InputDataError(f"{where}: {wrong[0]} must be text, found {type(data[wrong[0]]).__name__}")
    image = (path.parent / data["image"]).absolute()
    _check_image(image, where)
    return Sample(image, data["prompt"], data.get("answer"))


def _check_image(image: Path, where: str) -> None:
    if not image.is_file():
        raise InputDataError(f"{where}: image {image} does not exist; paths are relative to the manifest")
    try:
        with Image.open(image) as opened:
            opened.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputDataError(f"{where}: image {image} cannot be read ({error}); save it again as PNG or JPEG") from None
