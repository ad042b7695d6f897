"""Everything that only a GPU can show, in one command, on the machine that has one:

    python plugins/gpu_gates.py -o gates

builds the kernels and their tests for the GPU found, then runs the C++ checks, compute-sanitizer's four tools over the
kernels' own, the Python tests marked gpu (every layer shape, a hundred identical repeats, CUDA graphs) and `mgvq bench
kernels --gates`. Each step's output goes to gates/NAME.log, the verdicts to gates/gates.json. A step that passed is not
run again when the command is, so that a session that was cut off goes on; `--only NAME,NAME` runs those anew, and
`--list` prints the commands. Exit code 0: all passed; 4: one failed; 6: one could not run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
ONLY_OF_THEMSELVES = {90: "90a"}  # machine code that uses an architecture's own instructions
FAILED, CANNOT_RUN = 4, 6


@dataclass(frozen=True)
class Step:
    """A command, and the programs without which it cannot run."""

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()


def steps(output: Path, capability: str) -> list[Step]:
    """All of them, in order; `capability` is the GPU's, such as "90"."""
    build, python = output / "build", sys.executable
    architecture = ONLY_OF_THEMSELVES.get(int(capability), capability)
    check = str(build / "tests" / "plugins" / "kernels" / "kernels_check_gpu")
    configure = ("-DMGVQ_BUILD_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={architecture}-real")
    jobs = str(os.cpu_count() or 1)
    bench = next(
        path for n in range(1, 1000) if not (path := output / f"bench-{n}").exists()
    )  # the verb wants a new one
    sanitizer = ("compute-sanitizer", "--error-exitcode", "9", "--tool")
    return [
        Step("configure", ("cmake", "-S", str(ROOT), "-B", str(build), *configure), ("cmake", "nvcc")),
        Step("build", ("cmake", "--build", str(build), "--parallel", jobs), ("cmake",)),
        Step("ctest", ("ctest", "--test-dir", str(build), "-R", "on_gpu", "--output-on-failure"), ("ctest",)),
        *(Step(f"sanitizer-{tool}", (*sanitizer, tool, check, "cuda"), (sanitizer[0],)) for tool in SANITIZERS),
        Step("pytest", (python, "-m", "pytest", "-m", "gpu", str(ROOT / "tests" / "unit"))),
        Step("bench", (python, "-m", "toolchain", "bench", "kernels", "--gates", "-o", str(bench))),
    ]


def capability_of_the_gpu() -> str | None:
    """Such as "90", by the driver's tool; None where there is no GPU."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--id=0", "--query-gpu=compute_cap", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    text = found.stdout.strip().replace(".", "")
    return text if found.returncode == 0 and text.isdigit() else None


def run_step(step: Step, output: Path, environment: dict[str, str]) -> dict[str, Any]:
    """What came of it: command, seconds, exit_code (None where it could not run) and a word on why."""
    missing = [name for name in step.needs if shutil.which(name, path=environment["PATH"]) is None]
    if missing:
        why = f"{', '.join(missing)} was not found"
        return {"command": list(step.command), "seconds": 0.0, "exit_code": None, "why": why}
    began = time.perf_counter()
    with (output / f"{step.name}.log").open("w", encoding="utf-8") as log:
        done = subprocess.run(step.command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
    seconds = round(time.perf_counter() - began, 1)
    why = "" if done.returncode == 0 else f"see {step.name}.log"
    return {"command": list(step.command), "seconds": seconds, "exit_code": done.returncode, "why": why}


def run_all(wanted: Sequence[Step], output: Path, again: Sequence[str], environment: dict[str, str]) -> dict[str, Any]:
    """Every step's verdict by its name; written to gates.json after each."""
    record = output / "gates.json"
    found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    for step in wanted:
        if found.get(step.name, {}).get("exit_code") == 0 and step.name not in again:
            print(f"{step.name}: passed before")
            continue
        found[step.name] = one = run_step(step, output, environment)
        record.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        verdict = {None: "NOT RUN", 0: "passed"}.get(one["exit_code"], "FAILED")
        print(f"{step.name}: {verdict} in {one['seconds']} s {one['why']}".rstrip(), flush=True)
    return found


def exit_code(wanted: Sequence[Step], found: dict[str, Any]) -> int:
    codes = [found[step.name]["exit_code"] for step in wanted]
    if any(code not in (0, None) for code in codes):
        return FAILED
    return CANNOT_RUN if None in codes else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("gates"))
    parser.add_argument("--only", default="", help="names of steps with commas between, run anew")
    parser.add_argument("--list", action="store_true", help="print the commands and run none")
    given = parser.parse_args(arguments)
    output = given.output.resolve()
    capability = capability_of_the_gpu()
    if capability is None and not given.list:
        print("nvidia-smi finds no GPU: nothing here can be shown", file=sys.stderr)
        return CANNOT_RUN
    wanted = steps(output, capability or "90")
    only = [name for name in given.only.split(",") if name]
    unknown = sorted(set(only) - {step.name for step in wanted})
    if unknown:
        print(
            f"no such step: {', '.join(unknown)}; expected some of {', '.join(s.name for s in wanted)}", file=sys.stderr
        )
        return 2
    if given.list:
        for step in wanted:
            print(f"{step.name}: {' '.join(step.command)}")
        return 0
    output.mkdir(parents=True, exist_ok=True)
    library = output / "build" / "plugins" / "vq_linear" / "libmgvq_kernels.so"
    environment = {**os.environ, "MGVQ_KERNELS": str(library)}
    chosen = [step for step in wanted if not only or step.name in only]
    return exit_code(chosen, run_all(chosen, output, only, environment))


if __name__ == "__main__":
    sys.exit(main())
