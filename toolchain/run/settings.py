"""Every setting of a run, with its default in one place: flags over --set over --config FILE over these defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from toolchain.bits.allocation import DEFAULT_BITS, HIGHEST_BITS, LOWEST_BITS
from toolchain.errors import InputDataError, UsageError
from toolchain.quantize.methods import stored_method
from toolchain.values import ANSWER_TOKENS


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class QuantizeSection(Section):
    """How weights are coded. `bits` are index bits averaged over the quantized weights; none where the budget decides.

    `method` is mgvq with any of its parts off or on (`mgvq.recipe`), or a baseline that a checkpoint can hold.
    """

    method: str = "mgvq"
    bits: float | None = Field(DEFAULT_BITS, ge=LOWEST_BITS, le=HIGHEST_BITS)
    codes: dict[str, str] = Field(default_factory=dict, description="module-name pattern → code V,k,L; last match wins")
    seed: int = 0
    samples: int | None = Field(None, gt=0, description="use the first N calibration lines; all when absent")
    answer_tokens: int = Field(
        ANSWER_TOKENS, ge=0, description="most tokens of the model's own answers to calibration lines without one"
    )

    @field_validator("method")
    @classmethod
    def _is_known(cls, name: str) -> str:
        try:
            stored_method(name)
        except UsageError as error:
            raise PydanticCustomError("method", "{reason}", {"reason": str(error)}) from None
        return name


class PlanSettings(Section):
    """What the memory plan is computed for."""

    context: int | None = Field(None, gt=0, description="tokens; the target's default when absent")
    image: str | None = Field(None, pattern=r"^\d+x\d+$", description="largest image, WIDTHxHEIGHT pixels")


class RewriteSettings(Section):
    """What the device graphs permit. int8 changes answers, and no gate sees it: validation has float16 inputs."""

    int8_activations: bool = Field(False, description="engines may round inputs of linears with codes 4,k,L to int8")


class ValidateSettings(Section):
    """How stages are compared: greedy decode steps, and onnxruntime's provider."""

    steps: int = Field(4, ge=1)
    samples: int = Field(3, ge=1)
    provider: Literal["cpu", "cuda"] = "cpu"


class Settings(Section):
    """One run of the whole line."""

    model: Path
    output: Path
    calib: Path
    data: Path | None = Field(None, description="evaluation manifest; accuracy is measured when given")
    target: str = "orin-nano-8gb"
    budget_bytes: int | None = Field(
        None, gt=0, description="most bytes of all weights: without quantize.bits spent on bits, with them a limit"
    )
    quantize: QuantizeSection = QuantizeSection()
    plan: PlanSettings = PlanSettings()
    rewrite: RewriteSettings = RewriteSettings()
    validation: ValidateSettings = ValidateSettings()

    @model_validator(mode="after")
    def _says_how_large(self) -> Settings:
        if self.quantize.bits is None and self.budget_bytes is None:
            raise PydanticCustomError("size", "quantize.bits is null without a budget_bytes; give one of them")
        return self


def resolve(flags: dict[str, Any], assignments: list[str], file: Path | None) -> tuple[Settings, dict[str, str]]:
    """(settings, dotted key → where its value came from: "flag", "set", "file" or "default").

    `flags` holds dotted keys; None means the flag was not given. `assignments` are "a.b=c" strings, c in JSON or plain.
    A budget without `quantize.bits` leaves those None, with the budget's origin: bits are then what it can hold.

    Raises:
        UsageError: an unknown key, a value of the wrong type, or a malformed assignment, named.
        InputDataError: the file is missing or does not parse.
    """
    layers = [("file", _flatten(_read(file)) if file else {})]
    layers.append(("set", dict(_assignment(text) for text in assignments)))
    layers.append(("flag", {k: v for k, v in flags.items() if v is not None}))
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, layer in layers:
        values |= layer
        origin |= dict.fromkeys(layer, name)
    if values.get("budget_bytes") is not None and "quantize.bits" not in values:
        values["quantize.bits"], origin["quantize.bits"] = None, origin["budget_bytes"]
    try:
        settings = Settings.model_validate(_nest(values))
    except ValidationError as error:
        raise UsageError(_first_problem(error, origin)) from None
    known = _flatten(settings.model_dump(mode="json"))
    return settings, {key: origin.get(key, "default") for key in known}


def _first_problem(error: ValidationError, origin: dict[str, str]) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    source = origin.get(key, "settings")
    if first["type"] == "missing":
        return f"setting {key!r} is required; give it as a flag (--{key.split('.')[-1]}), with --set, or in --config"
    found = "" if first["type"] == "extra_forbidden" else f", found {first.get('input')!r}"
    return f"setting {key!r} (from {source}): {first['msg']}{found}; see mgvq all --help"


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise InputDataError(f"configuration {file} does not exist; expected a JSON or TOML file")
    try:
        if file.suffix == ".toml":
            from toolchain.plan.target import parse_toml

            return parse_toml(file.read_text(encoding="utf-8"))
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputDataError(
            f"configuration {file}: {error}; expected JSON, or TOML when the name ends in .toml"
        ) from None
    if not isinstance(data, dict):
        raise InputDataError(f"configuration {file}: expected an object of settings, found {type(data).__name__}")
    return data


def _assignment(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise UsageError(f"--set {text!r}: expected key=value, such as quantize.bits=2.5")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict) and value and f"{prefix}{key}" != "quantize.codes":
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return nested
