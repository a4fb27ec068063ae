"""Fake quantization for training: values are quantized in the forward pass, gradients pass straight through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp4 import backends
from fp4.numerics.block_scales import effective_scales
from fp4.numerics.formats import Format


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fmt: Format, rule: str, global_scale: Tensor | None) -> Tensor:
        backend = backends.for_device(x.device)
        quantized = backend.quantize(x, fmt, rule, global_scale)
        limit = effective_scales(quantized.scales, quantized.global_scale) * fmt.element.largest
        # A value that the scale clips does not move its code, so it gets no gradient (QuEST, arXiv 2502.05003).
        ctx.save_for_backward(x.abs().unflatten(-1, (-1, fmt.block_size)) <= limit[..., None])
        return backend.dequantize(quantized, torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside.flatten(-2), None, None, None


def fake_quantize(x: Tensor, fmt: Format, rule: str, global_scale: Tensor | None = None) -> Tensor:
    """Values of x after quantization and dequantization, with the straight-through estimator as gradient.

    Args:
        x: ``[N, K]``, floating point.
        fmt: format to quantize to.
        rule: rule by which block scales are chosen.
        global_scale: float64 scalar, or None to compute it from x.

    Returns:
        float32 ``[N, K]``.
    """
    values: Tensor = _StraightThrough.apply(x.float(), fmt, rule, global_scale)
    return values
