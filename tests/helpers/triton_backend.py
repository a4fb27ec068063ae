"""The Triton backend under test: where it runs, and weights for it."""

from __future__ import annotations

import functools
import importlib.util
import os

import products
import pytest
import torch
from torch import Tensor

from fp4.backends import BACKENDS
from fp4.numerics.formats import MXFP4, NVFP4, Format, QuantizedTensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
runs_here = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not (INTERPRETED or torch.cuda.is_available()),
    reason="needs Triton, and either a CUDA GPU or TRITON_INTERPRET=1",
)

DEVICE = "cpu" if INTERPRETED else "cuda"
BACKEND = BACKENDS["triton"]
RULES = [(fmt, rule) for fmt in (NVFP4, MXFP4) for rule in fmt.rules]
FORMAT = pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=lambda fmt: fmt.name)

assert_product = functools.partial(products.assert_product, tiny=products.TINY_ON_GPU)


def random_weight(fmt: Format, *shape: int) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(sum(shape))
    codes = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8, generator=generator)
    low, high = (0, 127) if fmt == NVFP4 else (110, 135)
    scales = torch.randint(low, high, (*shape[:-1], shape[-1] // fmt.block_size), generator=generator)
    unit = torch.rand(shape[:-2], dtype=torch.float64, generator=generator) * 0.001 + 1e-4
    return QuantizedTensor(codes, scales.to(torch.uint8).view(fmt.scale_dtype), unit, fmt)


def packed(weight: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor | None, str]:
    return *BACKEND.pack(weight.codes, weight.scales, weight.format), weight.global_scale, weight.format.name
