"""Weights that a block keeps in half precision while it computes in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import save_small, save_text
from torch import nn

import fp4
from fp4.methods import METHODS
from fp4.pipeline import calibrate
from fp4.pipeline.half_precision import computed_wide, halve


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_halved_layer_computes_the_same(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(32, 16), torch.randn(5, 32)
    linear.weight.data = linear.weight.data.to(dtype).float()
    wide = linear(x)
    halve(linear.weight, dtype)
    assert linear.weight.dtype is dtype
    with computed_wide([linear]):
        assert torch.equal(linear(x), wide)
    assert type(linear) is nn.Linear


def test_what_half_precision_cannot_hold_stays_wide() -> None:
    linear = nn.Linear(32, 16)
    linear.weight.data[3, 5] = 1 + 2**-20
    halve(linear.weight, torch.bfloat16)
    assert linear.weight.dtype is torch.float32


def test_stacks_of_experts_are_halved_whole() -> None:
    stack = nn.Parameter(torch.randn(3, 4, 32).bfloat16().float())
    halve(stack, torch.bfloat16)
    assert stack.dtype is torch.bfloat16


@pytest.mark.parametrize("method", list(METHODS))
def test_bytes_do_not_depend_on_it(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = save_small("qwen2", tmp_path / "model"), save_text(tmp_path)
    options: dict[str, Any] = {"samples": 3, "seq_len": 32, "device": "cpu"}
    if method == "autoround":
        options["options"] = {"iters": 3}
    held: set[torch.dtype] = set()
    original = calibrate.computed_wide

    def observed(linears: list[nn.Linear]) -> AbstractContextManager[None]:
        held.update(linear.weight.dtype for linear in linears)
        return original(linears)

    monkeypatch.setattr(calibrate, "computed_wide", observed)
    fp4.quantize(model, tmp_path / "half", "nvfp4", method, text, **options)
    assert held == {torch.bfloat16}
    monkeypatch.setattr(calibrate, "halve", lambda parameter, stored: None)
    held.clear()
    fp4.quantize(model, tmp_path / "wide", "nvfp4", method, text, **options)
    assert held == {torch.float32}
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("half", "wide")]
    assert files[0] == files[1]
