"""Bundles: what goes in comes out, and one flipped byte anywhere is noticed."""

from __future__ import annotations

import json
import os

import pytest

from toolchain.bundle import manifest as bundles
from toolchain.bundle.manifest import open_bundle, write_bundle
from toolchain.errors import InputDataError, UsageError


@pytest.fixture
def pieces(tmp_path):
    """A folder of two graphs and two single files."""
    source = tmp_path / "stages"
    (source / "portable" / "deep").mkdir(parents=True)
    (source / "portable" / "decoder.onnx").write_bytes(b"graph" * 100)
    (source / "portable" / "deep" / "decoder.onnx.data").write_bytes(os.urandom(4096))
    (source / "bitplan.json").write_text('{"layers": []}')
    (source / "empty.txt").write_text("")
    return {
        "portable": source / "portable",
        "bitplan.json": source / "bitplan.json",
        "processor/empty.txt": source / "empty.txt",
    }


@pytest.fixture
def written(pieces, tmp_path):
    return write_bundle(pieces, tmp_path / "out" / "bundle", target={"name": "x"}, created_from={"run": "r1"}).folder


def test_what_goes_in_comes_out(pieces, written):
    opened = open_bundle(written)
    expected = ("bitplan.json", "portable/decoder.onnx", "portable/deep/decoder.onnx.data", "processor/empty.txt")
    assert opened.files == expected
    assert opened.path("portable/decoder.onnx").read_bytes() == b"graph" * 100
    assert opened.bytes == 500 + 4096 + len('{"layers": []}')
    assert opened.manifest["target"] == {"name": "x"}
    assert opened.manifest["created_from"] == {"run": "r1"}
    assert opened.names_under("portable", ".onnx") == ("portable/decoder.onnx",)
    assert opened.read_json("bitplan.json") == {"layers": []}
    assert [path.name for path in written.parent.iterdir()] == ["bundle"]


def test_the_same_pieces_give_the_same_bytes(pieces, written, tmp_path):
    again = write_bundle(pieces, tmp_path / "again", target={"name": "x"}, created_from={"run": "r1"}).folder
    assert (again / "manifest.json").read_bytes() == (written / "manifest.json").read_bytes()


def test_one_flipped_bit_in_any_file_is_noticed(written):
    names = [path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file()]
    assert len(names) == 5
    for name in names:
        path = written / name
        content = path.read_bytes()
        for place in {0, len(content) // 2, len(content) - 1} if content else ():
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(InputDataError, match=r"copy the bundle again|mgvq bundle") as caught:
                open_bundle(written)
            assert name in str(caught.value)
        path.write_bytes(content)
    open_bundle(written)


def test_the_message_has_both_hashes(written):
    path = written / "bitplan.json"
    path.write_text('{"layers": {}}')
    with pytest.raises(InputDataError, match=r"bundle file bitplan.json: expected hash \w{12}, found \w{12}; copy"):
        open_bundle(written)


def test_every_bit_of_the_manifest_counts(written):
    path = written / "manifest.json"
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(InputDataError):
            open_bundle(written)


def test_missing_unlisted_and_shortened_files_are_named(written):
    target = written / "bitplan.json"
    content = target.read_bytes()
    target.write_bytes(content[:-1])
    with pytest.raises(InputDataError, match=r"bitplan.json: expected 14 bytes, found 13"):
        open_bundle(written)
    target.unlink()
    with pytest.raises(InputDataError, match=r"bitplan.json is missing"):
        open_bundle(written)
    target.write_bytes(content)
    (written / "portable" / "stray.onnx").write_bytes(b"")
    with pytest.raises(InputDataError, match=r"portable/stray.onnx is not listed"):
        open_bundle(written)


def test_a_folder_that_is_no_bundle(tmp_path):
    with pytest.raises(InputDataError, match=r"expected a bundle folder with manifest.json"):
        open_bundle(tmp_path / "nowhere")
    (tmp_path / "manifest.json").write_text('{"files": {}}')
    with pytest.raises(InputDataError, match="is not a bundle's manifest"):
        open_bundle(tmp_path)


def test_a_newer_format_says_what_to_install(written):
    path = written / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    with pytest.raises(InputDataError, match="format version 1 expected, 99 found; install"):
        open_bundle(written)


def test_manifest_may_not_name_files_outside(written):
    path = written / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../secret"] = {"sha256": "0", "bytes": 1}
    content = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    path.write_text(json.dumps(content | {"manifest_sha256": bundles._manifest_hash(content)}))
    with pytest.raises(InputDataError, match=r"'../secret': expected a path inside the bundle"):
        open_bundle(written)


@pytest.mark.parametrize("name", ["/etc/x", "a/../../b", "manifest.json", ""])
def test_pieces_stay_inside(pieces, tmp_path, name):
    with pytest.raises(InputDataError, match="expected a path inside the bundle"):
        write_bundle({name: pieces["bitplan.json"]}, tmp_path / "b")


def test_a_missing_or_doubled_piece_leaves_nothing(pieces, tmp_path):
    out = tmp_path / "none" / "b"
    with pytest.raises(InputDataError, match="does not exist; run the stage"):
        write_bundle({"a": tmp_path / "nowhere"}, out)
    with pytest.raises(InputDataError, match="given twice"):
        write_bundle({**pieces, "portable/decoder.onnx": pieces["bitplan.json"]}, out)
    assert not out.parent.exists()


def test_output_on_or_under_a_file_is_refused(pieces, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "bundle"):
        with pytest.raises(UsageError, match="choose"):
            write_bundle(pieces, out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not a bundle"):
        write_bundle(pieces, tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_an_older_bundle_is_replaced_whole(pieces, written):
    write_bundle({"only.json": pieces["bitplan.json"]}, written)
    assert open_bundle(written).files == ("only.json",)
    assert [path.name for path in written.parent.iterdir()] == ["bundle"]


def test_a_failed_copy_keeps_the_older_bundle(pieces, written, monkeypatch):
    def broken(source, place):
        raise OSError("disk full")

    monkeypatch.setattr(bundles.shutil, "copyfile", broken)
    with pytest.raises(OSError, match="disk full"):
        write_bundle({"only.json": pieces["bitplan.json"]}, written)
    assert "portable/decoder.onnx" in open_bundle(written).files
    assert [path.name for path in written.parent.iterdir()] == ["bundle"]
