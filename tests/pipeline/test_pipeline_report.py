"""The errors that report.json states, worked out from the tensors that were written."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from naive import decoded
from safetensors.torch import load_file
from small_models import save_small, save_text, tokenizer

import fp4
from fp4.calibration.data import load_samples
from fp4.numerics.formats import NVFP4


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_errors_are_relative_and_no_squares(tmp_path: Path) -> None:
    """Of the first layers, which read the normalised embedding of the samples."""
    model, text = save_small("llama", tmp_path / "model"), save_text(tmp_path)
    report = fp4.quantize(model, tmp_path / "out", "nvfp4a16", "gptq", text, samples=2, seq_len=32, device="cpu")
    rows = {row["name"]: row for row in report["layers"]}
    dense, packed = tensors_of(model), tensors_of(tmp_path / "out")
    read = torch.cat(load_samples(text, tokenizer(), 2, 32).tokens)
    x = dense["model.embed_tokens.weight"].double()[read]
    x = x / (x.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
    x = x * dense["model.layers.0.input_layernorm.weight"].double()
    for part in "qkv":
        name = f"model.layers.0.self_attn.{part}_proj"
        weight = dense[f"{name}.weight"].double()
        codes, scales = packed[f"{name}.weight_packed"], packed[f"{name}.weight_scale"]
        values, steps = decoded(codes, scales, 1 / packed[f"{name}.weight_global_scale"].double(), NVFP4, "nvfp4")
        error = values * steps - weight
        output = math.sqrt(float((x @ error.T).square().sum() / (x @ weight.T).square().sum()))
        assert rows[name]["output_error"] == pytest.approx(output, rel=1e-4)
        ratio = float(weight.square().sum() / error.square().sum())
        assert rows[name]["weight_snr_db"] == pytest.approx(10 * math.log10(ratio), rel=1e-4)
        assert rows[name]["zero"] == float((values == 0).double().mean())
