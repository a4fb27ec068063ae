"""Files that are written: one tensor file, one text, and a folder with everything beside the weights."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fp4.checkpoint import CODECS
from fp4.checkpoint.io import publish, shards
from fp4.checkpoint.io.headers import Checkpoint, read_header
from fp4.checkpoint.io.publish import Staging
from fp4.checkpoint.io.shards import ShardWriter, Spec, spec_of

TENSORS = {
    "bytes": torch.arange(7, dtype=torch.uint8),
    "wide": torch.arange(6, dtype=torch.float64).view(2, 3),
    "half": torch.arange(5).half(),
    "none": torch.empty(0, 4),
    "one": torch.tensor(3, dtype=torch.int16),
}
SPECS = {name: spec_of(tensor) for name, tensor in TENSORS.items()}


# --- one shard


def test_a_spec_counts_bytes() -> None:
    assert Spec("BF16", (3, 5)) == spec_of(torch.zeros(3, 5, dtype=torch.bfloat16))
    assert [spec.nbytes for spec in (Spec("BF16", (3, 5)), Spec("F64", ()), Spec("U8", (4, 0)))] == [30, 8, 0]


@pytest.mark.parametrize("piece", [3, 8, 1 << 17])
def test_tensors_arrive_in_any_order_and_are_aligned(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written, or copied from another file in pieces."""
    monkeypatch.setattr(shards, "_PIECE", piece)
    save_file(TENSORS, tmp_path / "source")
    source = read_header(tmp_path / "source").tensors
    with ShardWriter(tmp_path / "out", SPECS, {"format": "pt"}) as file:
        assert not (tmp_path / "out").exists()
        for number, name in enumerate(reversed(TENSORS)):
            if number % 2:
                file.write(name, TENSORS[name])
            else:
                file.copy(name, source[name])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    found = load_file(tmp_path / "out")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    header = read_header(tmp_path / "out")
    assert header.metadata == {"format": "pt"}
    for info in header.tensors.values():
        assert info.start % TENSORS["wide"].itemsize == 0 or info.dtype != "F64"
        assert info.start % 2 == 0 or info.dtype == "U8"
    # The widest first, and by name among equals.
    assert list(header.tensors) == ["wide", "none", "half", "one", "bytes"]


def test_a_transposed_tensor_is_written_by_rows(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).view(2, 3).T
    with ShardWriter(tmp_path / "out", {"a": spec_of(tensor)}, {}) as file:
        file.write("a", tensor)
    assert torch.equal(load_file(tmp_path / "out")["a"], tensor)
    assert read_header(tmp_path / "out").metadata == {}


def test_a_file_that_is_not_as_planned_is_not_there(tmp_path: Path) -> None:
    file = ShardWriter(tmp_path / "out", SPECS, {})
    for name in ("bytes", "wide", "none"):
        file.write(name, TENSORS[name])
    with pytest.raises(RuntimeError, match="out was closed without half, one"), file:
        pass
    with pytest.raises(ValueError, match="bytes turned out as"), ShardWriter(tmp_path / "out", SPECS, {}) as file:
        file.write("bytes", TENSORS["bytes"][1:])
    with pytest.raises(ValueError, match="bytes turned out as"), ShardWriter(tmp_path / "out", SPECS, {}) as file:
        file.write("bytes", TENSORS["bytes"].to(torch.int8))
    assert list(tmp_path.iterdir()) == []


def test_a_partial_write_goes_on() -> None:
    """A file that takes five bytes at a time."""
    written = bytearray()

    def write(data: memoryview) -> int:
        written.extend(data[:5])
        return min(5, len(data))

    shards.write_all(SimpleNamespace(write=write), bytes(range(23)))
    assert bytes(written) == bytes(range(23))


# --- texts


@pytest.mark.parametrize("durable", [False, True])
def test_a_text_is_replaced_whole(durable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    publish.write_text(tmp_path / "a", "öld", durable)
    publish.write_text(tmp_path / "a", "neẅ", durable)
    assert (tmp_path / "a").read_text(encoding="utf-8") == "neẅ"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert len(flushed) == 2 * durable
    publish.write_json(tmp_path / "b", {"z": "ö", "a": [1]})
    assert (tmp_path / "b").read_text(encoding="utf-8") == '{\n  "z": "ö",\n  "a": [\n    1\n  ]\n}\n'


# --- folders


def test_what_may_not_be_made(tmp_path: Path) -> None:
    publish.refuse_existing(tmp_path / "new", False)
    publish.refuse_existing(tmp_path, True)
    with pytest.raises(ValueError, match="exists; name another folder, or replace it with"):
        publish.refuse_existing(tmp_path, False)
    (tmp_path / "file").touch()
    for overwrite in (True, False):
        with pytest.raises(ValueError, match="file is a file; name a folder"):
            publish.refuse_existing(tmp_path / "file", overwrite)


def test_room_is_what_is_free_and_what_unfinished_work_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def usage(place: Path) -> SimpleNamespace:
        asked.append(place)
        return SimpleNamespace(free=1000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    out = tmp_path / "not" / "there"
    publish.require_room(out, 1000)
    with pytest.raises(OSError, match=r"has 1e-06 GB free, and output and work files need about 1e-06 GB") as error:
        publish.require_room(out, 1001)
    assert error.value.errno == errno.ENOSPC
    assert asked == [tmp_path, tmp_path]
    (tmp_path / "not" / "there.partial" / "folder").mkdir(parents=True)
    for name, size in (("a", 30), ("b", 12)):
        (tmp_path / "not" / "there.partial" / name).write_bytes(bytes(size))
    publish.require_room(out, 1042)
    with pytest.raises(OSError, match="make room, or name a folder elsewhere"):
        publish.require_room(out, 1043)


def test_work_goes_on_where_finished_parts_are_planned_alike(tmp_path: Path) -> None:
    out, parts = tmp_path / "out", {"one.json": "1", "two.json": "2"}
    request = {"source": "a", "scheme": "x", "seed": 0}

    def begin(overwrite: bool = False, parts: dict[str, str] = parts, **changed: object) -> Staging:
        staging = Staging(out, request | changed, overwrite, parts, ("scheme",))
        staging.release()
        return staging

    first = begin()
    assert (first.resumed, first.folder, first.finished()) == (False, tmp_path / "out.partial", [])
    first.note("one.json", {"rows": [1]})
    (first.folder / "data").write_bytes(b"data")
    again = begin()
    assert (again.resumed, again.finished(), again.read("one.json")) == (True, ["one.json"], {"rows": [1]})
    assert again.read("two.json") is None
    assert begin(parts=parts | {"two.json": "3"}, scheme="y").resumed  # the second is not finished
    assert json.loads((again.folder / "request.json").read_text())["scheme"] == "y"
    with pytest.raises(ValueError, match=r"another request \(it differs in seed\)"):
        begin(parts=parts | {"two.json": "3"}, scheme="y", seed=1)
    with pytest.raises(ValueError, match=r"it differs in extra, source\)"):
        begin(parts=parts | {"two.json": "3"}, scheme="y", source="b", extra=1)
    with pytest.raises(ValueError, match="it differs in what is planned for its layers"):
        begin(parts={"one.json": "9"}, scheme="y")
    assert (again.folder / "data").exists()
    assert not begin(True, seed=1).resumed
    assert [path.name for path in sorted(again.folder.iterdir()) if path.name != "lock"] == ["request.json"]
    (again.folder / "request.json").unlink()
    assert not begin(seed=5).resumed  # nothing says what for, so nothing is lost


def test_only_what_is_named_is_published(tmp_path: Path) -> None:
    for old in (False, True):
        out = tmp_path / "out"
        staging = Staging(out, {"seed": int(old)}, old)
        for name in ("model", "note"):
            (staging.folder / name).write_text(str(old))
        (staging.folder / "more").mkdir()
        assert (out / "model").exists() is old
        staging.publish(["model"])
        assert staging.published
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert [path.name for path in out.iterdir()] == ["model"]
        assert (out / "model").read_text() == str(old)
        (out / "stale").touch()


def test_an_identity_is_of_configuration_and_files(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")

    def identity(config: str = '{"a": 1, "b": 2}') -> dict[str, object]:
        (tmp_path / "config.json").write_text(config)
        return publish.identity_of(Checkpoint.open(tmp_path))

    first = identity()
    assert first == identity('{"b": 2, "a": 1}')
    assert first["config"] != identity('{"a": 1, "b": 3}')["config"]
    status = (tmp_path / "model.safetensors").stat()
    assert first["files"] == {"model.safetensors": [status.st_size, status.st_mtime_ns]}


def test_files_beside_the_weights(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    inner = {"quantization_config": {"quant_method": "old"}, "depth": 3}
    (source / "config.json").write_text(json.dumps({"model_type": "x", "text_config": inner}))
    save_file({"a": torch.zeros(2)}, source / "model.safetensors")
    for name in ("tokenizer.json", "vocab.txt", "README.md", "LICENSE", "weights.bin", "report.json"):
        (source / name).write_text(name)
    (source / "folder.json").mkdir()
    (source / "hf_quant_config.json").write_text("{}")
    save_file({"a": torch.zeros(2), "c": torch.zeros(1)}, out / "one.safetensors")
    save_file({"b": torch.zeros(3, dtype=torch.float64)}, out / "two.safetensors")
    codec, quantization = CODECS["compressed-tensors"], {"quant_method": "compressed-tensors"}
    names = ["one.safetensors", "two.safetensors"]
    written = publish.write_companions(Checkpoint.open(source), out, names, codec, quantization, ["report.json"])
    index = "model.safetensors.index.json"
    copied = {"tokenizer.json", "vocab.txt", "README.md"}
    assert {*written} == {*names, "config.json", index} | copied
    assert {path.name for path in out.iterdir()} == {*written}
    assert (out / "vocab.txt").read_text() == "vocab.txt"
    config = json.loads((out / "config.json").read_text())
    assert config == {"model_type": "x", "text_config": {"depth": 3}, "quantization_config": quantization}
    assert json.loads((out / index).read_text()) == {
        "metadata": {"total_size": 3 * 4 + 3 * 8},
        "weight_map": {"a": names[0], "b": names[1], "c": names[0]},
    }
    # One file of the usual name needs no index.
    shutil.copy(out / names[0], out / "model.safetensors")
    written = publish.write_companions(Checkpoint.open(source), out, ["model.safetensors"], codec, quantization)
    assert index not in written
    assert "report.json" in written
