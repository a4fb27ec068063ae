"""A stand-in for torch's products of block-scaled FP4, in float64, written from NVIDIA's and torch's documentation.

No function of fp4 is used. cuBLAS's documentation of "block scaling factors layout": for ``outer`` in 0..127 and
``inner`` in 0..3 a tile of 128 x 4 scales holds the scale at byte ``(outer % 32) * 16 + (outer // 32) * 4 + inner``;
tiles follow one another first along K and then along the other axis.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)


def codes_of(operand: Tensor) -> Tensor:
    """Values ``[..., R, K]`` of packed codes ``[..., R, K/2]``, low nibbles first."""
    assert operand.dtype == torch.float4_e2m1fn_x2
    byte = operand.view(torch.uint8).to(torch.int64)
    nibbles = torch.stack([byte & 15, byte >> 4], dim=-1).flatten(-2)
    return E2M1[nibbles & 7] * torch.where(nibbles >= 8, -1.0, 1.0).double()


def scale_values(scales: Tensor) -> Tensor:
    """float64 values of E4M3 or E8M0 scales, from their bits."""
    byte = scales.contiguous().view(torch.uint8).to(torch.int64)
    if scales.dtype == torch.float8_e8m0fnu:
        assert not bool((byte == 255).any())
        return torch.exp2((byte - 127).double())
    assert scales.dtype == torch.float8_e4m3fn
    assert not bool((byte >= 127).any())
    exponent, mantissa = byte >> 3, (byte & 7).double()
    return torch.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * torch.exp2((exponent - 7).double()))


def unswizzled(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Scales ``[rows, columns]`` read at the documented places."""
    across, down = -(-columns // 4), -(-rows // 128)
    assert scales.is_contiguous()
    assert scales.numel() == down * 128 * across * 4, f"{scales.numel()} scales for {rows} x {columns}"
    outer, inner = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    tile = outer // 128 * across + inner // 4
    at = tile * 512 + outer % 128 % 32 * 16 + outer % 128 // 32 * 4 + inner % 4
    return scale_values(scales.view(torch.uint8).flatten()[at].view(scales.dtype))  # padding may hold anything


def operand(
    codes: Tensor, scales: list[Tensor], recipe: list[ScalingType], swizzle: list[SwizzleType], plain: bool
) -> Tensor:
    """Values ``[R, K]`` of an operand, without its scale of the tensor."""
    two_levels = len(recipe) == 2
    assert recipe == (
        [ScalingType.BlockWise1x16, ScalingType.TensorWise] if two_levels else [ScalingType.BlockWise1x32]
    )
    first = SwizzleType.NO_SWIZZLE if plain else SwizzleType.SWIZZLE_32_4_4
    assert swizzle == ([first, SwizzleType.NO_SWIZZLE] if two_levels else [first])
    assert scales[0].dtype == (torch.float8_e4m3fn if two_levels else torch.float8_e8m0fnu)
    assert len(scales) == len(recipe)
    values = codes_of(codes)
    rows, k = values.shape
    block = 16 if two_levels else 32
    if plain:
        assert scales[0].is_contiguous()
        by_block = scale_values(scales[0]).reshape(rows, k // block)
    else:
        by_block = unswizzled(scales[0], rows, k // block)
    return values * by_block.repeat_interleave(block, dim=1)


@dataclass
class StandIn:
    """Torch's two functions, and what they were called with."""

    plain: bool = False  # scales in rows, as ROCm and XPU take them
    rows: int = 1  # multiple of the rows that is required
    calls: list[dict[str, Any]] = field(default_factory=list)

    def scaled_mm(
        self,
        mat_a: Tensor,
        mat_b: Tensor,
        scale_a: list[Tensor],
        scale_recipe_a: list[ScalingType],
        scale_b: list[Tensor],
        scale_recipe_b: list[ScalingType],
        swizzle_a: list[SwizzleType] | None = None,
        swizzle_b: list[SwizzleType] | None = None,
        bias: Tensor | None = None,
        output_dtype: torch.dtype = torch.bfloat16,
    ) -> Tensor:
        """``torch.nn.functional.scaled_mm`` for FP4."""
        self.calls.append({"a": mat_a, "b": mat_b, "scale_a": scale_a, "scale_b": scale_b})
        assert bias is None, "NVFP4's product takes no bias"
        assert mat_a.is_contiguous()
        assert mat_b.t().is_contiguous()
        assert mat_b.shape[1] % 16 == 0
        assert mat_a.shape[1] % 16 == 0  # 32 values
        assert mat_a.shape[0] % self.rows == 0
        a = operand(mat_a, scale_a, scale_recipe_a, swizzle_a or [], self.plain)
        b = operand(mat_b.t(), scale_b, scale_recipe_b, swizzle_b or [], self.plain)
        alpha = 1.0
        for scales in (scale_a, scale_b):
            for scale in scales[1:]:
                assert (scale.dtype, scale.numel()) == (torch.float32, 1)
                alpha *= float(scale)
        return (a @ b.T * alpha).to(output_dtype)

    def scaled_grouped_mm(
        self,
        mat_a: Tensor,
        mat_b: Tensor,
        scale_a: list[Tensor] | Tensor,
        scale_recipe_a: list[ScalingType] | ScalingType,
        scale_b: list[Tensor] | Tensor,
        scale_recipe_b: list[ScalingType] | ScalingType,
        swizzle_a: list[SwizzleType] | None = None,
        swizzle_b: list[SwizzleType] | None = None,
        bias: Tensor | None = None,
        offs: Tensor | None = None,
        output_dtype: torch.dtype = torch.bfloat16,
    ) -> Tensor:
        """``torch.nn.functional.scaled_grouped_mm``: ``offs`` are the ends of the experts' rows.

        Scales of an expert's rows begin at the first row of a tile, those of its weight are one row of the argument.
        """
        assert bias is None
        assert offs is not None
        assert (offs.dtype, offs.shape) == (torch.int32, mat_b.shape[:1])
        assert output_dtype == torch.bfloat16
        self.calls.append({"a": mat_a, "b": mat_b})
        out = torch.full((mat_a.shape[0], mat_b.shape[2]), torch.nan, dtype=output_dtype)
        ends = offs.numpy().tolist()  # numpy, so that tests can forbid torch's own copies to the host
        start = first = 0
        for expert, end in enumerate(ends):
            rows, matrix = slice(start, end), mat_b[expert].t()
            assert matrix.is_contiguous()
            if isinstance(scale_recipe_a, ScalingType):  # FP8
                assert scale_recipe_a == scale_recipe_b == ScalingType.RowWise
                assert isinstance(scale_a, Tensor)
                assert isinstance(scale_b, Tensor)
                assert (scale_a.shape, scale_b.shape) == (mat_a.shape[:1], (mat_b.shape[0], mat_b.shape[2]))
                a = mat_a[rows].double() * scale_a[rows, None].double()
                product = a @ (matrix.double() * scale_b[expert, :, None].double()).T
            else:
                assert isinstance(scale_a, list)
                assert isinstance(scale_b, list)
                assert isinstance(scale_recipe_b, list)
                assert scale_a[0].shape[0] % 128 == 0
                tiles = -(-(end - start) // 128) * 128
                own = scale_a[0][first : first + tiles]
                first += tiles
                a = operand(mat_a[rows], [own, *scale_a[1:]], scale_recipe_a, swizzle_a or [], self.plain)
                b = operand(matrix, [scale_b[0][expert], *scale_b[1:]], scale_recipe_b, swizzle_b or [], self.plain)
                product = a @ b.T
                for scale in (*scale_a[1:], *scale_b[1:]):
                    assert (scale.dtype, scale.shape) == (torch.float32, mat_b.shape[:1])
                    product *= scale[expert].double()
            out[rows] = product.to(output_dtype)
            start = end
        return out
