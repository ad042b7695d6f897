"""A run's folder: stages that are kept by the hash of what they were made from, and run.json, always whole.

    run.json                 status, stages, versions, exit code; rewritten atomically
    config.resolved.json     every setting and where it came from
    stages/NN-name/          what a stage made; stages/NN-name.json is its record: key, outputs with hashes, seconds;
                             stages/NN-name.failed/ what a failed gate compared
    bundle/  report.html

A stage is reused when its key (a hash over everything that goes into it, the key of the stage before included) is the
recorded one and every recorded output still has its hash; it is made again otherwise.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from toolchain import __version__
from toolchain.errors import InputDataError, MgvqError, NumericGateError, UsageError
from toolchain.files.folders import check_output, sha256_file, share_files, write_json

PACKAGES = (
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "numpy",
    "safetensors",
    "tensorrt-rtx-cu13",
)


@dataclass(frozen=True)
class StageResult:
    """What a stage left: its folder, what it says of itself, and the key that later stages build on."""

    name: str
    folder: Path
    summary: dict[str, Any]
    key: str
    seconds: float
    reused: bool


class RunFolder:
    """One run on disk. Use as a context manager: run.json then says how it ended."""

    def __init__(self, folder: Path, command: str, resume: str = "auto") -> None:
        self.folder = folder
        self._resume = resume
        self._refuse_foreign()
        self._record: dict[str, Any] = {
            "tool": "mgvq",
            "tool_version": __version__,
            "command": command,
            "status": "running",
            "started": _now(),
            "host": {"python": platform.python_version(), "machine": platform.machine()},
            "versions": _versions(),
            "stages": [],
        }
        self._last_key = ""

    def _refuse_foreign(self) -> None:
        is_run = (self.folder / "run.json").is_file()
        if not is_run:
            check_output(self.folder)
        if self._resume == "never" and is_run:
            raise UsageError(f"output {self.folder} holds a run; remove it, or say --resume auto to continue it")
        if self._resume == "required" and not is_run:
            raise InputDataError(f"output {self.folder}: no run to resume; check the path, or say --resume auto")

    def __enter__(self) -> RunFolder:
        (self.folder / "stages").mkdir(parents=True, exist_ok=True)
        self._write()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            self._record |= {"status": "done", "exit_code": 0}
        else:
            code = error.exit_code if isinstance(error, MgvqError) else 75 if kind is KeyboardInterrupt else 1
            status = "stopped" if code == 75 else "failed"
            self._record |= {"status": status, "exit_code": code, "error": str(error) or kind.__name__}
        self._record["ended"] = _now()
        self._write()

    def note(self, key: str, value: Any) -> None:
        """Add a fact to run.json."""
        self._record[key] = value
        self._write()

    def stage(self, name: str, inputs: dict[str, Any], work: Callable[[Path], dict[str, Any]]) -> StageResult:
        """Run `work(folder)` unless its result is already here; its return value is the stage's summary.

        `work` finds no folder at the path it is given and makes it; it is renamed to stages/`name` when whole.
        """
        key = _digest({"stage": name, "version": __version__, "after": self._last_key, "inputs": inputs})
        self._last_key = key
        folder, record = self.folder / "stages" / name, self.folder / "stages" / f"{name}.json"
        found = _valid_record(folder, record, key) if self._resume != "never" else None
        if found is None:
            found = self._make(name, key, folder, record, work)
            reused = False
        else:
            reused = True
        self._record["stages"].append({"name": name, "seconds": found["seconds"], "reused": reused, "key": key})
        self._write()
        return StageResult(name, folder, found["summary"], key, found["seconds"], reused)

    def _make(self, name: str, key: str, folder: Path, record: Path, work) -> dict[str, Any]:
        partial = self.folder / "stages" / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        began = time.monotonic()
        failed = folder.with_name(f"{name}.failed")
        shutil.rmtree(failed, ignore_errors=True)
        try:
            summary = work(partial)
        except NumericGateError as error:
            # What failed is the evidence; keep it, where no later stage takes it for a result.
            partial.rename(failed)
            raise NumericGateError(f"{error}; everything compared is in {failed}") from error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        share_files(partial)
        record.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        outputs = {str(p.relative_to(folder)): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}
        made = {"stage": name, "key": key, "seconds": round(time.monotonic() - began, 2), "summary": summary}
        write_json(record, made | {"outputs": outputs})
        return made

    def _write(self) -> None:
        write_json(self.folder / "run.json", self._record)


def _valid_record(folder: Path, record: Path, key: str) -> dict[str, Any] | None:
    if not record.is_file() or not folder.is_dir():
        return None
    found = json.loads(record.read_text(encoding="utf-8"))
    if found["key"] != key:
        return None
    intact = all((folder / f).is_file() and sha256_file(folder / f) == h for f, h in found["outputs"].items())
    return found if intact else None


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an optional package that is not installed has no version to record
    return found
