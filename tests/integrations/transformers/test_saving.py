"""save_pretrained of a packed model: a folder holds all of it, or what it held before."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from fp4 import FPQuantConfig


@pytest.fixture(scope="module")
def model(llama: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(llama, quantization_config=FPQuantConfig())


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def failing_replace(monkeypatch: pytest.MonkeyPatch, fails: set[int]) -> list[int]:
    """Makes the n-th os.replace of the last stage fail for every n in ``fails``; the list gets what was called."""
    real, calls = os.replace, []

    def replace(source: str | Path, target: str | Path) -> None:
        if Path(target).name.endswith(".json") and ".partial" in Path(source).name:
            return real(source, target)  # a JSON file gets its name
        calls.append(len(calls) + 1)
        if calls[-1] in fails:
            raise OSError(5, "Input/output error")
        return real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    return calls


def test_every_failing_step_of_the_last_stage_is_taken_back(model: PreTrainedModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    model.save_pretrained(out)
    (out / "model-00001-of-00002.safetensors").write_bytes(b"of a model saved here before")
    (out / "notes.txt").write_text("mine")
    before = content(out)
    with pytest.MonkeyPatch.context() as patch:
        calls = failing_replace(patch, set())
        model.save_pretrained(tmp_path / "count")
        steps = 2 * len(calls) + 1  # every file out of the way and in, and the shard that is left over
    for step in range(1, steps + 1):
        with pytest.MonkeyPatch.context() as patch:
            failing_replace(patch, {step})
            with pytest.raises(OSError, match="Input/output error; nothing there was changed"):
                model.save_pretrained(out)
        assert content(out) == before
        assert sorted(os.listdir(tmp_path)) == ["count", "out"]
    with pytest.MonkeyPatch.context() as patch:
        failing_replace(patch, {2})
        with pytest.raises(OSError, match="nothing there was changed"):
            model.save_pretrained(tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["count", "out"]

    model.save_pretrained(out)
    after = content(out)
    assert "model-00001-of-00002.safetensors" not in after
    assert after["notes.txt"] == b"mine"
    assert after["model.safetensors"] == before["model.safetensors"]


def test_what_cannot_be_put_back_is_kept_and_named(model: PreTrainedModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    model.save_pretrained(out)
    before = content(out)
    with pytest.MonkeyPatch.context() as patch:
        failing_replace(patch, set(range(3, 100)))
        with pytest.raises(OSError, match=r"out is incomplete: saving failed .* it is in .*\.out\.before\.") as caught:
            model.save_pretrained(out)
    kept = Path(str(caught.value).rpartition("it is in ")[2])
    assert before == content(out) | content(kept)


def test_disk_full_while_saving_changes_nothing(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path / "out")
    before = content(tmp_path / "out")

    def half_written(tensors: object, filename: str, **kwargs: object) -> None:
        Path(filename).write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", half_written)
    for target in ("out", "new"):
        with pytest.raises(OSError, match="No space left on device; nothing there was changed"):
            model.save_pretrained(tmp_path / target)
    assert content(tmp_path / "out") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_variant_replaces_itself_and_nothing_else(model: PreTrainedModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    model.save_pretrained(out)
    model.save_pretrained(out, variant="small", max_shard_size="100KB")
    model.save_pretrained(out, variant="small")
    weights = {path.name for path in out.iterdir()} - {"config.json", "generation_config.json"}
    assert weights == {"model.safetensors", "model.small.safetensors"}
    AutoModelForCausalLM.from_pretrained(out, variant="small")
