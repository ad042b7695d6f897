"""The board's tools run in the background while something is measured, and what they saw in a few numbers.

Two kinds of sources: tools that print a line every half second (tegrastats, nvidia-smi), each read by a thread of its
own, and /proc/meminfo, polled. What there is not is left out; nothing here can fail a measurement.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolchain.device.profile.telemetry import (
    SMI_QUERY,
    Sample,
    parse_jetson_clocks,
    parse_meminfo,
    parse_nvidia_smi,
    parse_nvpmodel,
    parse_tegrastats,
)
from toolchain.device.runtime.board import gpu_uuid
from toolchain.errors import InputDataError

INTERVAL_MS = 500
BUSY_LOAD = 20  # percent of GPU load from which a sample's clock counts: an idle GPU clocks down and means nothing
FULL_CLOCK = 0.97  # of the largest clock; tegrastats shows measured clocks, which waver by a percent or two
_STOP_SECONDS = 2.0


@dataclass(frozen=True)
class Source:
    """A tool that prints one line a sample."""

    name: str
    command: tuple[str, ...]
    parse: Callable[[str], Sample | None]


Run = Callable[[Sequence[str]], str | None]  # what a command prints; None where it is not there, fails or hangs
GpuFlags = tuple[str, ...]


def gpu_in_use(run: Run | None = None) -> GpuFlags | None:
    """The flags with which nvidia-smi tells of the GPU that CUDA uses alone; None where it does not know that one."""
    listed = (run or _output)(("nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader")) or ""
    names = [line.strip() for line in listed.splitlines()]
    if len(names) == 1:
        return ()
    used = gpu_uuid()
    return ("-i", used) if used in names else None


def find_sources(gpu: GpuFlags | None, which: Callable[[str], str | None] = shutil.which) -> tuple[Source, ...]:
    """The tools this machine has. A board may have both: Thor's tegrastats knows no GPU clock, its nvidia-smi does.

    Args:
        gpu: nvidia-smi's flags (`gpu_in_use`); None leaves it out.
    """
    known = [Source("tegrastats", ("tegrastats", "--interval", str(INTERVAL_MS)), parse_tegrastats)]
    if gpu is not None:
        query = (f"--query-gpu={SMI_QUERY}", "--format=csv,noheader,nounits", "-lms", str(INTERVAL_MS))
        known.append(Source("nvidia-smi", ("nvidia-smi", *gpu, *query), parse_nvidia_smi))
    return tuple(source for source in known if which(source.command[0]))


@dataclass(frozen=True)
class Settings:
    """How the machine is set up: what it is told to do, not what it did. Clocks in MHz, None where nobody says."""

    power_mode: str | None = None
    gpu_max_mhz: int | None = None
    emc_max_mhz: int | None = None


def read_settings(gpu: GpuFlags | None, run: Run | None = None, devfreq: Path = Path("/sys/class/devfreq")) -> Settings:
    """The power mode and the highest clocks in force, from nvpmodel, jetson_clocks, devfreq or nvidia-smi.

    jetson_clocks needs root; without it the GPU's limit comes from devfreq, which anybody may read. nvidia-smi is
    asked with the flags `gpu`; not at all where they are None.
    """
    run = run or _output
    mode = _parsed(parse_nvpmodel, run(("nvpmodel", "-q")))
    clocks = None
    for command in (("jetson_clocks", "--show"), ("sudo", "-n", "jetson_clocks", "--show")):
        clocks = clocks or _parsed(parse_jetson_clocks, run(command))
    if clocks:
        gpu, emc = (round(clocks[name].most / 1e6) if name in clocks else None for name in ("GPU", "EMC"))
        return Settings(mode, gpu, emc)
    limit = _devfreq_limit(devfreq)
    if limit is None and gpu is not None:
        text = run(("nvidia-smi", *gpu, "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits")) or ""
        limit = int(text) if text.strip().isdigit() else None
    return Settings(mode, limit, None)


def _parsed(parse: Callable[[str], Any], text: str | None) -> Any:
    if text is None:
        return None
    try:
        return parse(text)
    except InputDataError:
        return None  # the tool is there and answers otherwise than documented: as good as not there


def _output(command: Sequence[str]) -> str | None:
    """What a command prints, None where it is not there, fails or hangs."""
    if not shutil.which(command[0]):
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _devfreq_limit(folder: Path) -> int | None:
    """MHz of the GPU's max_freq: 17000000.gpu or .ga10b on Orin, gpu-gpc-0 on Thor."""
    for pattern in ("*.gpu", "*.ga10b", "gpu-gpc-*"):
        for path in sorted(folder.glob(pattern)):
            try:
                return round(int((path / "max_freq").read_text(encoding="ascii")) / 1e6)
            except (OSError, ValueError):
                continue
    return None


@dataclass(frozen=True)
class Telemetry:
    """What was seen. Clocks MHz, temperatures °C, power mW, sizes bytes; None or empty where nothing told."""

    sources: tuple[str, ...]
    settings: Settings
    samples: int
    unread_lines: int
    gpu_mhz_min: int | None = None
    gpu_mhz_median: float | None = None
    gpu_load_median: float | None = None
    emc_mhz_median: float | None = None
    temperature_max: Mapping[str, float] = field(default_factory=dict)
    power_mw_mean: Mapping[str, float] = field(default_factory=dict)
    power_mw_max: Mapping[str, int] = field(default_factory=dict)
    throttle: tuple[str, ...] = ()
    available_before_bytes: int | None = None
    memory_peak_bytes: int | None = None
    largest_block_least_bytes: int | None = None

    def warnings(self, wanted_mode: str | None = None) -> list[str]:
        """What makes the figures not comparable. `wanted_mode` is the power mode of the target's own figures."""
        found = []
        mode, limit, median = self.settings.power_mode, self.settings.gpu_max_mhz, self.gpu_mhz_median
        if mode and wanted_mode and mode != wanted_mode:
            found.append(
                f"power mode {mode}, the target's figures are for {wanted_mode}: set it with sudo nvpmodel -m (its "
                "number stands in /etc/nvpmodel.conf) and measure again"
            )
        if limit and median and median < FULL_CLOCK * limit:
            found.append(
                f"the GPU ran at {median:.0f} MHz where {limit} MHz is allowed: run sudo jetson_clocks (or nvidia-smi "
                "-lgc on a workstation) and measure again"
            )
        if self.throttle:
            found.append(f"the GPU was held back by {', '.join(self.throttle)}: cool it or allow it more power")
        if self.unread_lines:
            found.append(f"{self.unread_lines} lines of {', '.join(self.sources)} could not be read and are left out")
        return found

    def summary(self) -> str:
        """One line for people; it says what is not known, too."""
        if not self.sources and self.memory_peak_bytes is None:
            return "telemetry: no tegrastats, nvidia-smi or /proc/meminfo here"
        settings, pieces = self.settings, [f"power mode {self.settings.power_mode or 'not known'}"]
        if self.gpu_mhz_median is not None:
            pieces.append(f"GPU {self.gpu_mhz_median:.0f} MHz of {settings.gpu_max_mhz or 'unknown'}")
        else:
            pieces.append("GPU clock not known")
        if self.temperature_max:
            name = max(self.temperature_max, key=lambda key: self.temperature_max[key])
            pieces.append(f"at most {self.temperature_max[name]:.0f} °C ({name})")
        if self.memory_peak_bytes is not None:
            pieces.append(f"memory grew by {self.memory_peak_bytes / 2**20:.0f} MiB")
        return "telemetry: " + ", ".join(pieces)

    def to_json(self, wanted_mode: str | None = None) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"summary": self.summary(), "warnings": self.warnings(wanted_mode)}


class Sampler:
    """Collects from entry to exit; `telemetry` then. Tools are stopped and threads joined however the block ends."""

    def __init__(
        self,
        *,
        uses_gpu: bool = True,
        sources: Sequence[Source] | None = None,
        settings: Settings | None = None,
        meminfo: Path = Path("/proc/meminfo"),
        interval_s: float = INTERVAL_MS / 1000,
    ) -> None:
        """Without `uses_gpu` nvidia-smi is not asked: what others do on the GPU is not what is measured."""
        gpu = gpu_in_use() if uses_gpu and (sources is None or settings is None) else None
        self._sources = find_sources(gpu) if sources is None else tuple(sources)
        self._settings = read_settings(gpu) if settings is None else settings
        self._meminfo, self._interval_s = meminfo, interval_s
        self._samples: list[Sample] = []
        self._available: list[int] = []
        self._before: int | None = None
        self._unread = 0
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._tools: list[subprocess.Popen[str]] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Sampler:
        self._before = self._read_available()
        for source in self._sources:
            try:
                tool = subprocess.Popen(
                    source.command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    errors="replace",
                    start_new_session=True,  # ctrl-C is for us; the tool is stopped on the way out
                )
            except OSError:
                continue
            self._tools.append(tool)
            self._start(self._read_tool, source, tool)
        self._start(self._poll_memory)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for tool in self._tools:
            tool.terminate()
        for tool in self._tools:
            try:
                tool.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                tool.kill()
                tool.wait()
        for thread in self._threads:
            thread.join(_STOP_SECONDS)
        for tool in self._tools:
            if tool.stdout:
                tool.stdout.close()

    def telemetry(self) -> Telemetry:
        """What was seen so far."""
        with self._lock:
            samples, available, unread = list(self._samples), list(self._available), self._unread
        return summarize(samples, self._settings, tuple(s.name for s in self._sources), unread, self._before, available)

    def _start(self, work: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _read_tool(self, source: Source, tool: subprocess.Popen[str]) -> None:
        assert tool.stdout is not None
        for line in tool.stdout:
            if self._stop.is_set():
                return  # the tool is being stopped: its last line may be half of one
            if not line.strip():
                continue
            sample = source.parse(line)
            with self._lock:
                if sample is None:
                    self._unread += 1
                else:
                    self._samples.append(sample)

    def _poll_memory(self) -> None:
        while True:
            available = self._read_available()
            if available is not None:
                with self._lock:
                    self._available.append(available)
            if self._stop.wait(self._interval_s):
                return

    def _read_available(self) -> int | None:
        try:
            return parse_meminfo(self._meminfo.read_text(encoding="ascii")).get("MemAvailable")
        except (OSError, UnicodeDecodeError):
            return None


def summarize(
    samples: Sequence[Sample],
    settings: Settings,
    sources: tuple[str, ...],
    unread_lines: int = 0,
    available_before: int | None = None,
    available: Sequence[int] = (),
) -> Telemetry:
    """Samples in a few numbers. Clocks count where the GPU was busy, or where nobody says how busy it was.

    `available` are MemAvailable's values; the peak is how far they fell below `available_before`, at least 0.
    """
    busy = [s for s in samples if s.gpu_load is None or s.gpu_load >= BUSY_LOAD]
    clocks = [s.gpu_mhz for s in busy if s.gpu_mhz]
    memory = [s.emc_mhz for s in busy if s.emc_mhz]
    loads = [s.gpu_load for s in samples if s.gpu_load is not None]
    blocks = [s.largest_block_bytes for s in samples if s.largest_block_bytes is not None]
    rails = _by_name([s.power_mw for s in samples])
    peak = max(available_before - min(available), 0) if available and available_before is not None else None
    return Telemetry(
        sources=sources,
        settings=settings,
        samples=len(samples),
        unread_lines=unread_lines,
        gpu_mhz_min=min(clocks, default=None),
        gpu_mhz_median=_median(clocks),
        gpu_load_median=_median(loads),
        emc_mhz_median=_median(memory),
        temperature_max={name: max(v) for name, v in _by_name([s.temperatures for s in samples]).items()},
        power_mw_mean={name: statistics.fmean(v) for name, v in rails.items()},
        power_mw_max={name: int(max(v)) for name, v in rails.items()},
        throttle=tuple(sorted({reason for s in samples for reason in s.throttle})),
        available_before_bytes=available_before,
        memory_peak_bytes=peak,
        largest_block_least_bytes=min(blocks, default=None),
    )


def _median(values: Sequence[int]) -> float | None:
    return float(statistics.median(values)) if values else None


def _by_name(readings: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for reading in readings:
        for name, value in reading.items():
            found.setdefault(name, []).append(value)
    return found
