"""The store: pieces that are whole or not there, and that belong to one key."""

from __future__ import annotations

import pytest
import torch

from toolchain.errors import InputDataError, UsageError
from toolchain.files.store import ObjectStore

KEY = {"seed": 0, "limits": {"bits": 2.0}}
TENSORS = {
    "table": torch.arange(8, dtype=torch.float16).reshape(4, 2),
    "codes": torch.tensor([1, 2], dtype=torch.uint8),
}


def test_a_piece_comes_back_with_its_value(tmp_path):
    store = ObjectStore.open(tmp_path / "s", KEY)
    store.put("group.a", TENSORS, [{"name": "a", "error": 0.5}])
    tensors, value = ObjectStore.open(tmp_path / "s", KEY).get("group.a")
    assert value == [{"name": "a", "error": 0.5}]
    assert {name: t.dtype for name, t in tensors.items()} == {name: t.dtype for name, t in TENSORS.items()}
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert store.get("group.b") is None


def test_what_is_there_is_not_made_again(tmp_path):
    store = ObjectStore.open(tmp_path / "s", KEY)
    made = []

    def make():
        made.append(1)
        return TENSORS, {"n": 1}

    first, second = store.get_or_make("x", make), store.get_or_make("x", make)
    assert len(made) == 1
    assert first[1] == second[1] == {"n": 1}


@pytest.mark.parametrize("damage", [lambda data: data[:-3], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_a_broken_piece_is_made_again(tmp_path, damage):
    store = ObjectStore.open(tmp_path / "s", KEY)
    store.put("x", TENSORS, None)
    path = next(store.folder.glob("x.*.safetensors"))
    path.write_bytes(damage(path.read_bytes()))
    assert store.get("x") is None
    assert torch.equal(store.get_or_make("x", lambda: (TENSORS, 3))[0]["codes"], TENSORS["codes"])


def test_a_name_that_begins_another_is_not_it(tmp_path):
    store = ObjectStore.open(tmp_path / "s", KEY)
    store.put("group.layers.1", TENSORS, 1)
    store.put("group.layers.1.mlp", TENSORS, 2)
    store.put("group.layers.1", TENSORS, 3)
    assert store.get("group.layers.1")[1] == 3
    assert store.get("group.layers.1.mlp")[1] == 2


def test_another_key_begins_anew_and_loses_nothing(tmp_path):
    notes = []
    first = ObjectStore.open(tmp_path / "s", KEY, note=notes.append)
    first.put("x", TENSORS, 1)
    other = KEY | {"seed": 1, "limits": {"bits": 2.25}}
    second = ObjectStore.open(tmp_path / "s", other, note=notes.append)
    assert second.get("x") is None
    assert notes == [
        f"{first.folder} holds the pieces of a run that was stopped and differs in limits.bits (2.0, now 2.25), seed "
        f"(0, now 1); they stay, and this run begins anew beside them. To go on with them give their settings again; "
        f"else remove {first.folder}"
    ]
    second.put("x", TENSORS, 2)
    assert ObjectStore.open(tmp_path / "s", KEY, note=notes.append).get("x")[1] == 1
    assert ObjectStore.open(tmp_path / "s", other, note=notes.append).get("x")[1] == 2
    assert len(notes) == 1, "who goes on is not told of others"
    second.discard()
    assert ObjectStore.open(tmp_path / "s", KEY).get("x")[1] == 1
    first.discard()
    assert list(tmp_path.iterdir()) == [], "the folder goes with the last store in it"


def test_long_values_are_left_out_of_what_differs(tmp_path):
    notes = []
    ObjectStore.open(tmp_path / "s", KEY | {"calibration": "a" * 64}).put("x", TENSORS)
    ObjectStore.open(tmp_path / "s", KEY | {"calibration": "b" * 64}, note=notes.append)
    assert "differs in calibration;" in notes[0]


def test_nothing_is_written_before_the_first_piece(tmp_path):
    ObjectStore.open(tmp_path / "s", KEY)
    assert list(tmp_path.iterdir()) == []


def test_never_begins_anew(tmp_path):
    other = KEY | {"seed": 1}
    for number, key in enumerate((KEY, other)):
        ObjectStore.open(tmp_path / "s", key).put("x", TENSORS, number)
    notes = []
    assert ObjectStore.open(tmp_path / "s", KEY, "never", notes.append).get("x") is None
    assert ObjectStore.open(tmp_path / "s", other).get("x")[1] == 1, "another run's pieces stay"
    assert len(notes) == 1
    assert "seed (1, now 0)" in notes[0]


def test_required_says_what_differs(tmp_path):
    with pytest.raises(InputDataError, match="there is none"):
        ObjectStore.open(tmp_path / "s", KEY, "required")
    ObjectStore.open(tmp_path / "s", KEY).put("x", TENSORS)
    with pytest.raises(InputDataError, match=r"[0-9a-f]{8} differs in seed \(0, now 1\); give its settings again"):
        ObjectStore.open(tmp_path / "s", KEY | {"seed": 1}, "required")
    assert ObjectStore.open(tmp_path / "s", KEY, "required").get("x") is not None
    with pytest.raises(UsageError, match="expected one of auto, required, never"):
        ObjectStore.open(tmp_path / "s", KEY, "sometimes")


def test_a_broken_piece_is_refused_where_asked(tmp_path):
    store = ObjectStore.open(tmp_path / "s", KEY)
    store.put("x", TENSORS, None)
    path = next(store.folder.glob("x.*.safetensors"))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputDataError, match=r"x\..*: expected content of SHA-256 .*, found .*delete it"):
        store.get("x", refuses_damage=True)
    assert path.is_file(), "the evidence stays"


def test_a_piece_is_never_gone_while_it_is_replaced(tmp_path, monkeypatch):
    """Killed before the new one has its name, the old one is there; killed after, the new one."""
    store = ObjectStore.open(tmp_path / "s", KEY)
    store.put("x", TENSORS, 1)
    monkeypatch.setattr("toolchain.files.store.os.replace", lambda old, new: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.put("x", TENSORS, 2)
    assert store.get("x")[1] == 1
    monkeypatch.undo()
    store.put("x", TENSORS, 2)
    assert store.get("x")[1] == 2
    assert len(list(store.folder.glob("x.*.safetensors"))) == 1
    store.put("x", TENSORS, 2)
    assert store.get("x")[1] == 2, "the same content again"


def test_a_dropped_piece_is_gone_and_others_stay(tmp_path):
    store = ObjectStore.open(tmp_path / "s", KEY)
    store.put("tune.steps", TENSORS, 1)
    store.put("tune", TENSORS, 2)
    store.drop("tune.steps")
    assert (store.get("tune.steps"), store.get("tune")[1]) == (None, 2)


@pytest.mark.parametrize("content", ["{", "[]", '{"seed": 2}'])
def test_a_damaged_key_is_refused(tmp_path, content):
    store = ObjectStore.open(tmp_path / "s", KEY)
    store.put("x", TENSORS)
    (store.folder / "key.json").write_text(content)
    for resume in ("auto", "required"):
        with pytest.raises(InputDataError, match=r"key\.json: expected a JSON object, the key that .* found"):
            ObjectStore.open(tmp_path / "s", KEY, resume)
    notes = []
    ObjectStore.open(tmp_path / "s", KEY | {"seed": 1}, note=notes.append)
    assert len(notes) == 1, "another run is told, and not stopped by it"


def test_pieces_of_one_part_are_named_and_cleared_together(tmp_path):
    store = ObjectStore.open(tmp_path / "s", KEY)
    part, other = store.under("during.round.0"), store.under("during.round.01")
    part.put("shift.layers.1", TENSORS, 1)
    other.put("shift", TENSORS, 2)
    store.put("round.0", TENSORS, 3)
    assert part.get("shift.layers.1")[1] == part.wanted("shift.layers.1")[1] == 1
    assert part.get("shift") is None
    (store.folder / "during.round.0.moved.0123.tmp").write_bytes(b"cut")
    part.clear()
    assert part.get("shift.layers.1") is None
    assert (other.get("shift")[1], store.get("round.0")[1]) == (2, 3)
    assert not list(store.folder.glob("*.tmp"))
    with pytest.raises(InputDataError, match=r"expected piece during\.round\.0\.shift\.layers\.1.*found none"):
        part.wanted("shift.layers.1")
