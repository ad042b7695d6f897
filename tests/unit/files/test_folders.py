from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from toolchain.checkpoint.folder import open_checkpoint, read_header
from toolchain.errors import InputDataError, UsageError
from toolchain.files.folders import check_output, staged_folder


@pytest.fixture
def checkpoint(tiny_qwen2_vl, tmp_path):
    return shutil.copytree(tiny_qwen2_vl, tmp_path / "checkpoint")


def cut(path, count):
    os.truncate(path, path.stat().st_size - count)


def test_a_whole_checkpoint_opens(checkpoint):
    found = open_checkpoint(checkpoint)
    assert found.config["model_type"] == "qwen2_vl"
    assert not found.is_quantized
    embedding = next(info for name, info in found.tensors.items() if name.endswith("embed_tokens.weight"))
    assert (embedding.dtype, embedding.shape, embedding.elements) == ("F16", (512, 64), 512 * 64)
    names = {path.name for path in found.side_files()}
    assert {"tokenizer.json", "chat_template.jinja", "preprocessor_config.json", "generation_config.json"} <= names
    assert "config.json" not in names


@pytest.mark.parametrize("lost", [1, 1000])
def test_a_truncated_file_is_refused(checkpoint, lost):
    cut(checkpoint / "model.safetensors", lost)
    with pytest.raises(InputDataError, match=r"model\.safetensors: truncated, expected \d+ bytes, found \d+"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize("length", [0, 5, 40])
def test_a_file_cut_inside_its_header_is_refused(checkpoint, length):
    os.truncate(checkpoint / "model.safetensors", length)
    with pytest.raises(InputDataError, match="truncated or not safetensors"):
        open_checkpoint(checkpoint)


def test_a_longer_file_is_refused(checkpoint):
    with (checkpoint / "model.safetensors").open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(InputDataError, match="longer than its header says"):
        open_checkpoint(checkpoint)


def test_a_broken_header_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes((10).to_bytes(8, "little") + b"{not json}")
    with pytest.raises(InputDataError, match="broken safetensors header"):
        read_header(path)
    header = json.dumps({"x": {"dtype": "F16", "shape": [3], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"0000")
    with pytest.raises(InputDataError, match="gives x another size than its shape"):
        read_header(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: shutil.rmtree(f), "does not exist"),
        (lambda f: (f / "config.json").unlink(), r"config\.json does not exist"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json: not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), r"config\.json: expected a JSON object"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    ],
)
def test_missing_and_broken_files_are_refused(checkpoint, change, message):
    change(checkpoint)
    with pytest.raises(InputDataError, match=message):
        open_checkpoint(checkpoint)


def test_every_shard_must_be_there(checkpoint):
    names = list(read_header(checkpoint / "model.safetensors"))
    (checkpoint / "model.safetensors").rename(checkpoint / "model-1.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-1.safetensors")}
    path = checkpoint / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    assert set(open_checkpoint(checkpoint).tensors) == set(names)
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {"x": "model-2.safetensors"}}))
    with pytest.raises(InputDataError, match=r"shard model-2\.safetensors .* is missing"):
        open_checkpoint(checkpoint)
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {"x": "model-1.safetensors"}}))
    with pytest.raises(InputDataError, match="names x, which no shard holds"):
        open_checkpoint(checkpoint)


def test_a_staged_folder_appears_whole(tmp_path):
    out = tmp_path / "new" / "out"
    with staged_folder(out) as staging:
        (staging / "file").write_text("x")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["file"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_failed_staged_folder_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), staged_folder(tmp_path / "out") as staging:
        (staging / "file").write_text(str(1 / 0))
    assert list(tmp_path.iterdir()) == []


def test_outputs_in_use_are_refused_untouched(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, message in (("file", "is a file"), ("full", "not empty"), ("file/out", "file is a file")):
        with pytest.raises(UsageError, match=message):
            check_output(tmp_path / name)
    # Nothing can be made in /proc, whoever asks: an output that cannot be written is refused before any work.
    with pytest.raises(UsageError, match=r"/proc cannot be written to \(.+\); name a folder"):
        check_output(Path("/proc/new/out"))
    with pytest.raises(UsageError), staged_folder(tmp_path / "full"):
        pass
    assert (tmp_path / "full" / "file").read_text() == "x"
    with staged_folder(tmp_path / "empty") as staging:
        (staging / "file").write_text("x")
    assert (tmp_path / "empty" / "file").exists()
