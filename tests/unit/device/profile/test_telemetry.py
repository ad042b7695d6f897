"""Tools' lines as numbers. The lines here were written for these tests in the formats that the vendor documents
("tegrastats Utility" of the Jetson Linux Developer Guide, releases 35 to 39) and that users posted of JetPack 7
(rbonghi/jetson_stats, threads 885 and 894); none is a recording of ours.
"""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolchain.device.profile.telemetry import (
    SMI_QUERY,
    Clock,
    Sample,
    parse_jetson_clocks,
    parse_meminfo,
    parse_nvidia_smi,
    parse_nvpmodel,
    parse_tegrastats,
)
from toolchain.errors import InputDataError

JETPACK_5 = (
    "03-11-2024 10:20:31 RAM 3110/6480MB (lfb 12x4MB) SWAP 41/3240MB (cached 2MB) "
    "CPU [13%@1190,0%@1190,5%@729,off,off,100%@1510] EMC_FREQ 7%@2133 GR3D_FREQ 41%@611 GR3D2_FREQ 0%@0 VIC_FREQ 115 "
    "APE 174 CV0@-256C CPU@48.5C SOC2@47.25C SOC0@46C CV1@-256C GPU@47C tj@48.5C SOC1@46.5C CV2@-256C "
    "VDD_IN 5210mW/4980mW VDD_CPU_GPU_CV 1210mW/1100mW VDD_SOC 1490mW/1480mW"
)
JETPACK_6 = (
    "11-20-2024 12:00:01 RAM 2722/7620MB (lfb 3x4MB) SWAP 0/3810MB (cached 0MB) CPU [1%@729,0%@729,2%@1344,0%@1344] "
    "EMC_FREQ 1%@2133 GR3D_FREQ 97%@[305] NVDEC off NVJPG off VIC off OFA off APE 200 cpu@47.031C soc2@45.906C "
    "gpu@46.5C tj@47.031C VDD_IN 4660mW/4610mW VDD_CPU_GPU_CV 518mW/500mW VDD_SOC 1438mW/1430mW"
)
JETPACK_7_ORIN = (
    "07-25-2026 09:08:28 RAM 20642/62817MB (lfb 1x2MB) CPU [23%@2201,10%@2201] EMC_FREQ 3%@3199 "
    "GR3D_FREQ 0%@[1300,1295] NVENC0 off NVDEC0 off APE 174 "
    "cpu@52.968C/52.968C gpu@49.5C/50.1C VDD_GPU_SOC 4800mW/4700mW"
)
JETPACK_7_THOR = (
    "07-02-2026 18:00:00 RAM 9011/125772MB (lfb 511x4MB) SWAP 0/0MB (cached 0MB) CPU [0%@2601,12%@2601,0%@972] "
    "cpu@41.25C/42C gpu@62.906C soc@40C VDD_GPU 12800mW/9900mW VDD_CPU_SOC_MSS 9100mW/9000mW VIN 41000mW/38000mW"
)
THOR_WITH_CLOCKS = "RAM 9011/125772MB (lfb 511x4MB) CPU [0%@2601] GR3D_FREQ @[1575,0,1575]"
JETPACK_4 = (
    "RAM 1187/3964MB (lfb 31x4MB) SWAP 0/1982MB (cached 0MB) IRAM 0/252kB(lfb 252kB) CPU [2%@102,1%@102,off,off] "
    "EMC_FREQ 0%@1600 GR3D_FREQ 0%@921 APE 25 PLL@38.5C CPU@41C PMIC@100C GPU@38.5C thermal@39.5C "
    "POM_5V_IN 2034/2034 POM_5V_GPU 0/0 POM_5V_CPU 245/245"
)
MIB = 1 << 20


def test_jetpack_5():
    found = parse_tegrastats(JETPACK_5)
    assert (found.ram_used_bytes, found.ram_total_bytes, found.swap_used_bytes) == (3110 * MIB, 6480 * MIB, 41 * MIB)
    assert (found.largest_block_bytes, found.largest_blocks) == (4 * MIB, 12)
    assert found.cores == ((13, 1190), (0, 1190), (5, 729), (100, 1510))
    assert (found.emc_load, found.emc_mhz, found.gpu_load, found.gpu_mhz) == (7, 2133, 41, 611)
    assert found.temperatures == {"cpu": 48.5, "soc2": 47.25, "soc0": 46, "gpu": 47, "tj": 48.5, "soc1": 46.5}
    assert found.power_mw == {"VDD_IN": 5210, "VDD_CPU_GPU_CV": 1210, "VDD_SOC": 1490}


def test_jetpack_6():
    found = parse_tegrastats(JETPACK_6)
    assert (found.gpu_load, found.gpu_mhz, found.emc_mhz) == (97, 305, 2133)
    assert found.temperatures["cpu"] == 47.031
    assert found.power_mw["VDD_IN"] == 4660


def test_jetpack_7_on_orin_has_a_clock_for_each_gpc():
    found = parse_tegrastats(JETPACK_7_ORIN)
    assert (found.gpu_load, found.gpu_mhz) == (0, 1295)
    assert found.temperatures == {"cpu": 52.968, "gpu": 49.5}
    assert (found.largest_block_bytes, found.swap_used_bytes) == (2 * MIB, None)


def test_jetpack_7_on_thor_tells_no_gpu_load():
    found = parse_tegrastats(JETPACK_7_THOR)
    assert (found.gpu_load, found.gpu_mhz, found.emc_mhz) == (None, None, None)
    assert found.power_mw == {"VDD_GPU": 12800, "VDD_CPU_SOC_MSS": 9100, "VIN": 41000}
    clocks = parse_tegrastats(THOR_WITH_CLOCKS)
    assert (clocks.gpu_load, clocks.gpu_mhz) == (None, 1575)  # the GPC that is off does not count


def test_an_older_release_gives_milliwatts_without_saying_so():
    found = parse_tegrastats(JETPACK_4)
    assert found.power_mw == {"POM_5V_IN": 2034, "POM_5V_GPU": 0, "POM_5V_CPU": 245}
    assert found.ram_used_bytes == 1187 * MIB
    assert found.cores == ((2, 102), (1, 102))


@pytest.mark.parametrize("line", ["", "tegrastats: command not found", "SWAP 0/0MB CPU [1%@729]", "RAM /7620MB"])
def test_what_is_no_line_is_refused(line):
    assert parse_tegrastats(line) is None


@pytest.mark.parametrize("line", [JETPACK_4, JETPACK_5, JETPACK_6, JETPACK_7_ORIN, JETPACK_7_THOR])
def test_a_line_cut_anywhere_never_tells_something_else(line):
    """A field of a cut line is what the whole line says, or not there; only the one at the cut may be shorter."""
    whole = dataclasses.asdict(parse_tegrastats(line))
    for end in [i for i, c in enumerate(line) if c == " "]:
        found = parse_tegrastats(line[:end])
        for name, value in dataclasses.asdict(found).items() if found else ():
            if isinstance(value, dict):
                assert value.items() <= whole[name].items()
            else:
                assert value in (None, whole[name], (), frozenset())


@given(st.text())
def test_any_text_is_read_or_refused(text):
    for parse in (parse_tegrastats, parse_nvidia_smi):
        assert parse(text) is None or isinstance(parse(text), Sample)
    assert isinstance(parse_meminfo(text), dict)


def test_nvidia_smi_on_a_workstation():
    found = parse_nvidia_smi("1980, 2619, 97, 61, 412.35, 40231, 81559, 0x0000000000000004\n")
    assert (found.gpu_mhz, found.emc_mhz, found.gpu_load) == (1980, 2619, 97)
    assert found.temperatures == {"gpu": 61}
    assert found.power_mw == {"gpu": 412350}
    assert (found.ram_used_bytes, found.ram_total_bytes) == (40231 * MIB, 81559 * MIB)
    assert found.throttle == {"power cap"}
    assert len(SMI_QUERY.split(",")) == 8


def test_nvidia_smi_on_a_board_leaves_out_what_it_does_not_know():
    found = parse_nvidia_smi("1575, [N/A], 88, 62, [Not Supported], [N/A], [N/A], 0x0000000000000000")
    assert (found.gpu_mhz, found.gpu_load, found.emc_mhz) == (1575, 88, None)
    assert (found.ram_used_bytes, found.power_mw, found.throttle) == (None, {}, frozenset())


@pytest.mark.parametrize(
    ("bits", "reasons"),
    [("0x1", set()), ("0x2", set()), ("0x60", {"temperature (software)", "temperature (hardware)"}),
     ("0x88", {"hardware slowdown", "power brake"})],
)  # fmt: skip
def test_only_what_slows_counts_as_throttling(bits, reasons):
    assert parse_nvidia_smi(f"1, 1, 1, 1, 1, 1, 1, {bits}").throttle == reasons


@pytest.mark.parametrize("line", ["No devices were found", "1980, 2619, 97", "a, b, c, d, e, f, g, h"])
def test_what_is_no_line_of_nvidia_smi_is_refused(line):
    assert parse_nvidia_smi(line) is None


def test_power_mode():
    assert parse_nvpmodel("NV Power Mode: MAXN_SUPER\n2\n") == "MAXN_SUPER"
    assert parse_nvpmodel("NV Fan Mode:quiet\nNV Power Mode: 15W\n0\n") == "15W"
    with pytest.raises(InputDataError, match="expected a line 'NV Power Mode: NAME'"):
        parse_nvpmodel("NVPM ERROR: failed")


CLOCKS = """SOC family:tegra234  Machine:NVIDIA Jetson Orin Nano Developer Kit
Online CPUs: 0-5
cpu0: Online=1 Governor=schedutil MinFreq=729600 MaxFreq=1510400 CurrentFreq=729600 IdleStates: WFI=1 c7=1
GPU MinFreq=306000000 MaxFreq=624750000 CurrentFreq=306000000
EMC MinFreq=204000000 MaxFreq=2133000000 CurrentFreq=2133000000 FreqOverride=0
DLA0_CORE:   Online=1 MinFreq=0 MaxFreq=614400000 CurrentFreq=614400000
FAN Dynamic Speed control=nvfancontrol hwmon0_pwm1=0
NV Power Mode: 15W
"""


def test_jetson_clocks_are_hertz_whatever_the_tool_prints():
    found = parse_jetson_clocks(CLOCKS)
    assert found == {
        "cpu0": Clock(729_600_000, 1_510_400_000, 729_600_000),
        "GPU": Clock(306_000_000, 624_750_000, 306_000_000),
        "EMC": Clock(204_000_000, 2_133_000_000, 2_133_000_000),
    }


def test_jetson_clocks_without_clocks_is_refused():
    with pytest.raises(InputDataError, match="needs root"):
        parse_jetson_clocks("Error! jetson_clocks has to be run as root")


def test_meminfo():
    text = "MemTotal:        7800000 kB\nMemAvailable:    5900000 kB\nHugePages_Total:       0\nCmaFree:  200000 kB\n"
    assert parse_meminfo(text) == {
        "MemTotal": 7_987_200_000, "MemAvailable": 6_041_600_000, "CmaFree": 204_800_000
    }  # fmt: skip
