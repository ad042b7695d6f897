"""Static checks of the kernels' machine code, without a GPU: registers, spills, and the instructions of the hot loop.

    python plugins/check_sass.py --architectures 87,90a,110,120 [--codes 2_4_8,4_8_9] [--nvdisasm PATH] [--format json]

For every code and architecture the kernels are compiled to a cubin. Spills, or more registers than a block of the
kernel may have, are failures. With nvdisasm (part of the CUDA toolkit; `pip install nvidia-cuda-nvdisasm` brings it
alone) the hot loop of the one-token kernel is counted too: instructions, lookups (LDS), and the clocks a unit of 128
rows by 16 columns needs of each pipe by the model of one SM (4 instructions, 2 integer instructions, 1 shared-memory
wavefront a clock; half an mma). Index bytes a clock are the unit's bytes over the busiest pipe's clocks: a bound of
the model, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).parent
CODES = ("2_3_8", "2_4_8", "2_5_8", "2_6_6", "2_6_8", "2_8_8", "2_8_9", "4_8_8", "4_8_9")
UNIT_WEIGHTS = 128 * 16
LARGEST_BLOCK = {"skinny": {1: 512, 2: 256, 4: 256}, "tiled": {2: 256, 4: 256}}
REGISTERS = 65536
INTEGER = {"PRMT", "LOP3", "SHF", "IADD3", "ISETP", "LEA", "SEL", "VIMNMX", "IMNMX", "FMNMX", "FSETP", "LOP", "BMSK"}
KERNEL = re.compile(r"(skinny|tiled)_kernelILi(\d)ELi(\d)ELi(\d)ELi(\d)E")
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*?);")


@dataclass(frozen=True)
class Kernel:
    """One kernel's figures; the loop's are None where nvdisasm is missing or the kernel is not the one-token one."""

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
    """The one-token kernel's hot loop."""

    instructions: int
    lookups: int
    mma: int
    clocks: float
    bound_by: str
    index_bytes_per_clock: float


@dataclass(frozen=True)
class Compiled:
    code: str
    architecture: str
    seconds: float
    kernels: tuple[Kernel, ...]
    loop: Loop | None


def compile_code(code: str, architecture: str, folder: Path, nvdisasm: str | None) -> Compiled:
    """Compile one code's kernels for one architecture.

    Raises:
        RuntimeError: nvcc refuses; with what it said.
    """
    cubin = folder / f"{code}-{architecture}.cubin"
    command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{architecture}", f"-I{HERE}", "-Xptxas", "-v", "-cubin"]
    began = time.perf_counter()
    done = subprocess.run(
        [*command, str(HERE / "vq_linear" / f"code_{code}.cu"), "-o", str(cubin)], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"nvcc refuses code_{code}.cu for sm_{architecture}: {done.stderr.strip()}")
    kernels = parse_resources(done.stderr)
    loop = None
    if nvdisasm:
        listing = subprocess.run([nvdisasm, str(cubin)], capture_output=True, text=True, check=True).stdout
        loop = hot_loop(listing, code)
    return Compiled(code, architecture, round(time.perf_counter() - began, 1), kernels, loop)


def parse_resources(text: str) -> tuple[Kernel, ...]:
    """Each kernel's registers and spills from what `ptxas -v` prints."""
    found, name, spilled = [], "", 0
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            name = match[1]
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled = int(match[1]) + int(match[2])
        elif (match := re.search(r"Used (\d+) registers", line)) and (kernel := KERNEL.search(name)):
            kind, tiles = kernel[1], int(kernel[5])
            limit = min(255, REGISTERS // LARGEST_BLOCK[kind][tiles])
            found.append(Kernel(f"{kind}, {tiles} token tiles", int(match[1]), spilled, limit))
    return tuple(found)


def hot_loop(listing: str, code: str) -> Loop | None:
    """The innermost loop with mma of the one-token kernel for plain activations."""
    for section in re.split(r"\n\s*\.section\s+\.text\.", listing)[1:]:
        name = section.split(",")[0]
        if "skinny" in name and name.split("kernelI")[1].startswith("Li" + code.replace("_", "ELi") + "ELi1ELb0ELb1E"):
            loops = [body for body in loops_of(section) if any(name.startswith("HMMA") for name in body)]
            return loop_figures(min(loops, key=len), code) if loops else None
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


def loop_figures(body: list[str], code: str) -> Loop:
    vector, shift, _ = (int(part) for part in code.split("_"))
    mix = Counter(name.split(".")[0] for name in body)
    units = mix["HMMA"] / 8  # eight row tiles a unit
    pipes = {
        "issue": len(body) / 4,
        "integer": sum(mix[name] for name in INTEGER) / 2,
        "shared memory": float(mix["LDS"]),
        "tensor": 2.0 * mix["HMMA"],
    }
    busiest = max(pipes, key=lambda name: pipes[name])
    index_bytes = UNIT_WEIGHTS * shift / vector / 8 * units
    clocks = pipes[busiest]
    return Loop(len(body), mix["LDS"], mix["HMMA"], clocks, busiest, round(index_bytes / clocks, 1))


def find_nvdisasm(given: str | None) -> str | None:
    return given or shutil.which("nvdisasm")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", default="87,90a,110,120")
    parser.add_argument("--codes", default=",".join(CODES))
    parser.add_argument("--nvdisasm")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    given = parser.parse_args(arguments)
    if shutil.which("nvcc") is None:
        print("nvcc was not found; install the CUDA toolkit and put it on PATH", file=sys.stderr)
        return 6
    nvdisasm = find_nvdisasm(given.nvdisasm)
    if nvdisasm is None:
        print("nvdisasm was not found: loops are not counted", file=sys.stderr)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for architecture in given.architectures.split(","):
            for code in given.codes.split(","):
                results.append(compile_code(code, architecture, Path(scratch), nvdisasm))
                if given.format == "text":
                    print(line_of(results[-1]), flush=True)
    if given.format == "json":
        print(json.dumps([asdict(result) for result in results], indent=1))
    faults = [
        f"sm_{result.architecture} {result.code}: {kernel.fault}"
        for result in results
        for kernel in result.kernels
        if kernel.fault
    ]
    for fault in faults:
        print(fault, file=sys.stderr)
    return 4 if faults else 0


def line_of(result: Compiled) -> str:
    most = max(kernel.registers for kernel in result.kernels)
    spilled = sum(kernel.spilled_bytes for kernel in result.kernels)
    text = (
        f"sm_{result.architecture:5}{result.code}  {result.seconds:5.1f} s  up to {most} registers, {spilled} B spilled"
    )
    if loop := result.loop:
        text += (
            f"; loop {loop.instructions} instructions, {loop.lookups} LDS, {loop.mma} HMMA: {loop.clocks:.0f} clocks "
            f"({loop.bound_by}), {loop.index_bytes_per_clock} index bytes a clock [model]"
        )
    return text


if __name__ == "__main__":
    sys.exit(main())
