"""The matmul operators: shapes, launch configurations and buffers for the kernels of matmul.py and quantize.py."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fp4.backends.base import expert_of_rows
from fp4.backends.triton import layout
from fp4.backends.triton.dense import multiply_dense
from fp4.backends.triton.largest_magnitude import processors
from fp4.backends.triton.matmul import add_partial_sums, multiply
from fp4.backends.triton.quantize import INTERLEAVED, VALUES, quantize_activation, rotate
from fp4.backends.triton.scaled import CAPABILITIES, multiply_scaled
from fp4.numerics.formats import format_named


class Tiling(NamedTuple):
    """One launch configuration; the fields have the names of the kernel's parameters."""

    BM: int
    SLICES: int
    PANELS: int
    CHUNKS: int
    num_warps: int
    num_stages: int


# The configuration for numbers of rows up to and including the key. With few rows the matmul is bound by memory, so
# each warp streams its own slice of K, and as few programs as possible read x. With many rows it is bound by the tensor
# cores, so tiles are large and K is not sliced.
TILINGS: dict[int, Tiling] = {
    1: Tiling(1, 8, 1, 2, 8, 3),
    2: Tiling(2, 8, 1, 2, 8, 3),
    4: Tiling(4, 8, 2, 2, 8, 2),
    8: Tiling(8, 8, 2, 1, 8, 3),
    16: Tiling(16, 4, 4, 1, 4, 3),
    32: Tiling(32, 4, 2, 1, 4, 3),
    64: Tiling(64, 1, 8, 1, 4, 3),
    1 << 30: Tiling(128, 1, 8, 1, 8, 3),  # fits the 99 KB of shared memory of consumer GPUs
}
# Hopper has 227 KB of shared memory, and with 256 rows to a tile decoding costs less than multiplying.
HOPPER_TILINGS = {most: tiling for most, tiling in TILINGS.items() if most <= 32} | {
    64: Tiling(64, 1, 8, 1, 8, 3),
    512: Tiling(128, 1, 8, 1, 8, 3),
    1 << 30: Tiling(256, 1, 8, 1, 8, 3),
}
# The same for Triton before 3.9, whose wgmma can give wrong results where the left operand is in registers: its ptxas
# reuses them too early (triton#11781), and groups of four warps do not wait for one another (triton#11047). Products
# with a slice axis are made of mma.sync instead.
MMA_HOPPER_TILINGS = {most: tiling for most, tiling in TILINGS.items() if most <= 32} | {
    1 << 30: Tiling(64, 2, 4, 1, 8, 2)
}
# The rows from which weight-only products in bfloat16 decode the weight once and leave the rest to torch (dense.py), by
# major compute capability. Derived from instruction counts, not measured: `benchmarks/gpu_linear.py --crossover` finds
# them on a GPU.
DENSE_FROM = {9: 1536}
DENSE_FROM_ELSEWHERE = 2048
DENSE_FROM_WITHOUT_WGMMA = 512  # mma.sync reaches about half of Hopper's speed
# The configurations for FP4 activations on tensor cores that multiply FP4.
SCALED_TILINGS: dict[int, Tiling] = {
    16: Tiling(16, 1, 8, 2, 4, 3),
    32: Tiling(32, 1, 8, 2, 4, 3),
    64: Tiling(64, 1, 8, 2, 4, 3),
    1 << 30: Tiling(128, 1, 8, 2, 4, 3),
}
# Consumer Blackwell keeps sums in registers, so its tiles are smaller.
SMALL_SCALED_TILINGS: dict[int, Tiling] = {
    16: Tiling(16, 1, 4, 2, 4, 3),
    32: Tiling(32, 1, 4, 2, 4, 3),
    1 << 30: Tiling(64, 1, 4, 2, 4, 3),
}
_TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
# Activations split into bfloat16 terms leave no room for tiles of more rows than this.
WIDE_ROWS = 64


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    # What AMD's GPUs give as their capability are other numbers: gfx942 would pass for Hopper.
    no_nvidia = device.type == "cpu" or torch.version.hip is not None
    return (0, 0) if no_nvidia else torch.cuda.get_device_capability(device)


def uses_wgmma(device: torch.device) -> bool:
    """Whether products on ``device`` are made of Hopper's ``wgmma``, which this Triton must compile rightly."""
    return _capability(device)[0] == 9 and _TRITON >= (3, 9)


def decodes_once(x: Tensor) -> bool:
    """Whether a weight-only product of x ``[T, K]`` decodes its weight once (dense.py)."""
    if x.dtype != torch.bfloat16:
        return False
    major = _capability(x.device)[0]
    least = DENSE_FROM.get(major, DENSE_FROM_ELSEWHERE)
    if major == 9 and not uses_wgmma(x.device):
        least = DENSE_FROM_WITHOUT_WGMMA
    return x.shape[0] >= least


def tiling_for(rows: int, parts: int, device: torch.device) -> Tiling:
    """The launch configuration for a matmul.

    Args:
        rows: the rows of x for one matrix.
        parts: the number of terms that x is split into.
        device: where the kernel runs.
    """
    if parts > 1:
        rows = min(rows, WIDE_ROWS if _capability(device)[0] != 9 or uses_wgmma(device) else WIDE_ROWS // 2)
    tilings = TILINGS
    if _capability(device)[0] == 9:
        tilings = HOPPER_TILINGS if uses_wgmma(device) else MMA_HOPPER_TILINGS
    return next(tiling for most, tiling in tilings.items() if rows <= most)


def has_fp4_tensor_cores(device: torch.device) -> bool:
    """Whether ``device`` has tensor cores that multiply FP4 and that Triton can use."""
    return _capability(device) in CAPABILITIES


def shuffles(device: torch.device, tiling: Tiling) -> bool:
    """Whether Hopper's ``wgmma`` multiplies tiles of this configuration, which needs x shuffled (layout.py)."""
    return uses_wgmma(device) and tiling.SLICES == 1


def _split(programs: int, chunks: int, tiling: Tiling, device: torch.device) -> int:
    """The number of programs that share a tile's K: a power of two that occupies all processors if K is long enough."""
    split = 1
    # A largest tile fills a processor's registers by itself. Of smaller ones two fit, and one computes while the other
    # waits for memory.
    wanted = processors(device) * (2 if tiling.SLICES == 1 and tiling.BM < 128 else 1)
    while programs * split * 2 <= wanted and chunks >= split * 2 * tiling.SLICES * tiling.CHUNKS * 2:
        split *= 2
    return split


def _parts(dtype: torch.dtype, mx: bool) -> int:
    """The number of terms that x is split into so that its products with the decoded weight are exact."""
    if dtype == torch.float32:
        return 3
    return 2 if dtype == torch.float16 and mx else 1


class _Launch(NamedTuple):
    """The grid of a launch, and the number of experts in it (0 for a plain matmul)."""

    grid: tuple[int, int, int]
    experts: int

    @property
    def split(self) -> int:
        return self.grid[2]


def _launch(rows: int, k: int, x: Tensor, weight: Tensor, out_features: int, tiling: Tiling, grouped: bool) -> _Launch:
    if weight.device != x.device:
        raise ValueError(f"the activations are on {x.device} and the weight is on {weight.device}; move one of them")
    experts = weight.shape[0] if grouped else 0
    panels, chunks = weight.shape[-3:-1]
    if panels != triton.cdiv(out_features, layout.ROWS) or chunks != triton.cdiv(k, layout.CHUNK):
        raise ValueError(
            f"weight {tuple(weight.shape)} is not the triton layout of {out_features} x {k}; pack it with this backend"
        )
    m_tiles = triton.cdiv(rows, tiling.BM)
    if experts:
        m_tiles = min(rows, rows // tiling.BM + min(experts, rows))
    n_tiles = triton.cdiv(panels, tiling.PANELS)
    return _Launch((n_tiles, m_tiles, _split(m_tiles * n_tiles, chunks, tiling, weight.device)), experts)


def _rows_a_matrix(rows: int, weight: Tensor, grouped: bool) -> int:
    """The rows that each matrix can expect; larger tiles would leave those of experts mostly empty."""
    return triton.cdiv(rows, weight.shape[0]) if grouped else rows


def _summed(partial: Tensor, out: Tensor) -> Tensor:
    """``out``, after the partial sums ``[SPLIT, T, N]`` are added into it, if there are any."""
    if partial is not out:
        count, block = out.numel(), 1024
        add_partial_sums[(triton.cdiv(count, block),)](partial, out, count, partial.shape[0], block, num_warps=4)
    return out


def _product(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    global_scale: Tensor | None,
    format: str,
    bias: Tensor | None,
    offsets: Tensor | None,
    out_features: int,
    x_unit: Tensor | None,
    dtype: torch.dtype,
    tiling: Tiling,
) -> Tensor:
    """x ``[T, K]`` contiguous times packed weights -> ``[T, N]`` in ``dtype``, times the float64 ``x_unit``.

    x must be shuffled where :func:`shuffles` says so.
    """
    rows, k = x.shape
    out = torch.empty(rows, out_features, dtype=dtype, device=x.device)
    if not out.numel():
        return out
    mx, grouped = layout.IS_MX[format], offsets is not None
    launch = _launch(rows, k, x, weight, out_features, tiling, grouped)
    into = out if launch.split == 1 else torch.empty(launch.split, *out.shape, dtype=torch.float32, device=x.device)
    multiply[launch.grid](
        x, weight.view(torch.uint32), weight_scale.view(torch.uint8), global_scale, x_unit, bias, offsets, into,
        rows, out_features, k, weight.shape[-2], weight_scale.shape[-1], launch.experts,
        mx, _parts(x.dtype, mx), shuffles(x.device, tiling), x_unit is not None and x_unit.numel() > 1,
        triton.next_power_of_2(launch.experts), tiling.BM, tiling.SLICES, tiling.PANELS, tiling.CHUNKS, launch.split,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip
    return _summed(into, out)


def scaled_product(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    global_scale: Tensor | None,
    format: str,
    bias: Tensor | None,
    offsets: Tensor | None,
    out_features: int,
    x_unit: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Quantized activations times packed weights, on tensor cores that multiply FP4.

    Args:
        codes: uint8 ``[T, K/2]``, interleaved as in layout.py.
        scales: uint8 ``[T, K/B]``.
        weight: packed weight.
        weight_scale: packed scales.
        global_scale: float64 of the weight, ``[]`` or ``[E]``; None for none.
        format: the name of the format.
        bias: ``[N]`` or ``[E, N]``; None for none.
        offsets: int32 ``[E + 1]`` of experts; None for a single matrix.
        out_features: N.
        x_unit: float64 global scale of the activations, ``[1]`` or ``[T]``; None for 1.
        dtype: the dtype of the result.

    Returns:
        ``[T, N]`` in ``dtype``.
    """
    rows, k = codes.shape[0], codes.shape[1] * 2
    out = torch.empty(rows, out_features, dtype=dtype, device=codes.device)
    mx, grouped = layout.IS_MX[format], offsets is not None
    tilings = SMALL_SCALED_TILINGS if _capability(codes.device)[0] == 12 else SCALED_TILINGS
    expected = _rows_a_matrix(rows, weight, grouped)
    tiling = next(tiling for most, tiling in tilings.items() if expected <= most)
    launch = _launch(rows, k, codes, weight, out_features, tiling, grouped)
    into = out if launch.split == 1 else torch.empty(launch.split, *out.shape, dtype=torch.float32, device=out.device)
    multiply_scaled[launch.grid](
        codes, scales, weight, weight_scale.view(torch.uint8), global_scale, x_unit, bias, offsets, into,
        rows, out_features, k, weight.shape[-2], weight_scale.shape[-1], launch.experts,
        mx, x_unit is not None and x_unit.numel() > 1, triton.next_power_of_2(launch.experts),
        tiling.BM, tiling.PANELS, tiling.CHUNKS, launch.split,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip
    return _summed(into, out)


def decoded_in_tiles(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    global_scale: Tensor | None,
    format: str,
    bias: Tensor | None,
    offsets: Tensor | None,
    out_features: int,
    rotation: Tensor | None,
) -> Tensor:
    """x ``[T, K]``, contiguous, rotated and multiplied by a weight that each tile of rows decodes: ``[T, N]``."""
    parts = _parts(x.dtype, layout.IS_MX[format])
    tiling = tiling_for(_rows_a_matrix(x.shape[0], weight, offsets is not None), parts, x.device)
    x = rotate(x, rotation, shuffles(x.device, tiling))
    dtype = x.dtype
    return _product(x, weight, weight_scale, global_scale, format, bias, offsets, out_features, None, dtype, tiling)


def _weight_only(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    global_scale: Tensor | None,
    format: str,
    bias: Tensor | None,
    offsets: Tensor | None,
    out_features: int,
    rotation: Tensor | None,
) -> Tensor:
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    arguments = (weight, weight_scale, global_scale, format, bias)
    if offsets is None and decodes_once(flat):
        out = multiply_dense(rotate(flat, rotation), *arguments, out_features)
    else:
        out = decoded_in_tiles(flat, *arguments, offsets, out_features, rotation)
    return out.view(*x.shape[:-1], out_features)


def linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    global_scale: Tensor | None,
    format: str,
    bias: Tensor | None,
    out_features: int,
    rotation: Tensor | None = None,
) -> Tensor:
    """``ops.linear`` (W4A16): x ``[..., K]``, left unquantized, times a packed weight."""
    return _weight_only(x, weight, weight_scale, global_scale, format, bias, None, out_features, rotation)


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    global_scale: Tensor | None,
    format: str,
    bias: Tensor | None,
    offsets: Tensor,
    out_features: int,
    rotation: Tensor | None = None,
) -> Tensor:
    """``ops.grouped_linear`` (W4A16): each row of x ``[T, K]`` times the weight of its expert.

    Only the weights of experts that have rows are read, and the host never waits for the device.
    """
    return _weight_only(x, weight, weight_scale, global_scale, format, bias, offsets, out_features, rotation)


def _quantized(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    global_scale: Tensor | None,
    format: str,
    bias: Tensor | None,
    offsets: Tensor | None,
    out_features: int,
    rotation: Tensor | None,
    input_global_scale: Tensor | None,
    rule: str,
) -> Tensor:
    """x quantized to FP4 times a packed weight.

    Where the hardware multiplies FP4, x stays in it. Elsewhere its values, E2M1 x block scale, are multiplied as
    bfloat16, which holds each of them exactly.
    """
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    if not flat.numel():
        return x.new_empty(*x.shape[:-1], out_features)
    fmt = format_named(format)
    if has_fp4_tensor_cores(x.device):
        codes, scales, unit = quantize_activation(
            flat, fmt, rotation, input_global_scale, rule, INTERLEAVED.value, offsets=offsets
        )
        assert scales is not None
        out = scaled_product(
            codes, scales, weight, weight_scale, global_scale, format, bias, offsets, out_features, unit, x.dtype
        )
        return out.view(*x.shape[:-1], out_features)
    tiling = tiling_for(_rows_a_matrix(flat.shape[0], weight, offsets is not None), 1, x.device)
    shuffled = shuffles(x.device, tiling)
    values, _, unit = quantize_activation(
        flat, fmt, rotation, input_global_scale, rule, VALUES.value, shuffled, offsets
    )
    out = _product(
        values, weight, weight_scale, global_scale, format, bias, offsets, out_features, unit, x.dtype, tiling
    )
    return out.view(*x.shape[:-1], out_features)


def linear_quantized(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    global_scale: Tensor | None,
    format: str,
    bias: Tensor | None,
    out_features: int,
    rotation: Tensor | None,
    input_global_scale: Tensor | None,
    rule: str,
) -> Tensor:
    """``ops.linear_quantized`` (W4A4): x ``[..., K]``, rotated and quantized, times a packed weight."""
    return _quantized(
        x, weight, weight_scale, global_scale, format, bias, None, out_features, rotation, input_global_scale, rule
    )


def grouped_linear_quantized(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    global_scale: Tensor | None,
    format: str,
    bias: Tensor | None,
    offsets: Tensor,
    out_features: int,
    rotation: Tensor | None,
    input_global_scale: Tensor | None,
    rule: str,
) -> Tensor:
    """``ops.grouped_linear_quantized`` (W4A4); ``input_global_scale`` is one number or one an expert."""
    if input_global_scale is not None and input_global_scale.numel() > 1:
        input_global_scale = input_global_scale[expert_of_rows(x, offsets)]
    return _quantized(
        x, weight, weight_scale, global_scale, format, bias, offsets, out_features, rotation, input_global_scale, rule
    )
