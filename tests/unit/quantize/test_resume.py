"""A run that is killed, again and again, ends in the bytes of one that was not."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from heard_progress import Heard, Stops

from toolchain.calibration.manifest import read_manifest
from toolchain.errors import InputDataError
from toolchain.quantize.baselines.registry import METHODS
from toolchain.quantize.checkpoint import quantize_checkpoint
from toolchain.quantize.driver.request import QuantizeSettings
from toolchain.vq.weights import Options

FAST = {"rounds": 1, "lloyd_rounds": 2, "samples": 1_000}
SETTINGS = ", ".join(f"{key}={value}" for key, value in FAST.items())
RUN = f"""
import os, signal, sys, torch
from toolchain.values import Silent
from toolchain.calibration.manifest import read_manifest
from toolchain.quantize.checkpoint import quantize_checkpoint
from toolchain.quantize.driver.request import QuantizeSettings
from toolchain.vq.weights import Options

model, manifest, out, stop, method = sys.argv[1:]
torch.set_num_threads(1)

class Kill(Silent):
    def layer(self, done, total, name, seconds_left):
        if done == int(stop):
            os.kill(os.getpid(), signal.SIGKILL)

settings = QuantizeSettings(method, 2.25, options=Options({SETTINGS}))
quantize_checkpoint(model, read_manifest(manifest), out, settings, Kill())
"""
SAME = ("model.safetensors", "config.json", "bitplan.json")


def run(model, manifest, out, stop, method):
    command = [sys.executable, "-c", RUN, str(model), str(manifest), str(out), str(stop), method]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_killed_runs_end_in_the_same_bytes(tiny_qwen2_vl, tiny_manifest, tmp_path):
    method = "mgvq"
    whole = run(tiny_qwen2_vl, tiny_manifest, tmp_path / "whole", 0, method)
    assert whole.returncode == 0, whole.stderr
    layers = 1 + len((tmp_path / "whole" / "layers.json").read_text().split('"name"')) - 2
    stops = sorted(random.Random(method).sample(range(1, layers), 2))
    for stop in stops:
        killed = run(tiny_qwen2_vl, tiny_manifest, tmp_path / "killed", stop, method)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not (tmp_path / "killed").exists()
    finished = run(tiny_qwen2_vl, tiny_manifest, tmp_path / "killed", 0, method)
    assert finished.returncode == 0, finished.stderr
    for name in SAME:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"], "the pieces are gone"


def test_finished_groups_are_not_made_again(tiny_qwen2_vl, tiny_manifest, tmp_path, monkeypatch):
    made, plain = [], METHODS["gptvq"]

    def counted(*arguments):
        made.append(len(arguments[0]))
        return plain(*arguments)

    monkeypatch.setitem(METHODS, "gptvq", counted)
    settings = QuantizeSettings(method="gptvq", options=Options(**FAST))
    stops = Stops(layers_done=5)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(tiny_qwen2_vl, read_manifest(tiny_manifest), tmp_path / "q", settings, stops)
    assert sum(made) >= len(stops.layers) == 5
    again = replace(settings, resume="required")
    result = quantize_checkpoint(tiny_qwen2_vl, read_manifest(tiny_manifest), tmp_path / "q", again)
    assert sum(made) == len(result.layers), "every layer once, in one run or the other"
    assert [name for _, _, name in stops.layers] == [layer.name for layer in result.layers[:5]]


def test_required_refuses_to_begin(tiny_qwen2_vl, tiny_manifest, tmp_path):
    with pytest.raises(InputDataError, match="nothing to resume"):
        quantize_checkpoint(
            tiny_qwen2_vl,
            read_manifest(tiny_manifest),
            tmp_path / "q",
            QuantizeSettings(method="rtn", resume="required"),
        )


def test_a_changed_setting_says_what_it_leaves_and_loses_nothing(tiny_qwen2_vl, tiny_manifest, tmp_path):
    """Stopped at one average, run at another, then on at the first: its groups are still there."""
    stops = Stops(layers_done=5)

    def run_at(bits, progress=stops, resume="auto"):
        settings = QuantizeSettings("rtn", bits, options=Options(**FAST), resume=resume)
        samples = read_manifest(tiny_manifest)[:2]
        return quantize_checkpoint(tiny_qwen2_vl, samples, tmp_path / "q", settings, progress)

    def pieces():
        return {path.name for path in (tmp_path / "q.partial").glob("*/group.*")}

    with pytest.raises(KeyboardInterrupt):
        run_at(2.25)
    first = pieces()
    with pytest.raises(KeyboardInterrupt):
        run_at(2.5)
    assert len(stops.notes) == 1
    assert "limits.bits (2.25, now 2.5)" in stops.notes[0]
    assert first < pieces(), "the first run's are still there"
    heard = Heard()
    run_at(2.25, heard, "required")
    assert heard.notes == []
    assert len(list((tmp_path / "q.partial").iterdir())) == 1, "the second run's are still there"


TUNED = f"""
import functools, os, signal, sys, torch
import toolchain.quantize.refine.stages
from toolchain.values import Silent
from toolchain.calibration.manifest import read_manifest
from toolchain.quantize.checkpoint import quantize_checkpoint
from toolchain.quantize.driver.request import QuantizeSettings
from toolchain.quantize.refine.finetune_settings import FineTuneSettings
from toolchain.vq.weights import Options

model, manifest, out, stop, side = sys.argv[1:]
torch.set_num_threads(1)
toolchain.quantize.refine.stages.FineTuneSettings = functools.partial(FineTuneSettings, batch=2, save_every=1)
replace, pieces = os.replace, []

def killing(old, new):
    states = os.path.basename(new).startswith("tune.steps.")
    pieces.extend([new] * states)
    ends = states and len(pieces) == int(stop)
    if ends and side == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    replace(old, new)
    if ends:
        os.kill(os.getpid(), signal.SIGKILL)

os.replace = killing

class Steps(Silent):
    def step(self, done, total, what=""):
        if what == "fine-tuning":
            print(done)

settings = QuantizeSettings("mgvq-mix+tune", 2.25, options=Options({SETTINGS}))
quantize_checkpoint(model, read_manifest(manifest), out, settings, Steps())
"""


def tuned(model, manifest, out, stop=0, side="before"):
    command = [sys.executable, "-c", TUNED, str(model), str(manifest), str(out), str(stop), side]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_fine_tuning_that_is_killed_goes_on_and_ends_in_the_same_bytes(tiny_qwen2_vl, tiny_manifest, tmp_path):
    """Killed as a state is written, on either side of the moment at which it gets its name."""
    whole = tuned(tiny_qwen2_vl, tiny_manifest, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    steps = [int(line) for line in whole.stdout.split()]
    assert steps == list(range(1, len(steps) + 1))
    first = tuned(tiny_qwen2_vl, tiny_manifest, tmp_path / "killed", 3, "after")
    assert first.returncode == -signal.SIGKILL, first.stderr
    second = tuned(tiny_qwen2_vl, tiny_manifest, tmp_path / "killed", 3, "before")
    assert second.returncode == -signal.SIGKILL, second.stderr
    last = tuned(tiny_qwen2_vl, tiny_manifest, tmp_path / "killed")
    assert last.returncode == 0, last.stderr
    # The third state was kept, then the fourth and fifth; the sixth never got its name.
    assert [int(line) for line in last.stdout.split()] == steps[5:]
    for name in SAME:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"], "the pieces are gone"


def test_a_damaged_state_of_a_fine_tuning_is_refused(tiny_qwen2_vl, tiny_manifest, tmp_path):
    killed = tuned(tiny_qwen2_vl, tiny_manifest, tmp_path / "q", 2, "after")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    kept = (tmp_path / "q.partial").glob("*/tune.steps.*.safetensors")
    state = max(kept, key=lambda path: path.stat().st_mtime_ns)
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    again = tuned(tiny_qwen2_vl, tiny_manifest, tmp_path / "q")
    assert again.returncode != 0
    assert "InputDataError" in again.stderr
    assert "expected content of SHA-256" in again.stderr
    assert state.is_file()
    assert not (tmp_path / "q").exists()


STOPPED = f"""
import functools, os, signal, sys, torch
import toolchain.quantize.mgvq.sweep
import toolchain.quantize.refine.stages
from toolchain.calibration.manifest import read_manifest
from toolchain.quantize.checkpoint import quantize_checkpoint
from toolchain.quantize.driver.request import QuantizeSettings
from toolchain.quantize.refine.round_moves import RoundOptions
from toolchain.vq.weights import Options

model, manifest, out, begins, count, side = sys.argv[1:]
torch.set_num_threads(1)
# A few groups a layer_batch, so that a round has several.
steps = functools.partial(RoundOptions, steps=(0.4, 1.0), batch_bytes=1_500_000)
toolchain.quantize.refine.stages.RoundOptions = steps
replace, code, seen = os.replace, toolchain.quantize.mgvq.sweep.quantize_group, []

def dies(name, when):
    if name.startswith(begins) and side == when and len(seen) == int(count):
        os.kill(os.getpid(), signal.SIGKILL)

def named(old, new):
    name = os.path.basename(new)
    seen.extend([name] * name.startswith(begins))
    dies(name, "before")
    replace(old, new)
    if name.endswith(".safetensors"):
        print(name.rsplit(".", 2)[0], flush=True)
    dies(name, "after")

def coded(*arguments):
    found = code(*arguments)
    seen.extend([0] * (begins == "coding"))
    dies("coding", "after")
    return found

os.replace = named
toolchain.quantize.mgvq.sweep.quantize_group = coded
settings = QuantizeSettings("mgvq-mix-drift-overlap+rounds", 2.0, options=Options({SETTINGS}))
quantize_checkpoint(model, read_manifest(manifest), out, settings)
"""


def stopped(model, manifest, out, begins="never", count=0, side="before"):
    """(return code, the pieces kept, what went wrong) of a run killed at a file or a call whose name begins so."""
    command = [sys.executable, "-c", STOPPED, str(model), str(manifest), str(out), begins, str(count), side]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout.split(), done.stderr


KILLS = (
    ("coding", 4, "after"),  # inside a group's work: coded, not kept
    ("during.round.0.shift.", 5, "after"),  # inside a layer_batch
    ("during.round.0.unit.", 1, "before"),
    ("during.round.0.moved.", 4, "before"),  # inside a group's steps
    ("during.round.0.judged.", 2, "after"),
    ("round.0.", 1, "before"),  # between rounds: all is done, nothing kept of it
    ("round.0.", 1, "after"),  # kept, and the round's own pieces not yet gone
    ("during.round.1.moved.", 3, "after"),
)


def test_a_run_killed_in_a_group_in_rounds_and_between_them_ends_in_the_same_bytes(
    tiny_qwen2_vl, tiny_manifest, tmp_path
):
    """Killed eight times; no piece is made twice but those that a kill kept from getting their names."""
    code, made, errors = stopped(tiny_qwen2_vl, tiny_manifest, tmp_path / "whole")
    assert code == 0, errors
    assert {"round.0", "round.1"} < set(made), "one round is not enough to be killed between two"
    assert len(made) == len(set(made))
    again = []
    for kill in KILLS:
        code, kept, errors = stopped(tiny_qwen2_vl, tiny_manifest, tmp_path / "killed", *kill)
        assert code == -signal.SIGKILL, (kill, errors)
        again += kept
    code, kept, errors = stopped(tiny_qwen2_vl, tiny_manifest, tmp_path / "killed")
    assert code == 0, errors
    again += kept
    for name in SAME:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    twice = {name for name in again if again.count(name) > 1}
    assert all(name.startswith("during.round.0.shift.") for name in twice), (
        "only a layer batch that was cut is done again"
    )
    assert len(twice) <= 5
    assert set(again) == set(made)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"], "the pieces are gone"
