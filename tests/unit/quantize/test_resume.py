"""A run that is stopped, again and again, ends in the bytes of one that was not.

One test kills a process outright. The others raise what nothing catches at the very places where a kill would come, in
this process, so that importing torch is not what they spend their time on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pytest
from heard_progress import Heard, Stops

from toolchain.calibration.manifest import read_manifest
from toolchain.errors import InputDataError
from toolchain.quantize.baselines.registry import METHODS
from toolchain.quantize.checkpoint import quantize_checkpoint
from toolchain.quantize.driver.request import QuantizeSettings
from toolchain.quantize.mgvq import sweep
from toolchain.quantize.refine import stages
from toolchain.quantize.refine.finetune_settings import FineTuneSettings
from toolchain.quantize.refine.round_moves import RoundOptions
from toolchain.vq.weights import Options

FAST = Options(rounds=1, lloyd_rounds=2, samples=1_000)
RUN = """
import os, signal, sys, torch
from toolchain.calibration.manifest import read_manifest
from toolchain.quantize.checkpoint import quantize_checkpoint
from toolchain.quantize.driver.request import QuantizeSettings
from toolchain.values import Silent
from toolchain.vq.weights import Options

model, manifest, out, stop = sys.argv[1:]
torch.set_num_threads(1)

class Kill(Silent):
    def layer(self, done, total, name, seconds_left):
        if done == int(stop):
            os.kill(os.getpid(), signal.SIGKILL)

settings = QuantizeSettings("mgvq-overlap", 2.25, options=Options(rounds=1, lloyd_rounds=2, samples=1_000))
quantize_checkpoint(model, read_manifest(manifest), out, settings, Kill())
"""
SAME = ("model.safetensors", "config.json", "bitplan.json")


class KilledError(BaseException):
    """What no handler of ours catches."""


def same_bytes(one: Path, other: Path) -> None:
    for name in SAME:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def run(model, manifest, out, stop):
    command = [sys.executable, "-c", RUN, str(model), str(manifest), str(out), str(stop)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow(reason="three processes, each of which imports torch")
def test_a_killed_process_is_gone_on_with_and_ends_in_the_same_bytes(tiny_qwen2_vl, tiny_manifest, tmp_path):
    killed = run(tiny_qwen2_vl, tiny_manifest, tmp_path / "killed", 7)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "killed").exists()
    finished = run(tiny_qwen2_vl, tiny_manifest, tmp_path / "killed", 0)
    assert finished.returncode == 0, finished.stderr
    whole = run(tiny_qwen2_vl, tiny_manifest, tmp_path / "whole", 0)
    assert whole.returncode == 0, whole.stderr
    same_bytes(tmp_path / "killed", tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"], "the pieces are gone"


def test_finished_groups_are_not_made_again(tiny_qwen2_vl, tiny_manifest, tmp_path, monkeypatch):
    made, plain = [], METHODS["gptvq"]

    def counted(*arguments):
        made.append(len(arguments[0]))
        return plain(*arguments)

    monkeypatch.setitem(METHODS, "gptvq", counted)
    settings = QuantizeSettings(method="gptvq", options=FAST)
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
        settings = QuantizeSettings("rtn", bits, options=FAST, resume=resume)
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


@dataclass
class Kills:
    """Kills as a piece is written: when so many whose names begin alike were seen, before or after it has its name."""

    begins: str = "never"
    count: int = 0
    side: str = "before"
    seen: int = 0
    kept: list[str] = field(default_factory=list)
    replace: Callable[..., None] = os.replace

    def maybe(self, begins: str, side: str) -> None:
        if begins.startswith(self.begins) and self.side == side and self.seen == self.count:
            raise KilledError

    def __call__(self, old, new) -> None:
        name = os.path.basename(new)
        self.seen += name.startswith(self.begins)
        self.maybe(name, "before")
        self.replace(old, new)
        if name.endswith(".safetensors"):
            self.kept.append(name.rsplit(".", 2)[0])
        self.maybe(name, "after")


@pytest.fixture
def stopped(tiny_qwen2_vl, tiny_manifest, monkeypatch):
    """A function: the pieces that a run with these kills has kept, and whether it was killed."""

    def run(out: Path, method: str, bits: float, kills: Kills | None = None, heard: Heard | None = None):
        kills = kills or Kills()
        monkeypatch.setattr(os, "replace", kills)
        coded, plain = sweep.quantize_group, Kills.replace

        def counted(*arguments):
            found = coded(*arguments)
            kills.seen += kills.begins == "coding"
            kills.maybe("coding", "after")
            return found

        monkeypatch.setattr(sweep, "quantize_group", counted)
        try:
            settings = QuantizeSettings(method, bits, options=FAST)
            quantize_checkpoint(tiny_qwen2_vl, read_manifest(tiny_manifest), out, settings, heard or Heard())
        except KilledError:
            return kills.kept, True
        finally:
            monkeypatch.setattr(os, "replace", plain)
            monkeypatch.setattr(sweep, "quantize_group", coded)
        return kills.kept, False

    return run


@pytest.fixture
def tuned(stopped, monkeypatch):
    """A function: the steps that a fine-tuning has taken, and whether it was killed."""
    monkeypatch.setattr(stages, "FineTuneSettings", partial(FineTuneSettings, batch=2, save_every=1))

    def run(out: Path, count: int = 0, side: str = "before"):
        heard = Heard()
        kills = Kills("tune.steps.", count, side) if count else None
        _, killed = stopped(out, "mgvq-mix-overlap+tune", 2.0, kills, heard)
        return [done for done, _, what in heard.steps if what == "fine-tuning"], killed

    return run


def test_fine_tuning_that_is_killed_goes_on_and_ends_in_the_same_bytes(tuned, tmp_path):
    """Killed as a state is written, on either side of the moment at which it gets its name."""
    steps, _ = tuned(tmp_path / "whole")
    assert steps == list(range(1, len(steps) + 1))
    assert tuned(tmp_path / "killed", 3, "after")[1]
    assert tuned(tmp_path / "killed", 3, "before")[1]
    last, killed = tuned(tmp_path / "killed")
    assert not killed
    # The third state was kept, then the fourth and fifth; the sixth never got its name.
    assert last == steps[5:]
    same_bytes(tmp_path / "killed", tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"], "the pieces are gone"


def test_a_damaged_state_of_a_fine_tuning_is_refused(tuned, tmp_path):
    assert tuned(tmp_path / "q", 2, "after")[1]
    kept = (tmp_path / "q.partial").glob("*/tune.steps.*.safetensors")
    state = max(kept, key=lambda path: path.stat().st_mtime_ns)
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    with pytest.raises(InputDataError, match="expected content of SHA-256"):
        tuned(tmp_path / "q")
    assert state.is_file()
    assert not (tmp_path / "q").exists()


KILLS = (
    ("coding", 4, "after"),  # inside a group's work: coded, not kept
    ("during.round.0.shift.", 5, "after"),  # inside a layer batch
    ("during.round.0.unit.", 1, "before"),
    ("during.round.0.moved.", 4, "before"),  # inside a group's steps
    ("during.round.0.judged.", 2, "after"),
    ("round.0.", 1, "before"),  # between rounds: all is done, nothing kept of it
    ("round.0.", 1, "after"),  # kept, and the round's own pieces not yet gone
    ("during.round.1.moved.", 3, "after"),
)
ROUNDS = "mgvq-mix-drift-overlap+rounds"


def test_a_run_killed_in_a_group_in_rounds_and_between_them_ends_in_the_same_bytes(stopped, tmp_path, monkeypatch):
    """Killed eight times; no piece is made twice but those that a kill kept from getting their names."""
    # A few groups a layer batch, so that a round has several.
    few = partial(RoundOptions, steps=(0.4, 1.0), batch_bytes=1_500_000)
    monkeypatch.setattr(stages, "RoundOptions", few)
    made, _ = stopped(tmp_path / "whole", ROUNDS, 2.0)
    assert {"round.0", "round.1"} < set(made), "one round is not enough to be killed between two"
    assert len(made) == len(set(made))
    again = []
    for kill in KILLS:
        kept, killed = stopped(tmp_path / "killed", ROUNDS, 2.0, Kills(*kill))
        assert killed, kill
        again += kept
    kept, killed = stopped(tmp_path / "killed", ROUNDS, 2.0)
    assert not killed
    again += kept
    same_bytes(tmp_path / "killed", tmp_path / "whole")
    twice = {name for name in again if again.count(name) > 1}
    assert all(name.startswith("during.round.0.shift.") for name in twice), "only a layer batch that was cut is redone"
    assert len(twice) <= 5
    assert set(again) == set(made)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"], "the pieces are gone"
