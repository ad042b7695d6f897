"""The machine's facts: the CPU's name, a device that is there, and a peak that has seen what was allocated."""

from __future__ import annotations

import json

import pytest
import torch

from toolchain.bench.machine import checked_device, cpu_model, machine_facts, peak_bytes, timed
from toolchain.errors import EnvironmentMismatch


def test_the_cpus_name_is_the_first_the_kernel_lists(tmp_path):
    listing = tmp_path / "cpuinfo"
    listing.write_text("processor\t: 0\nmodel\t\t: 2\nmodel name\t: Some CPU: 9\nmodel name\t: Other\n")
    assert cpu_model(listing) == "Some CPU: 9"


def test_a_machine_that_lists_no_name_still_has_one(tmp_path):
    assert cpu_model(tmp_path / "nothing")


def test_cuda_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentMismatch, match=r"finds no CUDA device; .* or use --device cpu"):
        checked_device("cuda")
    assert checked_device("cpu").type == "cpu"


def test_facts_are_clean_json():
    facts = machine_facts(torch.device("cpu"))
    assert json.loads(json.dumps(facts)) == facts
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()


def test_the_peak_has_seen_a_tensor_that_is_gone():
    bytes_held = 1 << 26
    torch.ones(bytes_held, dtype=torch.uint8)
    assert peak_bytes(torch.device("cpu")) >= bytes_held


def test_timing_hands_the_result_on():
    result, seconds, cpu_seconds = timed(torch.device("cpu"), lambda: "found")
    assert result == "found"
    assert min(seconds, cpu_seconds) >= 0
