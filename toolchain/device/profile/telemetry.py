"""What the tools of a board say about itself, as numbers: tegrastats, nvpmodel, jetson_clocks, nvidia-smi, meminfo.

Lines are read as the vendors document them (Jetson Linux Developer Guide, "tegrastats Utility", "Power Management";
nvidia-smi's manual); what a release leaves out stays None. Thor's tegrastats has no GPU load and names its rails and
sensors anew; JetPack 7 writes GPU clocks as one number a GPC. No dates, versions or boards are asked for: a field is
taken wherever it stands.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from toolchain.errors import InputDataError

_MIB = 1 << 20
_SIZES = {"kB": 1 << 10, "MB": _MIB, "GB": 1 << 30}
_RAM = re.compile(r"\bRAM (\d+)/(\d+)([kMG]B)")
_LFB = re.compile(r"\(lfb (\d+)x(\d+)([kMG]B)\)")
_SWAP = re.compile(r"\bSWAP (\d+)/(\d+)([kMG]B)")
_CPU = re.compile(r"\bCPU \[([^\]]*)\]")
_CORE = re.compile(r"^(\d+)%(?:@(\d+))?$")
_ENGINE = re.compile(r"\b(EMC_FREQ|GR3D_FREQ) (?:(\d+)%)?(?:@(\d+|\[[\d,\s]*\]))?")
_TEMPERATURE = re.compile(r"\b([A-Za-z][\w-]*)@(-?\d+(?:\.\d+)?)C\b")
_RAIL = re.compile(r"\b((?:VDD|VIN|POM|CPU|GPU|SOC|CV|DDR|SYS)[A-Z0-9_]*) (\d+)(?:mW)?/(\d+)(?:mW)?(?=\s|$)")
_OFF_CELSIUS = -200.0  # a sensor that is switched off reports -256


@dataclass(frozen=True)
class Sample:
    """One moment of one machine. Bytes, MHz, percent, degrees Celsius, milliwatts; None or empty is not reported.

    `largest_block_bytes` is the largest block the page allocator has whole, at most 4 MiB: a sign of fragmentation,
    not the size of the contiguous pool. `cores` holds (load, MHz) of those that are on.
    """

    ram_used_bytes: int | None = None
    ram_total_bytes: int | None = None
    swap_used_bytes: int | None = None
    largest_block_bytes: int | None = None
    largest_blocks: int | None = None
    cores: tuple[tuple[int, int | None], ...] = ()
    emc_load: int | None = None
    emc_mhz: int | None = None
    gpu_load: int | None = None
    gpu_mhz: int | None = None
    temperatures: Mapping[str, float] = field(default_factory=dict)
    power_mw: Mapping[str, int] = field(default_factory=dict)
    throttle: frozenset[str] = frozenset()


def parse_tegrastats(line: str) -> Sample | None:
    """One line of tegrastats; None where it is not one, or not a whole one (no RAM: every release starts with it)."""
    ram = _RAM.search(line)
    if ram is None:
        return None
    block, swap, cores = _LFB.search(line), _SWAP.search(line), _CPU.search(line)
    engines = {m[1]: (_int(m[2]), _clock(m[3])) for m in _ENGINE.finditer(line)}
    emc, gpu = (engines.get(name, (None, None)) for name in ("EMC_FREQ", "GR3D_FREQ"))
    temperatures = {m[1].lower(): float(m[2]) for m in _TEMPERATURE.finditer(line)}
    return Sample(
        ram_used_bytes=int(ram[1]) * _SIZES[ram[3]],
        ram_total_bytes=int(ram[2]) * _SIZES[ram[3]],
        swap_used_bytes=int(swap[1]) * _SIZES[swap[3]] if swap else None,
        largest_block_bytes=int(block[2]) * _SIZES[block[3]] if block else None,
        largest_blocks=int(block[1]) if block else None,
        cores=_cores(cores[1]) if cores else (),
        emc_load=emc[0],
        emc_mhz=emc[1],
        gpu_load=gpu[0],
        gpu_mhz=gpu[1],
        temperatures={name: value for name, value in temperatures.items() if value > _OFF_CELSIUS},
        power_mw={m[1]: int(m[2]) for m in _RAIL.finditer(_without_cpu(line))},
    )


def _without_cpu(line: str) -> str:
    """The line from the end of the CPU list on, so that "RAM 1/2" and "SWAP 0/3" cannot be read as rails."""
    return line[match.end() :] if (match := _CPU.search(line)) else line


def _cores(text: str) -> tuple[tuple[int, int | None], ...]:
    found = (_CORE.match(core.strip()) for core in text.split(","))
    return tuple((int(m[1]), _int(m[2])) for m in found if m)


def _clock(text: str | None) -> int | None:
    """MHz of "611" or, one number a GPC, of "[1300,1300]": the slowest one that is on."""
    values = [int(x) for x in re.findall(r"\d+", text or "")]
    running = [x for x in values if x]
    return min(running) if running else (0 if values else None)


def _int(text: str | None) -> int | None:
    return None if text is None else int(text)


_SMI_FIELDS = {
    "clocks.sm": "gpu_mhz",
    "clocks.mem": "emc_mhz",
    "utilization.gpu": "gpu_load",
    "temperature.gpu": "temperature",
    "power.draw": "power",
    "memory.used": "used",
    "memory.total": "total",
    "clocks_throttle_reasons.active": "throttle",
}
SMI_QUERY = ",".join(_SMI_FIELDS)
_SMI_CELL = re.compile(r"-?\d+(\.\d+)?$|0x[0-9a-fA-F]+$|\[.*\]$|N/A$")
# Bits of the driver's throttle reasons that mean slower than asked for; idling and clocks set on purpose do not.
_THROTTLE_BITS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "temperature (software)",
    0x40: "temperature (hardware)",
    0x80: "power brake",
}


def parse_nvidia_smi(line: str) -> Sample | None:
    """One line of nvidia-smi --query-gpu=SMI_QUERY --format=csv,noheader,nounits; None where it is not one.

    Fields that a board does not have read "[N/A]" or "[Not Supported]" and stay None; memory on a board with unified
    memory is among them.
    """
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) != len(_SMI_FIELDS) or not all(_SMI_CELL.match(cell) for cell in cells):
        return None
    values = dict(zip(_SMI_FIELDS.values(), cells))
    numbers = {name: _number(text) for name, text in values.items() if name != "throttle"}
    whole = {name: None if value is None else round(value) for name, value in numbers.items()}
    used, total = (None if whole[name] is None else whole[name] * _MIB for name in ("used", "total"))  # type: ignore[operator]
    return Sample(
        ram_used_bytes=used,
        ram_total_bytes=total,
        emc_mhz=whole["emc_mhz"],
        gpu_load=whole["gpu_load"],
        gpu_mhz=whole["gpu_mhz"],
        temperatures={} if numbers["temperature"] is None else {"gpu": numbers["temperature"]},
        power_mw={} if numbers["power"] is None else {"gpu": round(1000 * numbers["power"])},
        throttle=_throttle(values["throttle"]),
    )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _throttle(text: str) -> frozenset[str]:
    try:
        bits = int(text, 16)
    except ValueError:
        return frozenset()
    return frozenset(name for bit, name in _THROTTLE_BITS.items() if bits & bit)


def parse_nvpmodel(text: str) -> str:
    """The power mode of `nvpmodel -q`, such as "15W" or "MAXN_SUPER".

    Raises:
        InputDataError: the text names none.
    """
    found = re.search(r"NV Power Mode:\s*(\S+)", text)
    if found is None:
        raise InputDataError(f"nvpmodel -q: expected a line 'NV Power Mode: NAME', found {text.strip()[:80]!r}")
    return found[1]


@dataclass(frozen=True)
class Clock:
    """Hertz: the limits in force and the clock of the moment."""

    least: int
    most: int
    current: int


def parse_jetson_clocks(text: str) -> dict[str, Clock]:
    """GPU, EMC and cpu0, cpu1, … of `jetson_clocks --show`, in hertz; engines that are off are left out.

    CPU clocks stand there in kHz, the others in Hz.

    Raises:
        InputDataError: not one clock is in it.
    """
    found = {}
    for line in text.splitlines():
        name = re.match(r"(cpu\d+|GPU|EMC)\b", line.strip())
        values = {key: int(value) for key, value in re.findall(r"\b(MinFreq|MaxFreq|CurrentFreq)=(\d+)", line)}
        if name and len(values) == 3:
            unit = 1000 if name[1].startswith("cpu") else 1
            found[name[1]] = Clock(*(unit * values[key] for key in ("MinFreq", "MaxFreq", "CurrentFreq")))
    if not found:
        raise InputDataError(
            f"jetson_clocks --show: expected lines with MinFreq, MaxFreq and CurrentFreq, found {text.strip()[:80]!r}; "
            "it needs root"
        )
    return found


def parse_meminfo(text: str) -> dict[str, int]:
    """Bytes by name of /proc/meminfo: MemAvailable, CmaFree and the others that are given in kB."""
    return {m[1]: int(m[2]) * 1024 for m in re.finditer(r"^(\w+(?:\(\w+\))?):\s+(\d+) kB$", text, re.MULTILINE)}
