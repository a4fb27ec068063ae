"""Quantization-aware training with master weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import train
from transformers import AutoModelForCausalLM

from fp4 import MXFP4, NVFP4, FPQuantConfig, dequantize
from fp4.nn import FP4Linear, FP4MasterLinear
from fp4.nn.straight_through import fake_quantize
from fp4.numerics.formats import quantize
from fp4.scheme import Scheme


def test_forward_values_are_the_quantized_ones_and_gradients_go_straight_through() -> None:
    x = torch.randn(8, 64, requires_grad=True)
    values = fake_quantize(x, NVFP4, "abs_max")
    assert torch.equal(values, dequantize(*quantize(x.detach(), NVFP4)))
    values.backward(torch.ones_like(values))
    assert x.grad is not None
    inside = x.grad
    assert set(inside.unique().tolist()) <= {0.0, 1.0}
    assert inside.mean() > 0.9


def test_clipped_values_get_no_gradient() -> None:
    x = torch.full((1, 32), 0.1)
    x[0, 7] = 50.0
    x.requires_grad_()
    fake_quantize(x, MXFP4, "quest").sum().backward()
    assert x.grad is not None
    assert x.grad[0, 7] == 0
    assert x.grad.sum() == 31


@pytest.mark.parametrize("rotation", ["identity", "hadamard"])
@pytest.mark.parametrize("activations", ["fp4", "model"])
def test_master_layer_computes_what_the_packed_layer_computes(rotation: str, activations: str) -> None:
    scheme = Scheme(MXFP4, "abs_max", activations, "abs_max", rotation, 32)  # type: ignore[arg-type]
    master = FP4MasterLinear(64, 48, True, scheme, torch.float32)
    dense = torch.nn.Linear(64, 48)
    dense.load_state_dict(master.state_dict())
    packed = FP4Linear.from_linear(dense, scheme, backend="reference")
    x = torch.randn(2, 5, 64)
    torch.testing.assert_close(master(x), packed(x), rtol=1e-5, atol=1e-5)


def test_a_model_trains_saves_its_master_weights_and_is_then_packed(
    llama: Path, token_ids: torch.Tensor, tmp_path: Path
) -> None:
    config = FPQuantConfig("mxfp4", forward_method="quest", store_master_weights=True)
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config, dtype=torch.float32)
    assert model.hf_quantizer.is_trainable
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    losses = train(model, optimizer, token_ids)
    assert losses[-1] < losses[0] - 0.5
    model.eval().save_pretrained(tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(reloaded(token_ids).logits, model(token_ids).logits)
    assert torch.equal(reloaded.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)


def test_low_precision_gradients_are_refused() -> None:
    with pytest.raises(ValueError, match="backward_dtype is 'mxfp8'; use 'bf16' with store_master_weights"):
        FPQuantConfig("mxfp4", backward_dtype="mxfp8", store_master_weights=True)
