"""Damaged and hostile checkpoints, in every command that reads one: a clear error, no code run, nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

import fp4
from fp4 import FPQuantConfig
from fp4.convert import convert
from fp4.inspection import inspect

COMMANDS: dict[str, Callable[[Path, Path], Any]] = {
    "inspect": lambda source, out: inspect(source, values=True),
    "convert": lambda source, out: convert(source, out, "modelopt"),
    "quantize": lambda source, out: fp4.quantize(source, out, "nvfp4a16", "rtn", rule="abs_max"),
    "from_pretrained": lambda source, out: AutoModelForCausalLM.from_pretrained(source),
}


@pytest.fixture(scope="module")
def sources(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What each command reads: a packed checkpoint, or for `fp4 quantize` a dense one."""
    packed = tmp_path_factory.mktemp("packed")
    config = FPQuantConfig(scheme="nvfp4a16", checkpoint_format="compressed-tensors")
    AutoModelForCausalLM.from_pretrained(llama, quantization_config=config).save_pretrained(packed)
    return {name: llama if name == "quantize" else packed for name in COMMANDS}


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)


def index_of_nothing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def absurd_shape(folder: Path) -> None:
    header = {"model.norm.weight": {"dtype": "BF16", "shape": [1 << 61, 1 << 61], "data_offsets": [0, 2]}}
    raw = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + b"ab")


def pickled_as_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(folder.parent / "exploded")))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Bomb(folder.parent / "exploded")}, folder / "pytorch_model.bin")


def no_config(folder: Path) -> None:
    (folder / "config.json").write_text("[")


@pytest.mark.parametrize("damage", [cut, index_of_nothing, absurd_shape, pickled_as_safetensors, pickled, no_config])
@pytest.mark.parametrize("command", COMMANDS)
def test_refused(command: str, damage: Callable[[Path], None], sources: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(sources[command], folder)
    damage(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    # Transformers reads the weights in from_pretrained; what goes wrong there is its own to say.
    errors = (ValueError, OSError, SafetensorError, pickle.UnpicklingError)
    with pytest.raises(errors if command == "from_pretrained" else ValueError) as caught:
        COMMANDS[command](folder, tmp_path / "out")
    assert str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]  # no output, and nothing has exploded
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("command", ["inspect", "convert", "quantize"])
def test_index_that_leads_out_of_the_folder(command: str, sources: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(sources[command], folder)
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="expected the name of a safetensors file beside it"):
        COMMANDS[command](folder, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"bad", "outside.safetensors"}
