"""from_pretrained refuses damaged and contradictory checkpoints, and says which layer is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_llama
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fp4 import FPQuantConfig


def damaged(source: Path, out: Path, change: object) -> Path:
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)  # type: ignore[operator]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def saved(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "nvfp4"
    AutoModelForCausalLM.from_pretrained(llama, quantization_config=FPQuantConfig()).save_pretrained(path)
    return path


Q = "model.layers.0.self_attn.q_proj."


def _nan_scale(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q + "scales"][3, 2] = 0x7F


def _truncated(name: str) -> object:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q + name] = tensors[Q + name][:, :-1].contiguous()

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q + "scales"), "scales is missing"),
        (lambda t: t.pop(Q + "qweight"), "qweight is missing"),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith(Q)], "the checkpoint has no weight for this layer"),
        (_nan_scale, "scales hold 1 NaN or negative values"),
        (_truncated("qweight"), r"qweight is torch.uint8 \(128, 63\); the model expects torch.uint8 \(128, 64\)"),
        (_truncated("scales"), r"scales \(nvfp4\) is torch.uint8 \(128, 7\)"),
        (lambda t: t.update({Q + "qweight": t[Q + "qweight"].float()}), "qweight is torch.float32"),
        (lambda t: t[Q + "weight_global_scale"].fill_(0), "weight_global_scale is .0.0.; expected one positive"),
        (lambda t: t[Q + "act_global_scale"].fill_(float("nan")), "act_global_scale is .nan."),
    ],
)
def test_damaged_checkpoints_are_refused_by_name(change: object, message: str, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        AutoModelForCausalLM.from_pretrained(damaged(saved, tmp_path / "bad", change))
    assert "model.layers.0.self_attn.q_proj" in str(caught.value)


def test_config_that_contradicts_the_tensors(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "bad")
    path = tmp_path / "bad/config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "fp_quant", "forward_dtype": "mxfp4", "transform_init": "identity"}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"scales \(mxfp4\) is torch.uint8 \(128, 8\); the model expects"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "bad")
    config["quantization_config"]["forward_dtype"] = "int3"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="forward_dtype is 'int3'; expected one of 'nvfp4', 'mxfp4'"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "bad")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weight_that_is_not_finite_is_refused_by_name(value: float, tmp_path: Path) -> None:
    model = make_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    model.save_pretrained(tmp_path / "dense")
    remedy = "keep the layer as it is by adding 'model.layers.1.mlp.up_proj' to modules_to_not_convert"
    with pytest.raises(ValueError, match=rf"mlp\.up_proj\.weight holds 1 NaN or infinite values.*, or {remedy}"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=FPQuantConfig())
