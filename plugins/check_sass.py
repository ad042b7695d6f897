"""Static checks of the kernels' machine code, without a GPU: registers, spills, and the instructions of the hot loops.

    python plugins/check_sass.py [--architectures 87,90a,110,120] [--sources code_2_4_8,rows] [--format json]

Every source is compiled to a cubin for every architecture, as many at once as there are processors. Spills, or more
registers than a block of the kernel may have, are failures. With nvdisasm (of the CUDA toolkit, or `pip install
nvidia-cuda-nvdisasm`, which brings it alone) the hot loops of the one-token kernels are counted too, float16 and int8
activations: lookups (LDS) and matrix products must be what the format demands, and all instructions together at most
TOLERANCE over those in sass_mix.json, which `--record` writes. Shown with them are the clocks a step needs of each pipe
by the model of one SM (4 instructions, 2 integer instructions, 1 shared-memory wavefront a clock; half a matrix
product), and the index bytes a clock over the busiest pipe's: a bound of the model, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECORD = HERE / "sass_mix.json"
TOLERANCE = 1.10  # over the recorded instructions: what compiler releases differ by, not what a lost optimization costs
UNIT_WEIGHTS = 128 * 16
UNIT_TILES = 8  # row tiles of a unit, one matrix product each
LARGEST_BLOCK = {"skinny": {1: 512, 2: 256, 4: 256}, "tiled": {2: 256, 4: 256}}
REGISTERS = 65536
INTEGER = {"PRMT", "LOP3", "SHF", "IADD3", "ISETP", "LEA", "SEL", "VIMNMX", "IMNMX", "FMNMX", "FSETP", "LOP", "BMSK"}
OTHER_BLOCK = 512  # the largest of the other kernels
KERNEL = re.compile(r"(skinny|tiled)_kernelILi(\d)ELi(\d)ELi(\d)ELi(\d)E")
NAME = re.compile(r"\d+([a-z_0-9]+)_kernel")
PRODUCTS = {"float16": "HMMA", "int8": "IMMA"}
LAST = {"float16": "ELi1ELb0ELb1E", "int8": "ELi1ELb1ELb0E"}  # template arguments: one token tile, int8, plain
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*?);")


@dataclass(frozen=True)
class Kernel:
    """One kernel's resources."""

    name: str
    registers: int
    spilled_bytes: int
    register_limit: int

    @property
    def fault(self) -> str | None:
        if self.spilled_bytes:
            return f"{self.name}: {self.spilled_bytes} bytes spilled"
        if self.registers > self.register_limit:
            return f"{self.name}: {self.registers} registers, at most {self.register_limit} for its block"
        return None


@dataclass(frozen=True)
class Loop:
    """A one-token kernel's hot loop. A step of it is one unit of 128 rows by 16 columns, two with int8 activations."""

    activations: str
    instructions: int
    lookups: int
    products: int
    clocks: float
    bound_by: str
    index_bytes_per_clock: float


@dataclass(frozen=True)
class Compiled:
    """A source for one architecture."""

    source: str
    architecture: str
    seconds: float
    kernels: tuple[Kernel, ...]
    loops: tuple[Loop, ...]

    def faults(self, record: dict[str, Any]) -> Iterator[str]:
        """What is wrong, in words; `record` is sass_mix.json's."""
        place = f"sm_{self.architecture} {self.source}"
        yield from (f"{place}: {kernel.fault}" for kernel in self.kernels if kernel.fault)
        known = record.get(self.architecture, {}).get(self.source, {})
        for loop in self.loops:
            vector, units = int(self.source.split("_")[1]), 2 if loop.activations == "int8" else 1
            # A unit has 64 table entries a lane for V = 2 and half of them for V = 4; one int8 product takes two units.
            lookups, products = units * 4 * UNIT_TILES // (vector // 2), UNIT_TILES
            if (loop.lookups, loop.products) != (lookups, products):
                yield (
                    f"{place}, {loop.activations}: {loop.lookups} lookups and {loop.products} products, expected "
                    f"{lookups} and {products}"
                )
            most = known.get(loop.activations)
            if most is None:
                yield f"{place}, {loop.activations}: not in {RECORD.name}; write it with --record"
            elif loop.instructions > TOLERANCE * most:
                yield (
                    f"{place}, {loop.activations}: {loop.instructions} instructions in the loop, recorded {most} and "
                    f"{TOLERANCE - 1:.0%} allowed; find what was lost, or write the record anew with --record"
                )


def all_sources() -> tuple[str, ...]:
    """Names of the .cu files, without the suffix."""
    return tuple(sorted(path.stem for path in (HERE / "vq_linear").glob("*.cu")))


def compile_source(source: str, architecture: str, folder: Path, nvdisasm: str | None) -> Compiled:
    """Compile one source for one architecture.

    Raises:
        RuntimeError: nvcc refuses; with what it said.
    """
    cubin = folder / f"{source}-{architecture}.cubin"
    command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{architecture}", f"-I{HERE}", "-Xptxas", "-v", "-cubin"]
    began = time.perf_counter()
    done = subprocess.run(
        [*command, str(HERE / "vq_linear" / f"{source}.cu"), "-o", str(cubin)], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"nvcc refuses {source}.cu for sm_{architecture}: {done.stderr.strip()}")
    kernels = parse_resources(done.stderr)
    loops: tuple[Loop, ...] = ()
    if nvdisasm and source.startswith("code_"):
        listing = subprocess.run([nvdisasm, str(cubin)], capture_output=True, text=True, check=True).stdout
        found = (hot_loop(listing, source, activations) for activations in PRODUCTS)
        loops = tuple(loop for loop in found if loop)
    return Compiled(source, architecture, round(time.perf_counter() - began, 1), kernels, loops)


def parse_resources(text: str) -> tuple[Kernel, ...]:
    """Each kernel's registers and spills from what `ptxas -v` prints."""
    found, name, spilled = [], "", 0
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            name = match[1]
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled = int(match[1]) + int(match[2])
        elif match := re.search(r"Used (\d+) registers", line):
            if kernel := KERNEL.search(name):
                shown, threads = f"{kernel[1]}, {kernel[5]} token tiles", LARGEST_BLOCK[kernel[1]][int(kernel[5])]
            else:
                plain = NAME.search(name)
                shown, threads = plain[1] if plain else name, OTHER_BLOCK
            found.append(Kernel(shown, int(match[1]), spilled, min(255, REGISTERS // threads)))
    return tuple(found)


def hot_loop(listing: str, source: str, activations: str) -> Loop | None:
    """The innermost loop with matrix products of the one-token kernel; None where the code has no such kernel."""
    wanted = "Li" + source.removeprefix("code_").replace("_", "ELi") + LAST[activations]
    for section in re.split(r"\n\s*\.section\s+\.text\.", listing)[1:]:
        name = section.split(",")[0]
        if "skinny" in name and name.split("kernelI")[1].startswith(wanted):
            loops = [body for body in loops_of(section) if any(one.startswith(PRODUCTS[activations]) for one in body)]
            return loop_figures(min(loops, key=len), source, activations) if loops else None
    return None


def loops_of(section: str) -> list[list[str]]:
    """Instruction names between the target of each backward branch and the branch."""
    places: dict[str, int] = {}
    names: list[str] = []
    found = []
    for line in section.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            places[label[1]] = len(names)
        elif match := INSTRUCTION.search(line):
            names.append(match[2])
            target = re.search(r"\.L_x_\d+", match[3]) if match[2].startswith("BRA") else None
            if target and target[0] in places:
                found.append(names[places[target[0]] :])
    return found


def loop_figures(body: list[str], source: str, activations: str = "float16") -> Loop:
    """What `body`, a step of the loop, costs in the model."""
    vector, shift = (int(part) for part in source.split("_")[1:3])
    mix = Counter(name.split(".")[0] for name in body)
    products = mix[PRODUCTS[activations]]
    units = products / UNIT_TILES * (2 if activations == "int8" else 1)
    pipes = {
        "issue": len(body) / 4,
        "integer": sum(mix[name] for name in INTEGER) / 2,
        "shared memory": float(mix["LDS"]),
        "tensor": 2.0 * products,
    }
    busiest = max(pipes, key=lambda name: pipes[name])
    index_bytes = UNIT_WEIGHTS * shift / vector / 8 * units
    clocks = pipes[busiest]
    return Loop(activations, len(body), mix["LDS"], products, clocks, busiest, round(index_bytes / clocks, 1))


def find_nvdisasm(given: str | None) -> str | None:
    """nvdisasm as given, on PATH, or where its package puts it."""
    packaged = (path for folder in sys.path for path in Path(folder or ".").glob("nvidia/cu*/bin/nvdisasm"))
    return given or shutil.which("nvdisasm") or next(map(str, packaged), None)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", default="87,90a,110,120")
    parser.add_argument("--sources", default=",".join(all_sources()))
    parser.add_argument("--nvdisasm")
    parser.add_argument("--record", action="store_true", help=f"write the loops' instructions to {RECORD.name}")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    given = parser.parse_args(arguments)
    if shutil.which("nvcc") is None:
        print("nvcc was not found; install the CUDA toolkit and put it on PATH", file=sys.stderr)
        return 6
    nvdisasm = find_nvdisasm(given.nvdisasm)
    if nvdisasm is None:
        print(
            "nvdisasm was not found: loops are not counted (pip install nvidia-cuda-nvdisasm)",
            file=sys.stderr,
        )
        if given.record:
            return 6
    jobs = [(source, name) for name in given.architectures.split(",") for source in given.sources.split(",")]
    results = []
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        for result in pool.map(lambda job: compile_source(*job, Path(scratch), nvdisasm), jobs):
            results.append(result)
            if given.format == "text":
                print(line_of(result), flush=True)
    if given.format == "json":
        print(json.dumps([asdict(result) for result in results], indent=1))
    if given.record:
        write_record(results)
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
    faults = [fault for result in results for fault in result.faults(record)]
    for fault in faults:
        print(fault, file=sys.stderr)
    return 4 if faults else 0


def write_record(results: list[Compiled]) -> None:
    """sass_mix.json: architecture → source → activations → instructions of the loop."""
    record: dict[str, Any] = {}
    for result in results:
        if result.loops:
            loops = {loop.activations: loop.instructions for loop in result.loops}
            record.setdefault(result.architecture, {})[result.source] = loops
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def line_of(result: Compiled) -> str:
    most = max(kernel.registers for kernel in result.kernels)
    spilled = sum(kernel.spilled_bytes for kernel in result.kernels)
    place = f"sm_{result.architecture:5}{result.source:11}"
    lines = [f"{place}{result.seconds:5.1f} s  up to {most} registers, {spilled} B spilled"]
    for loop in result.loops:
        lines.append(
            f"    {loop.activations}: {loop.instructions} instructions, {loop.lookups} LDS, {loop.products} products: "
            f"{loop.clocks:.0f} clocks ({loop.bound_by}), {loop.index_bytes_per_clock} index bytes a clock [model]"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
