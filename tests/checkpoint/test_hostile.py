"""Damaged and hostile checkpoints, in every command that reads one: a clear error, no code run, nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from shards import sharded
from transformers import AutoModelForCausalLM

import fp4
from fp4 import FPQuantConfig
from fp4.checkpoint.convert import convert
from fp4.checkpoint.inspect import inspect
from fp4.checkpoint.io.headers import INDEX_NAME, Checkpoint


def load_packed(source: Path, out: Path) -> object:
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)


def load_dense(source: Path, out: Path) -> object:
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=FPQuantConfig(), dtype=torch.bfloat16)


COMMANDS: dict[str, Callable[[Path, Path], Any]] = {
    "inspect": lambda source, out: inspect(source, values=True),
    "convert": lambda source, out: convert(source, out, "modelopt"),
    "quantize": lambda source, out: fp4.quantize(source, out, "nvfp4a16", "rtn", rule="abs_max"),
    "from_pretrained": load_packed,
    "from_pretrained, quantizing": load_dense,
}
DENSE = ("quantize", "from_pretrained, quantizing")

# A dense model is read by Transformers alone, and so is config.json; what goes wrong there is its own to say.
TRANSFORMERS = (ValueError, OSError, SafetensorError, pickle.UnpicklingError)


@pytest.fixture(scope="module")
def sources(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What each command reads: a packed checkpoint, or a dense one to quantize."""
    packed = tmp_path_factory.mktemp("packed")
    config = FPQuantConfig(scheme="nvfp4a16", checkpoint_format="compressed-tensors")
    AutoModelForCausalLM.from_pretrained(llama, quantization_config=config).save_pretrained(packed)
    return {name: llama if name in DENSE else packed for name in COMMANDS}


@pytest.fixture
def bad(request: pytest.FixtureRequest, sources: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to be damaged of what the test's command reads (of a packed checkpoint, where it names none)."""
    command = getattr(request.node, "callspec", None) and request.node.callspec.params.get("command")
    folder = tmp_path / "bad"
    shutil.copytree(sources[command or "convert"], folder)
    return folder


def refused(command: str, folder: Path, message: str = ".", errors: Any = ValueError) -> None:
    """The command fails with one of ``errors``, changes nothing and leaves nothing behind."""
    root = folder.parent
    before = {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
    with pytest.raises(errors, match=message):
        COMMANDS[command](folder, root / "out")
    assert {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()} == before
    assert not (root / "exploded").exists()
    assert not (root / "out").exists()


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def test_the_bomb_explodes(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").exists()


# --- every command ---------------------------------------------------------------------------------------------------


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)


def cut_short(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5)


def index_of_nothing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / INDEX_NAME).write_text(json.dumps(index))


def absurd_shape(folder: Path) -> None:
    header = {"model.norm.weight": {"dtype": "BF16", "shape": [1 << 61, 1 << 61], "data_offsets": [0, 2]}}
    raw = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + b"ab")


def absurd_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)


def pickled_as_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(folder.parent / "exploded")))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Bomb(folder.parent / "exploded")}, folder / "pytorch_model.bin")


def pickled_shards(folder: Path) -> None:
    pickled(folder)
    os.replace(folder / "pytorch_model.bin", folder / "shard.bin")
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": "shard.bin"}}))


DAMAGES = [
    cut,
    cut_short,
    index_of_nothing,
    absurd_shape,
    absurd_header,
    pickled_as_safetensors,
    pickled,
    pickled_shards,
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", COMMANDS)
def test_damaged_weights(command: str, damage: Callable[[Path], None], bad: Path) -> None:
    damage(bad)
    refused(command, bad, errors=TRANSFORMERS if command == "from_pretrained, quantizing" else ValueError)


@pytest.mark.parametrize("content", ["", "[", "\xff"])
@pytest.mark.parametrize("command", COMMANDS)
def test_damaged_configuration(command: str, content: str, bad: Path) -> None:
    (bad / "config.json").write_text(content, encoding="latin-1")
    refused(command, bad, errors=TRANSFORMERS if "from_pretrained" in command else ValueError)


@pytest.mark.parametrize("name", ["../outside.safetensors", "{root}/outside.safetensors"])
@pytest.mark.parametrize("command", COMMANDS)
def test_index_that_leads_out_of_the_folder(command: str, name: str, bad: Path) -> None:
    """The file is there, and a complete shard: that it is not beside the index is all that is wrong with it."""
    (bad / "model.safetensors").rename(bad.parent / "outside.safetensors")
    names = load_file(bad.parent / "outside.safetensors")
    weight_map = dict.fromkeys(names, name.format(root=bad.parent))
    (bad / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    lies_outside = "from_pretrained" in command
    refused(command, bad, "lies outside that folder" if lies_outside else "the name of a safetensors file beside it")


def test_pickles_that_transformers_is_told_to_trust(bad: Path) -> None:
    """With weights_only=False it would unpickle the first file to find out its dtype, where config.json names none."""
    pickled(bad)
    described = json.loads((bad / "config.json").read_text())
    described.pop("dtype")
    (bad / "config.json").write_text(json.dumps(described))
    for options, error in (({}, pickle.UnpicklingError), ({"weights_only": False}, ValueError)):
        with pytest.raises(error, match=r"(?i)weights.only"):
            AutoModelForCausalLM.from_pretrained(bad, **options)
        assert not (bad.parent / "exploded").exists()


# --- what convert says -----------------------------------------------------------------------------------------------


def test_truncated_shard(bad: Path) -> None:
    cut(bad)
    refused("convert", bad, "model.safetensors is truncated")
    cut_short(bad)
    refused("convert", bad, "no complete safetensors file: 5 bytes")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../../etc/passwd.safetensors", "expected the name of a safetensors file beside it"),
        ("/etc/passwd", "expected the name of a safetensors file beside it"),
        ("..\\x.safetensors", "expected the name"),
        ("pytorch_model.bin", "expected the name"),
        ("model-00009.safetensors", "names model-00009.safetensors, which is missing"),
        (7, "no weight_map"),
    ],
)
def test_hostile_index(file: object, message: str, bad: Path) -> None:
    (bad / INDEX_NAME).write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    refused("convert", bad, message)


def test_index_that_names_another_shard(sources: dict[str, Path], tmp_path: Path) -> None:
    folder = sharded(sources["convert"], tmp_path / "bad")
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00003.safetensors"
    index["weight_map"]["lm_head.weight"] = "model-00002-of-00003.safetensors"
    (folder / INDEX_NAME).write_text(json.dumps(index))
    refused("convert", folder, "says that .* is in model-0000[12]-of-00003.safetensors, but it is not")


def test_pickles_are_not_read(bad: Path) -> None:
    pickled(bad)
    refused("convert", bad, "pytorch_model.bin is a pickle, which is never read")
    os.replace(bad / "pytorch_model.bin", bad / "model.safetensors")
    refused("convert", bad, "it looks like a pickle, which is never read")


CODES = "model.layers.0.self_attn.q_proj.weight_packed"


def _set(**changes: object) -> Callable[[dict[str, object]], object]:
    def change(header: dict[str, object]) -> None:
        header[CODES] = {**header[CODES], **changes}  # type: ignore[dict-item]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set(dtype="I8"), "weight_packed is torch.int8"),
        (_set(dtype="F4X"), "dtype 'F4X'"),
        (_set(shape=[1 << 61, 1 << 61]), "needs .* bytes, but has 8192"),
        (_set(shape=[-128, -64]), "expected whole numbers"),
        (_set(shape=[1 << 60] * 100_000), "at most 64 axes"),
        (_set(shape=[64, 128]), "weight_scale"),
        (_set(shape=[8192]), "expected a matrix"),
        (_set(data_offsets=[0, 8192]), "gap or overlap"),
        (_set(data_offsets=[1.5, 2]), "expected whole numbers"),
        (_set(data_offsets="ab"), "expected whole numbers"),
        (_set(data_offsets=[0]), "expected dtype, shape, offsets"),
        (lambda header: header.update({"x": 3}), "x is 3; expected dtype, shape, offsets"),
        (lambda header: b"[]", "a header that is list"),
        (lambda header: b"{" * 10000, "no valid JSON"),
        (lambda header: b'{"a":1,"a":2}', "a name occurs twice"),
    ],
)
def test_hostile_header(change: Callable[[dict[str, object]], object], message: str, bad: Path) -> None:
    path = bad / "model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    changed = change(header) or header
    encoded = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + raw[8 + length :])
    refused("convert", bad, message)


def test_damaged_scales_are_found_while_writing(bad: Path) -> None:
    tensors = load_file(bad / "model.safetensors")
    tensors[CODES.replace("packed", "scale")].view(torch.uint8)[3, 2] = 0x7F
    save_file(tensors, bad / "model.safetensors", {"format": "pt"})
    refused("convert", bad, "model.layers.0.self_attn.q_proj: weight_scale: scales hold 1 NaN")


@pytest.mark.parametrize("content", ["[]", '{"quantization_config": 3}', '{"quantization_config": {}}'])
def test_hostile_quantization_config(content: str, bad: Path) -> None:
    (bad / "config.json").write_text(content)
    refused("convert", bad, "config.json|quantization_config|quant_method")


# --- fuzzed ----------------------------------------------------------------------------------------------------------


def fuzz(raw: bytearray, limit: int, rng: random.Random) -> None:
    """Flip, cut out and repeat bytes among the first ``limit``."""
    for _ in range(rng.randint(1, 4)):
        position, kind = rng.randrange(min(limit, len(raw))), rng.randrange(3)
        if kind == 0:
            raw[position] = rng.randrange(256)
        elif kind == 1:
            del raw[position : position + rng.randint(1, 40)]
        else:
            raw[position:position] = raw[position : position + rng.randint(1, 40)]


@pytest.mark.parametrize(
    ("command", "rounds"),
    [
        ("inspect", 150),
        ("convert", 150),
        ("quantize", 40),
        ("from_pretrained", 60),
        ("from_pretrained, quantizing", 40),
    ],
)
def test_fuzzed_files_end_in_a_clear_error_or_in_a_model(
    command: str, rounds: int, sources: dict[str, Path], tmp_path: Path
) -> None:
    """Bytes of the headers and of the index; of config.json too where no model of Transformers' is built from it."""
    source = sharded(sources[command], tmp_path / "source", 2)
    kinds = (".json", ".safetensors") if command in ("inspect", "convert") else (".index.json", ".safetensors")
    rng = random.Random(0)
    outcomes = {"refused": 0, "accepted": 0}
    for _ in range(rounds):
        folder = tmp_path / "bad"
        folder.mkdir()
        for path in source.iterdir():
            os.link(path, folder / path.name)
        victim = rng.choice([path for path in sorted(folder.iterdir()) if path.name.endswith(kinds)])
        raw = bytearray(victim.read_bytes())
        fuzz(raw, 8 + int.from_bytes(raw[:8], "little") if victim.suffix == ".safetensors" else len(raw), rng)
        victim.unlink()
        victim.write_bytes(raw)
        errors = TRANSFORMERS if command == "from_pretrained, quantizing" else (ValueError,)
        try:
            COMMANDS[command](folder, tmp_path / "out")
            outcomes["accepted"] += 1
            if (tmp_path / "out").exists():
                Checkpoint.open(tmp_path / "out")
        except errors:
            outcomes["refused"] += 1
            assert not list(tmp_path.glob("*out*")) + list(tmp_path.glob(".*out*"))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.rmtree(folder)
    assert outcomes["refused"] > rounds // 10, outcomes
    assert outcomes["accepted"] > 10 or rounds < 100, outcomes
