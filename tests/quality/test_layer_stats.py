"""Statistics of one rounded weight, against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fp4.numerics.formats import FP8, MXFP4, NVFP4, Format, QuantizedTensor, dequantize, quantize
from fp4.numerics.rotation import hadamard, rotate
from fp4.quality import layer_statistics as layer_stats
from fp4.quality.layer_statistics import layer_statistics


def test_a_weight_on_the_grid_loses_nothing() -> None:
    weight = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6] * 4)[None]
    found = layer_statistics(weight, quantize(weight, MXFP4))
    assert found == (0.0, None, 0.0, 4 / 32)


def test_errors_and_clipping_by_hand() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :3] = torch.tensor([8.0, 0.2, -1.0])
    one = torch.full((1, 1), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)  # a block scale of 1
    codes = torch.zeros(1, 16, dtype=torch.uint8)
    codes[0, 0], codes[0, 1] = 7, 10  # 6, 0, -1
    found = layer_statistics(weight, QuantizedTensor(codes, one, None, MXFP4))
    error = math.sqrt((4 + 0.04) / (64 + 0.04 + 1))
    assert found.weight_error == pytest.approx(error, rel=1e-6)
    assert found.weight_snr_db == pytest.approx(-20 * math.log10(error), rel=1e-6)
    assert (found.clipped, found.zero) == (1 / 32, 30 / 32)


@pytest.mark.parametrize("fmt", [NVFP4, MXFP4, FP8])
def test_tiles_stacks_and_rotations(fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(3, 10, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    rotation = hadamard(32).float()
    rotated = rotate(weight, rotation)
    quantized = quantize(rotated, fmt)
    whole = layer_statistics(weight, quantized, rotation)
    error = (dequantize(*quantized) - rotated).norm() / rotated.norm()
    assert whole.weight_error == pytest.approx(error.item(), rel=1e-5)
    monkeypatch.setattr(layer_stats, "_TILE_ELEMENTS", 200)
    assert layer_statistics(weight, quantized, rotation) == pytest.approx(whole, rel=1e-6)


def test_zeros_and_wrong_shapes() -> None:
    weight = torch.zeros(4, 32)
    assert layer_statistics(weight, quantize(weight, NVFP4)) == (0.0, None, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"the weight is \(4, 64\), but its quantized form \(4, 32\)"):
        layer_statistics(torch.zeros(4, 64), quantize(weight, NVFP4))
