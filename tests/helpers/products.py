"""Products in floating point compared with float64, up to the roundings that they may contain."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4.numerics import rotation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One more rounding at the end, relative to the result: half a unit in the last place of the output dtype.
OUTPUT_ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# What results may be off by below the normal numbers; GPUs need not resolve products there.
TINY = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-25}
TINY_ON_GPU = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-25}


def assert_product(
    result: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    uncertainty: Tensor | None = None,
    *,
    rounded_factors: int = 0,
    tiny: dict[torch.dtype, float] = TINY,
) -> None:
    """``x @ weight.T + bias`` up to 2 K roundings of float32 on the sum of magnitudes, and the final rounding.

    Args:
        result: ``[M, N]`` in the dtype that is computed in.
        x: ``[M, K]``.
        weight: ``[N, K]``.
        bias: ``[N]`` or None.
        uncertainty: how far each element of x may be from the given one.
        rounded_factors: how many factors of each term were rounded to the dtype of ``result`` before.
        tiny: the error that is allowed below the normal numbers, where every operation rounds absolutely.
    """
    x, weight = x.double(), weight.double()
    exact, magnitude = x @ weight.T, x.abs() @ weight.abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    k, rounding = x.shape[-1], OUTPUT_ROUNDING[result.dtype]
    bound = magnitude * (2 * k * 2.0**-24 + rounded_factors * rounding) + exact.abs() * rounding
    if uncertainty is not None:
        bound += uncertainty @ weight.abs().T
    bound += tiny[result.dtype] + 2 * k * 2.0**-149
    assert result.isfinite().all()
    worst = ((result.double() - exact).abs() / bound).max() if result.numel() else torch.tensor(0.0)
    assert worst <= 1, f"error is {worst:.2f} times the bound"


def rotated(x: Tensor, rotate: Tensor) -> tuple[Tensor, Tensor]:
    """x rotated and rounded to its dtype, and how far a float32 sum in another order may come out from that."""
    exact = rotation.rotate(x, rotate).to(x.dtype)
    group = x.double().unflatten(-1, (-1, len(rotate)))
    middle = (group @ rotate.double()).flatten(-2)
    error = len(rotate) * 2.0**-24 * (group.abs() @ rotate.abs().double()).flatten(-2)
    return exact, (middle + error).to(x.dtype).double() - (middle - error).to(x.dtype).double()
