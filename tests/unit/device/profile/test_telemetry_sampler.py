"""The sampler against scripts in the place of the board's tools: what is summed up, and that nothing stays."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from toolchain.device.profile import telemetry_sampler
from toolchain.device.profile.telemetry import Sample, parse_tegrastats
from toolchain.device.profile.telemetry_sampler import (
    Sampler,
    Settings,
    Source,
    find_sources,
    gpu_in_use,
    read_settings,
    summarize,
)

LINE = "RAM {ram}/7620MB (lfb 3x4MB) CPU [1%@729] GR3D_FREQ {load}%@{mhz} gpu@{celsius}C VDD_IN {mw}mW/0mW"
MIB = 1 << 20


def line(ram=1000, load=90, mhz=600, celsius=50, mw=5000) -> str:
    return LINE.format(ram=ram, load=load, mhz=mhz, celsius=celsius, mw=mw)


@pytest.fixture
def tool(tmp_path):
    """A tool that prints the given lines, writes its process number, and stays until it is stopped."""

    def make(*lines: str, ignores_term: bool = False) -> Source:
        path = tmp_path / "tegrastats"
        trap = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if ignores_term else ""
        path.write_text(
            f"#!{sys.executable}\n{trap}import os, time\n"
            f"for line in {list(lines)!r}: print(line, flush=True)\n"
            f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
            "time.sleep(600)\n"
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return Source("tegrastats", (str(path),), parse_tegrastats)

    return make


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "the tool did not answer"
        time.sleep(0.01)


def sampled(source: Source, tmp_path: Path, samples: int):
    with Sampler(
        sources=[source], settings=Settings("15W", 600), meminfo=meminfo_of(tmp_path, 5000), interval_s=0.01
    ) as sampler:
        wait_for(lambda: sampler.telemetry().samples == samples and (tmp_path / "pid").exists())
        meminfo_of(tmp_path, 4000)
        wait_for(lambda: sampler.telemetry().memory_peak_bytes == 1000 * 1024)
        meminfo_of(tmp_path, 4800)
    return sampler


def meminfo_of(tmp_path: Path, available_kb: int) -> Path:
    new, path = tmp_path / "meminfo.new", tmp_path / "meminfo"
    new.write_text(f"MemTotal: 9999 kB\nMemAvailable: {available_kb} kB\n")
    os.replace(new, path)
    return path


def is_running(tmp_path: Path) -> bool:
    return Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


def test_what_was_seen_is_summed_up_and_nothing_stays_behind(tool, tmp_path):
    source = tool(line(mhz=500, celsius=50, mw=4000), "half a li", line(mhz=600, celsius=61.5, mw=6000))
    threads = threading.active_count()
    found = sampled(source, tmp_path, 2).telemetry()
    assert (found.samples, found.unread_lines) == (2, 1)
    assert (found.gpu_mhz_min, found.gpu_mhz_median) == (500, 550)
    assert found.temperature_max == {"gpu": 61.5}
    assert (found.power_mw_mean, found.power_mw_max) == ({"VDD_IN": 5000}, {"VDD_IN": 6000})
    assert found.memory_peak_bytes == 1000 * 1024
    assert found.largest_block_least_bytes == 4 * MIB
    assert not is_running(tmp_path)
    assert threading.active_count() == threads
    assert json.loads(json.dumps(found.to_json()))["samples"] == 2


def test_a_tool_that_ignores_the_request_to_stop_is_killed(tool, tmp_path, monkeypatch):
    monkeypatch.setattr("toolchain.device.profile.telemetry_sampler._STOP_SECONDS", 0.2)
    sampled(tool(line(), ignores_term=True), tmp_path, 1)
    assert not is_running(tmp_path)


def test_the_tool_is_stopped_when_the_measurement_fails(tool, tmp_path):
    reader = Sampler(sources=[tool(line())], settings=Settings(), meminfo=tmp_path / "none", interval_s=0.01)
    with pytest.raises(ZeroDivisionError), reader as sampler:  # noqa: PT012 - what the measurement does
        wait_for(lambda: sampler.telemetry().samples == 1 and (tmp_path / "pid").exists())
        raise ZeroDivisionError
    assert not is_running(tmp_path)


def test_no_tools_and_no_meminfo_are_said_not_failed(tmp_path):
    missing = Source("tegrastats", (str(tmp_path / "none"),), parse_tegrastats)
    with Sampler(sources=[missing], settings=Settings(), meminfo=tmp_path / "none", interval_s=0.01) as sampler:
        pass
    assert sampler.telemetry().samples == 0
    with Sampler(sources=[], settings=Settings(), meminfo=tmp_path / "none", interval_s=0.01) as sampler:
        pass
    assert "no tegrastats" in sampler.telemetry().summary()


def test_both_tools_are_used_where_both_are():
    assert [s.name for s in find_sources((), lambda name: f"/usr/bin/{name}")] == ["tegrastats", "nvidia-smi"]
    assert [s.name for s in find_sources(None, lambda name: f"/usr/bin/{name}")] == ["tegrastats"]
    assert find_sources((), lambda name: None) == ()


NVIDIA_SMI = f"""#!{sys.executable}
import sys, time
gpus = {{"GPU-a": (2100, 2000, 99), "GPU-b": (1410, 700, 98)}}
words = sys.argv[1:]
if "-i" in words:
    gpus = {{name: values for name, values in gpus.items() if name == words[words.index("-i") + 1]}}
if "--query-gpu=uuid" in words:
    print("\\n".join(gpus))
elif "--query-gpu=clocks.max.sm" in words:
    print("\\n".join(str(limit) for limit, _, _ in gpus.values()))
else:
    for _, mhz, load in gpus.values():
        print(f"{{mhz}}, 5000, {{load}}, 50, 100.0, 1000, 80000, 0x0", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def two_gpus(tmp_path, monkeypatch):
    """nvidia-smi of a machine with two GPUs, the only tool there is."""
    (tmp_path / "bin").mkdir()
    path = tmp_path / "bin" / "nvidia-smi"
    path.write_text(NVIDIA_SMI)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def test_of_several_gpus_the_one_in_use_is_read(two_gpus, tmp_path, monkeypatch):
    monkeypatch.setattr(telemetry_sampler, "gpu_uuid", lambda: "GPU-b")
    with Sampler(meminfo=tmp_path / "none", interval_s=0.01) as sampler:
        wait_for(lambda: sampler.telemetry().samples)
    found = sampler.telemetry()
    assert (found.samples, found.gpu_mhz_min, found.gpu_mhz_median, found.settings.gpu_max_mhz) == (1, 700, 700, 1410)


@pytest.mark.parametrize("used", [None, "GPU-c"])
def test_gpus_of_which_none_is_known_to_be_in_use_are_not_read(two_gpus, tmp_path, monkeypatch, used):
    monkeypatch.setattr(telemetry_sampler, "gpu_uuid", lambda: used)
    assert gpu_in_use() is None
    with Sampler(meminfo=tmp_path / "none", interval_s=0.01) as sampler:
        pass
    assert (sampler.telemetry().sources, sampler.telemetry().settings) == ((), Settings())


def test_a_run_without_the_gpu_does_not_read_what_others_do_there(two_gpus, tmp_path, monkeypatch):
    monkeypatch.setattr(telemetry_sampler, "gpu_uuid", lambda: "GPU-b")
    with Sampler(uses_gpu=False, meminfo=tmp_path / "none", interval_s=0.01) as sampler:
        pass
    assert sampler.telemetry().sources == ()


@pytest.mark.parametrize("listed", ["GPU-a\n", "[N/A]\n"])
def test_a_gpu_alone_needs_no_name(listed):
    assert gpu_in_use(lambda command: listed) == ()


def test_idle_clocks_do_not_count():
    samples = [Sample(gpu_load=0, gpu_mhz=306), Sample(gpu_load=95, gpu_mhz=612), Sample(gpu_load=19, gpu_mhz=306)]
    found = summarize(samples, Settings(gpu_max_mhz=612), ("tegrastats",))
    assert (found.gpu_mhz_min, found.gpu_mhz_median) == (612, 612)
    assert found.warnings() == []


def test_without_a_load_every_clock_counts():
    found = summarize([Sample(gpu_mhz=1000), Sample(gpu_mhz=1575)], Settings(), ("nvidia-smi",))
    assert found.gpu_mhz_min == 1000


@pytest.mark.parametrize(
    ("sample", "settings", "words"),
    [
        (Sample(gpu_load=99, gpu_mhz=306), Settings("25W", 612), "ran at 306 MHz where 612 MHz is allowed"),
        (Sample(throttle=frozenset({"power cap"})), Settings("25W"), "held back by power cap"),
        (Sample(), Settings("15W"), "power mode 15W, the target's figures are for 25W"),
    ],
)
def test_what_spoils_the_figures_is_said(sample, settings, words):
    warnings = summarize([sample], settings, ("tegrastats",)).warnings("25W")
    assert len(warnings) == 1
    assert words in warnings[0]


def test_unread_lines_are_said():
    assert "3 lines" in summarize([], Settings(), ("tegrastats",), unread_lines=3).warnings()[0]


def test_memory_that_was_freed_meanwhile_is_no_negative_growth():
    assert summarize([], Settings(), (), 0, 100, [120, 130]).memory_peak_bytes == 0


CLOCKS = "GPU MinFreq=306000000 MaxFreq=918000000 CurrentFreq=306000000\nEMC MinFreq=1 MaxFreq=3199000000 CurrentFreq=1"


def answering(**answers: str):
    return lambda command: answers.get(command[0] if command[0] != "sudo" else f"sudo_{command[2]}")


def test_settings_from_the_tools(tmp_path):
    mode = "NV Power Mode: 25W\n1"
    assert read_settings((), answering(nvpmodel=mode, jetson_clocks=CLOCKS), tmp_path) == Settings("25W", 918, 3199)
    assert read_settings((), answering(nvpmodel=mode, sudo_jetson_clocks=CLOCKS), tmp_path) == Settings(
        "25W", 918, 3199
    )
    assert read_settings((), answering(**{"nvidia-smi": "2100\n"}), tmp_path) == Settings(None, 2100, None)
    assert read_settings((), answering(nvpmodel="odd", jetson_clocks="odd"), tmp_path) == Settings()


@pytest.mark.parametrize("name", ["17000000.gpu", "17000000.ga10b", "gpu-gpc-0"])
def test_without_root_the_gpus_limit_comes_from_devfreq(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "max_freq").write_text("1020000000\n")
    assert read_settings((), answering(), tmp_path).gpu_max_mhz == 1020


def test_modules_of_the_board_import_without_heavy_packages():
    modules = ("profile.measure", "profile.ort", "profile.result", "profile.source", "profile.tensorrt",
               "profile.telemetry_sampler", "remote.verbs", "remote.agent")  # fmt: skip
    code = "import sys\nfor name in ('torch', 'onnx', 'transformers'): sys.modules[name] = None\n"
    code += "".join(f"import toolchain.device.{name}\n" for name in modules) + "import toolchain.report.profile\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
