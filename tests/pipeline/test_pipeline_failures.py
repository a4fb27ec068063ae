"""What goes wrong while a model is calibrated: one sentence, nothing half-written, and finished work is kept."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import save_small, save_text
from torch import Tensor

import fp4
from fp4.checkpoint.io import headers
from fp4.checkpoint.io.shards import ShardWriter
from fp4.pipeline import hidden_states, skeleton
from fp4.pipeline.calibrate import BlockCalibration
from fp4.pipeline.hidden_states import HiddenStates

SETTINGS: dict[str, Any] = {"samples": 3, "seq_len": 32, "device": "cpu"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_small("llama", tmp_path / "model")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return save_text(tmp_path)


def change(model: Path, name: str, edit: Callable[[Tensor], None]) -> None:
    tensors = load_file(model / "model.safetensors")
    edit(tensors[name])
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def fail_in_block(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """``error`` is raised once, when block ``number`` is about to be quantized."""
    original = BlockCalibration._quantize
    raised: list[int] = []

    def failing(self: BlockCalibration, at: int, *arguments: Any) -> Any:
        if at == number and not raised:
            raised.append(at)
            raise error
        return original(self, at, *arguments)

    monkeypatch.setattr(BlockCalibration, "_quantize", failing)


@pytest.mark.parametrize("method", ["gptq", "best"])
def test_inputs_that_overflow_name_the_layer(method: str, model: Path, text: Path, tmp_path: Path) -> None:
    change(model, "model.layers.1.post_attention_layernorm.weight", lambda weight: weight.fill_(3e38))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.") as raised:
        fp4.quantize(model, tmp_path / "out", "nvfp4a16", method, text, **SETTINGS)
    assert "infinity" in str(raised.value)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / "block-00000.json").is_file()


@pytest.mark.parametrize("method", ["gptq", "best"])
def test_singular_hessians_are_no_failure(method: str, model: Path, text: Path, tmp_path: Path) -> None:
    """Two samples of four tokens see 8 of 64 dimensions, and half of the channels are dead."""
    change(model, "model.layers.0.input_layernorm.weight", lambda weight: weight[::2].zero_())
    few = SETTINGS | {"samples": 2, "seq_len": 4}
    report = fp4.quantize(model, tmp_path / "out", "nvfp4", method, text, **few)
    assert all(row["output_error"] < 1 for row in report["layers"])


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MemoryError("cannot allocate 5 GB"), errno.ENOMEM, r"out of memory \(cannot allocate 5 GB\)"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), errno.ENOMEM, "out of memory .*fewer samples"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), errno.ENOMEM, "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC, "disk of .* is full; make room"),
        (OSError(errno.EIO, "Input/output error"), errno.EIO, "Input/output error"),
    ],
)
def test_what_the_machine_lacks(
    error: Exception, code: int, message: str, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_in_block(monkeypatch, 1, error)
    with pytest.raises(OSError, match=message) as raised:
        fp4.quantize(model, tmp_path / "out", "nvfp4", "rtn", text, **SETTINGS)
    assert raised.value.errno == code
    assert "what is finished is kept" in str(raised.value)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / "block-00000.json").is_file()
    fp4.quantize(model, tmp_path / "out", "nvfp4", "rtn", text, **SETTINGS)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_disk_that_is_full_in_the_middle_of_a_block(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ShardWriter.write

    def failing(self: ShardWriter, name: str, tensor: Tensor) -> None:
        if "layers.1.mlp" in name:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, name, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", failing)
        with pytest.raises(OSError, match="is full"):
            fp4.quantize(model, tmp_path / "out", "nvfp4", "gptq", text, **SETTINGS)
    left = {path.name for path in (tmp_path / "out.partial").iterdir()}
    assert "block-00000.safetensors" in left
    assert not any("block-00001.safetensors" in name for name in left)
    fp4.quantize(model, tmp_path / "out", "nvfp4", "gptq", text, **SETTINGS)
    fp4.quantize(model, tmp_path / "whole", "nvfp4", "gptq", text, **SETTINGS)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert files[0] == files[1]


def test_a_shard_that_shrinks_while_it_is_read(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = (model / "model.safetensors").read_bytes()
    original = BlockCalibration._quantize

    def cutting(self: BlockCalibration, at: int, *arguments: Any) -> Any:
        result = original(self, at, *arguments)
        (model / "model.safetensors").write_bytes(whole[: len(whole) // 8])
        return result

    monkeypatch.setattr(BlockCalibration, "_quantize", cutting)
    with pytest.raises((ValueError, OSError), match=r"model\.safetensors"):
        fp4.quantize(model, tmp_path / "out", "nvfp4", "rtn", text, **SETTINGS)
    assert not (tmp_path / "out").exists()


def test_empty_data_leaves_nothing_behind(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"empty.txt holds 0 tokens"):
        fp4.quantize(model, tmp_path / "out", "nvfp4", "rtn", tmp_path / "empty.txt", **SETTINGS)
    assert not (tmp_path / "out.partial").exists()


def test_a_tokenizer_of_another_model(text: Path, tmp_path: Path) -> None:
    model = save_small("llama", tmp_path / "model", vocab_size=64)
    with pytest.raises(ValueError, match=r"the tokenizer gives token \d+, but the model knows only 64"):
        fp4.quantize(model, tmp_path / "out", "nvfp4", "rtn", text, **SETTINGS)
    assert not (tmp_path / "out").exists()


def test_a_missing_weight_is_named(model: Path, text: Path, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"no weight for model\.layers\.1\.input_layernorm\.weight"):
        fp4.quantize(model, tmp_path / "out", "nvfp4", "rtn", text, **SETTINGS)


# --- hidden states


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_hidden_states_that_do_not_fit_stay_on_disk(
    method: str,
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    kept: list[bool] = []
    original = HiddenStates.append

    def append(self: HiddenStates, value: Tensor) -> None:
        original(self, value)
        kept.append(bool(self._kept))

    monkeypatch.setattr(hidden_states.HiddenStates, "append", append)
    for name, limit in (("roomy", "4GiB"), ("tight", "16KB")):
        kept.clear()
        fp4.quantize(
            model, tmp_path / name, "nvfp4", method, text, **SETTINGS, max_memory={"cpu": limit}
        )  # fmt: skip
        assert set(kept) == {name == "roomy"}
        assert ("more than the" in caplog.text) == (name == "tight")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("roomy", "tight")]
    assert files[0] == files[1]
    request = json.loads((tmp_path / "tight" / "report.json").read_text())
    assert "max_memory" not in request  # it decides about speed, not about bytes


@pytest.mark.parametrize("architecture", ["llama-tied", "gemma", "opt"])
def test_of_the_embedding_only_the_rows_of_the_samples_are_read(
    architecture: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: list[tuple[int, ...]] = []
    original = headers.load
    for module in (headers, skeleton):
        monkeypatch.setattr(module, "load", lambda info: whole.append(info.shape) or original(info))
    model = save_small(architecture, tmp_path / "model")
    fp4.quantize(model, tmp_path / "out", "nvfp4", "rtn", text, **SETTINGS)
    assert whole
    assert (320, 64) not in whole


def test_hidden_states_come_back_as_they_were(tmp_path: Path) -> None:
    values = [torch.randn(2, 5, 8), torch.randn(1, 3, 8)]
    states = HiddenStates(tmp_path / "h", [(2, 5, 8), (1, 3, 8)], torch.float32, torch.device("cpu"), False)
    for value in values:
        assert not states.complete()
        states.append(value)
    states.close()
    assert states.complete()
    assert all(torch.equal(a, b) for a, b in zip(states, values, strict=True))
    again = HiddenStates(tmp_path / "g", [(1, 3, 8)], torch.float32, torch.device("cpu"), False)
    with pytest.raises(ValueError, match=r"\(1, 4, 8\); expected \(1, 3, 8\)"):
        again.append(torch.randn(1, 4, 8))
    states.remove()
    assert not (tmp_path / "h").exists()
