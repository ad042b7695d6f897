"""Doctor: the fatal pair, versions out of their window, and boards, without touching what is installed."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest

from toolchain.plan.target import load_target, parse_toml
from toolchain.run import doctor

GOOD = {"torch": "2.13.0+cpu", "transformers": "5.23.0", "onnx": "1.23.2", "onnxruntime": "1.32.0"}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function that makes this machine have exactly the given packages; gives back its root folder."""

    def make(packages: dict[str, str], l4t: str = "", available_kb: int = 16 << 20) -> Path:
        def version(name: str) -> str:
            if name not in packages:
                raise metadata.PackageNotFoundError(name)
            return packages[name]

        monkeypatch.setattr(metadata, "version", version)
        (tmp_path / "etc").mkdir(exist_ok=True)
        (tmp_path / "proc").mkdir(exist_ok=True)
        (tmp_path / "proc/meminfo").write_text(f"MemTotal:  1 kB\nMemAvailable:   {available_kb} kB\n")
        if l4t:
            major, revision = l4t.split(".", 1)
            text = f"# R{major} (release), REVISION: {revision}, GCID: 1, BOARD: generic, EABI: aarch64\n"
            (tmp_path / "etc/nv_tegra_release").write_text(text)
        return tmp_path

    return make


def by_name(report: doctor.DoctorReport) -> dict[str, doctor.Check]:
    return {check.name: check for check in report.checks}


def test_a_good_machine_passes(machine):
    report = doctor.diagnose(root=machine(GOOD))
    assert report.verdict in ("ok", "ok-with-warnings")  # this machine's disk may be full
    assert report.exit_code == 0
    assert {"name", "found", "expected", "status", "fix"} == set(report.to_json()["checks"][0])


def test_onnxruntime_side_by_side_fails_and_names_the_fix(machine):
    report = doctor.diagnose(root=machine(GOOD | {"onnxruntime-gpu": "1.32.0"}))
    check = by_name(report)["onnxruntime"]
    assert (check.status, report.verdict, report.exit_code) == ("fail", "fail", 6)
    assert check.fix == "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
    assert "onnxruntime 1.32.0 and onnxruntime-gpu 1.32.0" in check.found


def test_onnxruntime_gpu_alone_is_fine(machine):
    packages = {key: value for key, value in GOOD.items() if key != "onnxruntime"} | {"onnxruntime-gpu": "1.32.0"}
    assert by_name(doctor.diagnose(root=machine(packages)))["onnxruntime"].status == "ok"


@pytest.mark.parametrize(
    ("package", "version", "status"),
    [
        *[("torch", "2.14.0", "fail"), ("torch", "2.10.1", "fail"), ("torch", "2.11", "ok")],
        *[("transformers", "4.57.0", "fail"), ("transformers", "6.0", "fail"), ("onnx", "1.9", "fail")],
        ("onnxruntime", "1.20.1", "fail"),
    ],
)
def test_versions_outside_their_window_fail_with_a_command(machine, package, version, status):
    check = by_name(doctor.diagnose(root=machine(GOOD | {package: version})))[package]
    assert check.status == status
    assert bool(check.fix) == (status == "fail")


def test_what_is_not_installed_is_a_warning(machine):
    report = doctor.diagnose(root=machine({}))
    assert report.verdict == "ok-with-warnings"
    assert {by_name(report)[name].status for name in ("torch", "transformers", "onnx", "onnxruntime")} == {"warn"}


def test_windows_are_those_of_the_package():
    dependencies = parse_toml((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    for name, (low, high) in doctor.REQUIRED.items():
        window = f">={low}" + (f",<{high}" if high else "")
        assert f"{name}{window}" in dependencies["dependencies"]
    assert dependencies["requires-python"] == f">={doctor.PYTHON[0]},<{doctor.PYTHON[1]}"


def test_little_memory_is_a_warning(machine):
    check = by_name(doctor.diagnose(root=machine(GOOD, available_kb=1 << 20)))["ram"]
    assert (check.status, check.found) == ("warn", "1.0 GiB")


@pytest.mark.parametrize(
    ("l4t", "tensorrt", "jetson_status", "tensorrt_status"),
    [
        *[("36.4.3", "10.3.0", "ok", "ok"), ("36.4.3", "10.16.1", "ok", "ok"), ("36.4.3", "10.7.0", "ok", "fail")],
        *[("35.4.1", "8.5.2", "fail", "fail"), ("36.5.0", None, "ok", "fail")],
    ],
)
def test_boards(machine, l4t, tensorrt, jetson_status, tensorrt_status):
    packages = {"tensorrt": tensorrt} if tensorrt else {}
    checks = by_name(doctor.diagnose(load_target("orin-nano-8gb"), machine(packages, l4t)))
    assert checks["jetson"].found == f"L4T {l4t}"
    assert (checks["jetson"].status, checks["tensorrt"].status) == (jetson_status, tensorrt_status)
    assert all(check.fix for check in checks.values() if check.status != "ok")


@pytest.mark.parametrize(
    ("l4t", "bindings", "status"),
    [("36.4.3", None, "fail"), ("36.4.3", "12.6.2.post1", "ok"), ("36.4.3", "11.8.6", "fail"), (None, None, "ok")],
)
def test_a_board_needs_cudas_bindings(machine, l4t, bindings, status):
    """Without them a build ends at the plugin's self-test, and nothing runs."""
    packages = {"cuda-python": bindings} if bindings else {}
    check = by_name(doctor.diagnose(None, machine(packages, l4t)))["cuda-python"]
    assert check.status == status
    assert bool(check.fix) == (status == "fail")


def test_a_broken_torch_is_reported_not_raised(machine, monkeypatch):
    import builtins

    real = builtins.__import__

    def broken(name, *rest, **more):
        if name == "torch":
            raise OSError("libcudart.so.13: cannot open shared object file")
        return real(name, *rest, **more)

    root = machine(GOOD)
    monkeypatch.setattr(builtins, "__import__", broken)
    check = by_name(doctor.diagnose(root=root))["gpu"]
    assert check.status == "fail"
    assert re.search("libcudart", check.found)


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    """A function that makes this machine have a library for `architectures` (None: no library) and those GPUs."""
    from types import SimpleNamespace

    def make(architectures: str | None, *capabilities: tuple[int, int]) -> doctor.Check:
        path = None if architectures is None else tmp_path / "libmgvq_kernels.so"
        monkeypatch.setattr(doctor, "find_library", lambda: path)
        monkeypatch.setattr(
            doctor, "KernelLibrary", lambda path: SimpleNamespace(path=path, architectures=architectures.split())
        )
        monkeypatch.setattr(doctor, "_gpu_capabilities", lambda: list(capabilities))
        return by_name(doctor.diagnose(root=tmp_path))["kernels"]

    return make


@pytest.mark.parametrize(
    ("architectures", "capabilities", "status", "words"),
    [
        (None, [], "ok", "not built"),
        (None, [(9, 0)], "warn", "not built"),
        ("80 90", [(9, 0)], "ok", "ABI 3, architectures 80 90"),
        ("80 90", [], "ok", "architectures 80 90"),
        ("80 90", [(9, 0), (12, 0)], "fail", "none for sm_120"),
    ],
)
def test_the_kernels_are_a_warning_only_where_a_gpu_waits(kernels, architectures, capabilities, status, words):
    check = kernels(architectures, *capabilities)
    assert (check.status, words in check.found) == (status, True), check
    assert check.fix == ("" if architectures and status == "ok" else "mgvq kernels build")


def test_a_library_that_does_not_load_fails(monkeypatch, tmp_path):
    broken = tmp_path / "libmgvq_kernels.so"
    broken.write_bytes(b"nothing")
    monkeypatch.setenv("MGVQ_KERNELS", str(broken))
    check = by_name(doctor.diagnose(root=tmp_path))["kernels"]
    assert (check.status, check.fix) == ("fail", "mgvq kernels build")
    assert "does not load" in check.found


def test_what_a_build_lacks_is_said_with_what_brings_it(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.build, "find_nvcc", lambda: None)
    check = by_name(doctor.diagnose(root=tmp_path))["kernels build"]
    assert (check.status, "nvcc not found" in check.found) == ("ok", True)
    assert check.fix.startswith("install nvcc of CUDA 12.6 or newer")
