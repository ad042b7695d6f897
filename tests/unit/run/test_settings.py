"""Settings: who wins over whom, and what a wrong one is told."""

from __future__ import annotations

import pytest

from toolchain.errors import InputDataError, UsageError
from toolchain.run.settings import resolve

PATHS = {"model": "m", "output": "o", "calib": "c"}


def test_flags_win_over_set_over_file_over_defaults(tmp_path):
    file = tmp_path / "settings.json"
    file.write_text('{"quantize": {"bits": 3.0, "seed": 1, "samples": 5}, "target": "agx-orin-64gb"}')
    settings, origin = resolve(PATHS | {"quantize.bits": 2.5, "target": None}, ["quantize.seed=2"], file)
    quantize = settings.quantize
    assert (quantize.bits, quantize.seed, quantize.samples, quantize.method) == (2.5, 2, 5, "mgvq")
    assert settings.target == "agx-orin-64gb"
    found = [origin[f"quantize.{key}"] for key in ("bits", "seed", "samples", "method")]
    assert found == ["flag", "set", "file", "default"]


def test_patterns_with_dots_stay_whole():
    settings, _ = resolve(PATHS, ['quantize.codes={"*.layers.0.*": "2,8,8"}'], None)
    assert settings.quantize.codes == {"*.layers.0.*": "2,8,8"}


def test_a_budget_without_bits_leaves_them_to_the_budget():
    settings, origin = resolve(PATHS | {"budget_bytes": 10**6}, [], None)
    assert (settings.quantize.bits, settings.budget_bytes) == (None, 10**6)
    assert origin["quantize.bits"] == origin["budget_bytes"] == "flag"
    for assignments in ([], ["quantize.bits=3"]):
        flags = PATHS | ({} if assignments else {"quantize.bits": 3.0})
        settings, origin = resolve(flags | {"budget_bytes": 10**6}, assignments, None)
        assert (settings.quantize.bits, settings.budget_bytes) == (3.0, 10**6)
    settings, origin = resolve(PATHS, [], None)
    assert (settings.quantize.bits, origin["quantize.bits"]) == (2.0, "default")


def test_what_was_resolved_resolves_to_itself(tmp_path):
    settings, _ = resolve(PATHS | {"budget_bytes": 10**6}, [], None)
    (tmp_path / "again.json").write_text(settings.model_dump_json())
    assert resolve({}, [], tmp_path / "again.json")[0] == settings


@pytest.mark.parametrize(
    "method", ["mgvq", "mgvq-drift", "mgvq-mix-interleave+tune", "rtn", "gptq", "gptvq", "nearest"]
)
def test_methods_that_a_checkpoint_can_hold(method):
    assert resolve(PATHS, [f"quantize.method={method}"], None)[0].quantize.method == method


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("quantize.method=vptq", r"'quantize.method' \(from set\): method 'vptq' is for mgvq compare alone"),
        ("quantize.method=mgvq-magic", "unknown part 'magic'"),
        ("quantize.method=awq", "method 'awq' is not known; use one of"),
        ("quantize.bits=1.4", "greater than or equal to 1.5, found 1.4"),
        ("quantize.bits=null", "quantize.bits is null without a budget_bytes"),
        ("quantize.bitz=2", r"'quantize.bitz' \(from set\): Extra inputs are not permitted"),
        ("quantize.bits=9", "less than or equal to 4, found 9"),
        ("plan.image=large", "found 'large'"),
        ("=3", "expected key=value"),
    ],
)
def test_wrong_settings_are_named(assignment, words):
    with pytest.raises(UsageError, match=words):
        resolve(PATHS, [assignment], None)


def test_broken_files(tmp_path):
    with pytest.raises(InputDataError, match="does not exist"):
        resolve(PATHS, [], tmp_path / "gone.json")
    for name, text in (("a.json", "{"), ("b.toml", "= 3"), ("c.json", "[1]")):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputDataError, match="expected"):
            resolve(PATHS, [], tmp_path / name)
