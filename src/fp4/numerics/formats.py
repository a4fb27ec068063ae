"""The numerics of 4-bit floating point, and of FP8 beside it, in pure torch: what every kernel is tested against.

A quantized tensor is **codes x block scales x global scale**:

    value[n, k] = E2M1(code[n, k]) * float32(block_scale[n, k // B] * global_scale)        B = 16 (NVFP4) or 32 (MXFP4)

* codes: ``uint8 [..., N, K/2]``, two per byte, the even column in the low nibble, bit 3 of a nibble is the sign;
* block scales: ``float8_e4m3fn [..., N, K/16]`` (NVFP4) or ``float8_e8m0fnu [..., N, K/32]`` (MXFP4). Their dtype names
  the format, so a pair of tensors is enough to know what it holds;
* global scale: ``float64 [...]``, one per matrix, multiplied; usually ``None`` for MXFP4. It is float64 because half of
  the checkpoint formats store its reciprocal in float32: ``float32(1 / float64(1 / x)) == x`` holds for every normal
  x, so those formats round-trip to the bit.

Rounding is to nearest, ties to the even code, of the IEEE float32 quotient ``x / effective_scale``, saturating at 6, as
the ``cvt.rn.satfinite.e2m1x2`` instruction does. Element formats: OCP Microscaling Formats (MX) v1.0, section 5.3.

FP8 keeps one E4M3 code an element and one scale a row (a channel of a weight, a token of an activation):

* codes: ``float8_e4m3fn [..., N, K]``; scales: ``[..., N, 1]`` in the dtype of what was quantized; no global scale;
* scale = amax / 448 and code = nearest E4M3 of x / scale, both rounded to that dtype first, as compressed-tensors does.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fp4.errors import NotQuantizable
from fp4.numerics.elements import (
    E2M1_MAX,
    E4M3_MAX,
    decode_e2m1,
    encode_e2m1,
    encode_e4m3,
    encode_e8m0,
    pack_codes,
    unpack_codes,
)

FOUR_OVER_SIX_E4M3_MAX = 256.0  # leaves room for amax/4, which is 1.5 times amax/6 (arXiv 2512.02010)

_BYTE_VALUES = decode_e2m1(unpack_codes(torch.arange(256, dtype=torch.uint8)[:, None]))  # [256, 2], of each byte

_INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_TILE_ELEMENTS = 1 << 20  # rows are handled so many at once, so that temporaries stay small beside the tensor itself


@dataclass(frozen=True)
class Format:
    """``block_size`` codes of a row (0: all of them) share one scale of ``scale_dtype``, which ``rules`` can choose.

    A ``scale_dtype`` of float32 stands for bfloat16 and float16 too: scales then have the dtype of the source. Formats
    are equal by value; a wide variant (``dataclasses.replace(NVFP4, block_size=32)``) shares a scale among more
    elements and is a format like any other.
    """

    name: str
    block_size: int
    scale_dtype: torch.dtype
    rules: tuple[str, ...]
    code_dtype: torch.dtype = torch.uint8

    def __reduce__(self) -> tuple[Any, ...]:
        return _same_format, tuple(getattr(self, field.name) for field in fields(self))

    @property
    def needs_global_scale(self) -> bool:
        """Whether the block scales alone lack the range of a weight, so that a global scale is taken from the data."""
        return self.scale_dtype == torch.float8_e4m3fn

    @property
    def code_bits(self) -> int:
        return 4 if self.code_dtype == torch.uint8 else 8

    @property
    def kind(self) -> str:
        """``"FP4"`` or ``"FP8"``."""
        return f"FP{self.code_bits}"

    @property
    def bits_per_weight(self) -> float:
        """Bits of code and block scale per element (4.5 for NVFP4, 4.25 for MXFP4, 8 for FP8, whose scales of rows are
        not counted, like global scales)."""
        return self.code_bits + (8 / self.block_size if self.block_size else 0)

    @property
    def k_multiple(self) -> int:
        """What the number of columns must be a multiple of."""
        return self.block_size or 1

    def code_columns(self, k: int) -> int:
        """Columns of the codes of a matrix with ``k`` columns."""
        return k * self.code_bits // 8

    def scale_columns(self, k: int) -> int:
        """Columns of the scales of a matrix with ``k`` columns."""
        return k // self.block_size if self.block_size else 1

    def columns(self, codes: Tensor) -> int:
        """Columns of the matrix that ``codes`` belong to."""
        return codes.shape[-1] * 8 // self.code_bits

    def require_rule(self, rule: str) -> None:
        if rule not in self.rules:
            raise ValueError(f"scale rule {rule!r} is not defined for {self.name}; use one of {', '.join(self.rules)}")


NVFP4 = Format("nvfp4", 16, torch.float8_e4m3fn, ("abs_max", "mse", "four_over_six"))
MXFP4 = Format("mxfp4", 32, torch.float8_e8m0fnu, ("abs_max", "even", "ceil", "below_six", "mse", "quest"))
FP8 = Format("fp8", 0, torch.float32, ("abs_max",), torch.float8_e4m3fn)
#: The 4-bit formats.
FORMATS = {fmt.name: fmt for fmt in (NVFP4, MXFP4)}
#: Everything a weight can be in.
WEIGHT_FORMATS = {**FORMATS, FP8.name: FP8}


def _same_format(*values: Any) -> Format:
    """The format with these field values: where a constant above has them that one, so that copies keep identity."""
    made = Format(*values)
    return next((known for known in WEIGHT_FORMATS.values() if known == made), made)


class QuantizedTensor(NamedTuple):
    """codes ``uint8 [..., N, K/2]``, scales ``[..., N, K/B]`` and global scale ``float64 [...]`` (or None).

    FP8: codes ``float8_e4m3fn [..., N, K]``, scales ``[..., N, 1]``, None.
    """

    codes: Tensor
    scales: Tensor
    global_scale: Tensor | None


def format_of(scales: Tensor) -> Format:
    """The format that scales of this dtype belong to. Raises ValueError for any other dtype."""
    if scales.dtype in _INPUT_DTYPES:
        return FP8
    for fmt in FORMATS.values():
        if scales.dtype == fmt.scale_dtype:
            return fmt
    known = ", ".join(f"{fmt.scale_dtype} ({fmt.name})" for fmt in WEIGHT_FORMATS.values())
    raise ValueError(f"block scales have dtype {scales.dtype}; expected one of {known}")


def require_finite(tensor: Tensor, name: str) -> None:
    """Raises :class:`NotQuantizable` (a ValueError) naming the weight ``name`` if ``tensor`` holds NaN or infinity."""
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    if bad:
        raise NotQuantizable(
            f"{name} holds {bad} NaN or infinite values out of {tensor.numel()}, and such a weight cannot be "
            "quantized; check that the checkpoint is intact",
            name.removesuffix(".weight"),
        )


# --- block scales ----------------------------------------------------------------------------------------------------


def effective_scales(scales: Tensor, global_scale: Tensor | None) -> Tensor:
    """float32 of block scale x global scale, which broadcasts against ``scales``; rounded to float32 once.

    Both factors are exact in float64, and a product of a 4-bit significand with a float64 that came from a float32 or
    from the reciprocal of one is never close enough to a rounding boundary for the double rounding to show.
    """
    decoded = scales.to(torch.float32)
    return decoded if global_scale is None else (decoded.double() * global_scale).float()


def _floor_log2(x: Tensor) -> Tensor:
    """floor(log2 x) for float32 x >= 0 as int32, from the exponent field; -127 for zero and subnormals."""
    return (x.view(torch.int32) >> 23) - 127


def _sum_by_halving(x: Tensor) -> Tensor:
    """Sum over the last axis (a power of two long), folding it in half: an order that any vector unit can keep."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def _mx_exponents(blocks: Tensor, amax: Tensor, rule: str, unit: Tensor | float) -> Tensor:
    """MXFP4 block exponents: float32 ``[..., B]`` -> int32 ``[...]``; ``unit`` is the float32 global scale, or 1."""
    if rule == "quest":
        # The clipping factor that minimises the squared error of a Gaussian block (QuEST, arXiv 2502.05003).
        size = blocks.shape[-1]
        centred = blocks - (_sum_by_halving(blocks) / size)[..., None]
        std = torch.sqrt(_sum_by_halving(centred * centred) / size)
        return _floor_log2((std * (2.92247856 / E2M1_MAX) + 1e-8) / unit)
    if rule == "below_six":
        # The smallest power of two under which amax stays strictly below 6.
        return _floor_log2(amax / (unit * E2M1_MAX)) + 1
    if rule == "ceil":
        # The smallest power of two that clips nothing: carry any mantissa bit of amax/6 into the exponent field.
        return ((amax / (unit * E2M1_MAX)).view(torch.int32) + 0x7FFFFF >> 23) - 127
    amax = amax / unit
    if rule == "even":
        # amax is first rounded to E2M1's one mantissa bit (half a step added), so that 1.75 and more round up.
        amax = (amax.view(torch.int32) + (1 << 21)).view(torch.float32)
    return _floor_log2(amax) - 2  # 2 is E2M1's largest exponent (OCP MX v1.0, section 6.3)


def _squared_error(blocks: Tensor, scales: Tensor, global_scale: Tensor | None) -> Tensor:
    """float32 ``[...]``: the squared rounding error of each block ``[..., B]`` under a scale."""
    effective = effective_scales(scales, global_scale)
    error = decode_e2m1(_encode_blocks(blocks, effective)) * effective[..., None] - blocks
    return _sum_by_halving(error * error)


def _best_of(blocks: Tensor, candidates: list[Tensor], global_scale: Tensor | None) -> Tensor:
    """Per block the candidate with the least squared error; the earliest on a tie."""
    best = candidates[0]
    least = _squared_error(blocks, best, global_scale)
    for candidate in candidates[1:]:
        error = _squared_error(blocks, candidate, global_scale)
        better = error < least
        best = torch.where(better, candidate.view(torch.uint8), best.view(torch.uint8)).view(best.dtype)
        least = torch.where(better, error, least)
    return best


def _neighbours(scales: Tensor, offsets: tuple[int, ...], low: int, high: int) -> list[Tensor]:
    """The scales ``offset`` representable steps away (bytes of both scale types are ordered as their values)."""
    bits = scales.view(torch.uint8).to(torch.int16)
    return [(bits + o).clamp(low, high).to(torch.uint8).view(scales.dtype) for o in offsets]


# Offsets of the search, nearest first so that ties keep the scale closest to abs_max. E4M3: one binade either way.
_NVFP4_OFFSETS = tuple(sorted(range(-8, 9), key=lambda o: (abs(o), o)))
_MXFP4_OFFSETS = (0, 1, -1, 2)


def _block_scales(blocks: Tensor, fmt: Format, rule: str, global_scale: Tensor | None) -> Tensor:
    """Block scales by ``rule``: float32 ``[..., B]`` -> ``fmt.scale_dtype [...]``, as the global scale broadcasts."""
    amax = blocks.abs().amax(dim=-1)
    unit = 1.0 if global_scale is None else global_scale.float()
    if fmt.scale_dtype == torch.float8_e8m0fnu:
        scales = encode_e8m0(_mx_exponents(blocks, amax, "abs_max" if rule == "mse" else rule, unit))
        if rule == "mse":
            scales = _best_of(blocks, _neighbours(scales, _MXFP4_OFFSETS, 0, 252), global_scale)
        nan = 0xFF
    else:
        scales = encode_e4m3(amax / (unit * E2M1_MAX))
        if rule == "four_over_six":
            scales = _best_of(blocks, [scales, encode_e4m3(amax / (unit * 4.0))], global_scale)
        elif rule == "mse":
            scales = _best_of(blocks, _neighbours(scales, _NVFP4_OFFSETS, 1, 126), global_scale)
        nan = 0x7F
    # A NaN must never be hidden: its whole block is NaN.
    return torch.where(torch.isnan(amax), nan, scales.view(torch.uint8)).view(fmt.scale_dtype)


# --- whole tensors ---------------------------------------------------------------------------------------------------


def largest_magnitude(x: Tensor) -> Tensor:
    """max |x| of each matrix, without a copy: ``[..., N, K]`` -> float32 ``[...]``; 0 if empty, NaN if it has one."""
    if not x.numel():
        return x.new_zeros(x.shape[:-2], dtype=torch.float32)
    return torch.maximum(x.amax(dim=(-2, -1)), -x.amin(dim=(-2, -1))).float()


def global_scale_for(amax: Tensor, rule: str = "abs_max") -> Tensor:
    """NVFP4 global scale from the largest magnitude: float ``[...]`` -> float64 ``[...]``; 1 where that would be zero.

    It puts the largest block scale at 448 (at 256 for ``four_over_six``); computed in float32, as all tools do.
    """
    limit = FOUR_OVER_SIX_E4M3_MAX if rule == "four_over_six" else E4M3_MAX
    scale = amax.float() / (E2M1_MAX * limit)
    return torch.where(scale == 0, 1.0, scale).double()


def portable_global_scale_for(amax: Tensor, rule: str = "abs_max") -> Tensor:
    """The power of two at or above :func:`global_scale_for`: float ``[...]`` -> float64 ``[...]``.

    Block scales are floating point, so nothing is lost by it, and it is the one kind of global scale that every
    checkpoint format, the ones that store the reciprocal or round to bfloat16 too, holds exactly.
    """
    mantissa, exponent = torch.frexp(global_scale_for(amax, rule))
    scale: Tensor = torch.ldexp(torch.ones_like(mantissa), torch.where(mantissa == 0.5, exponent - 1, exponent))
    return scale


def _per_matrix(global_scale: Tensor, lead: torch.Size) -> Tensor:
    """A global scale as ``[]`` or ``lead``, the leading axes of the tensor that it belongs to."""
    if global_scale.shape == lead:
        return global_scale
    if global_scale.numel() != 1:
        raise ValueError(f"global scale has shape {tuple(global_scale.shape)}; expected one number or {tuple(lead)}")
    return global_scale.reshape(())


def _encode_blocks(blocks: Tensor, effective: Tensor) -> Tensor:
    # An effective scale that underflowed to zero leaves nothing to represent: dividing by infinity gives code 0.
    divisor = torch.where(effective == 0, torch.inf, effective)
    return encode_e2m1(blocks / divisor[..., None])


def _quantize_rows(x: Tensor) -> QuantizedTensor:
    """FP8 of x ``[..., N, K]``: scale and quotient are computed in float32 and rounded to ``x.dtype``."""
    rows = x.flatten(0, -2)
    codes = torch.empty(rows.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows.shape[0], 1, dtype=x.dtype, device=x.device)
    step = max(1, _TILE_ELEMENTS // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0] if rows.shape[1] else 0, step):
        tile = slice(start, start + step)
        scale = rows[tile].abs().amax(dim=-1, keepdim=True) / E4M3_MAX
        # What compressed-tensors gives a row of zeros.
        scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
        scales[tile] = scale
        codes[tile] = (rows[tile] / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return QuantizedTensor(codes.view(x.shape), scales.view(*x.shape[:-1], 1), None)


def quantize(x: Tensor, fmt: Format, rule: str = "abs_max", global_scale: Tensor | None = None) -> QuantizedTensor:
    """Quantize the last axis of ``x`` in blocks, or in rows for FP8.

    Args:
        x: float32, bfloat16 or float16 ``[..., N, K]``, K a multiple of ``fmt.block_size``.
        rule: how a block's scale is chosen, one of ``fmt.rules``. ``abs_max`` maps the largest magnitude to 6 (for
            MXFP4 by the OCP floor rule), ``mse`` takes the representable scale of least squared error (squares that
            overflow, |x| > 1e19, leave it at abs_max),
            ``four_over_six`` the better of amax/6 and amax/4, ``quest`` the Gaussian optimum; ``even``, ``ceil`` and
            ``below_six`` are the other exponent rules in use for MXFP4.
        global_scale: float64, broadcastable to the leading axes. By default NVFP4 takes it from ``x``, one per matrix
            (:func:`global_scale_for`), and MXFP4 has none; FP8 never has one.

    Returns:
        :class:`QuantizedTensor` in canonical form. NaN in ``x`` becomes a NaN scale, so that it is never hidden.

    Raises:
        ValueError: for a shape or dtype other than these, or a rule the format does not define.
    """
    fmt.require_rule(rule)
    if x.dtype not in _INPUT_DTYPES:
        raise ValueError(f"cannot quantize {x.dtype}; expected float32, bfloat16 or float16")
    if x.ndim < 2 or x.shape[-1] % fmt.k_multiple:
        raise ValueError(
            f"cannot quantize shape {tuple(x.shape)}; {fmt.name} needs [..., N, K], K a multiple of {fmt.k_multiple}"
        )
    if fmt == FP8:
        if global_scale is not None:
            raise ValueError("fp8 has one scale a row and no global scale, but one was given")
        return _quantize_rows(x)
    lead = x.shape[:-2]
    if global_scale is not None:
        global_scale = _per_matrix(global_scale, lead).to(device=x.device, dtype=torch.float64)
    elif fmt.needs_global_scale:
        global_scale = global_scale_for(largest_magnitude(x), rule)

    rows = x.flatten(0, -2)
    unit = None
    if global_scale is not None:
        unit = global_scale.expand(lead)[..., None].expand(x.shape[:-1]).flatten()
    codes = torch.empty(rows.shape[0], rows.shape[1] // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(rows.shape[0], rows.shape[1] // fmt.block_size, dtype=torch.uint8, device=x.device)
    step = max(1, _TILE_ELEMENTS // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        tile = slice(start, start + step)
        blocks = rows[tile].float().unflatten(-1, (-1, fmt.block_size))
        tile_unit = None if unit is None else unit[tile, None]
        tile_scales = _block_scales(blocks, fmt, rule, tile_unit)
        scales[tile] = tile_scales.view(torch.uint8)
        codes[tile] = pack_codes(_encode_blocks(blocks, effective_scales(tile_scales, tile_unit)).flatten(-2))
    return QuantizedTensor(
        codes.view(*x.shape[:-1], codes.shape[1]),
        scales.view(fmt.scale_dtype).view(*x.shape[:-1], scales.shape[1]),
        global_scale,
    )


def fake_quantize_fp8(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """What FP8 makes of activations: ``[..., K]`` -> float32 ``[..., K]``, under one ``scale`` or, if None, one a row.

    Computed in float32 throughout, as ``scaled_mm`` is.
    """
    if scale is None:
        rows = x.float().reshape(-1, x.shape[-1])
        return dequantize(*quantize(rows, FP8)).view(x.shape)
    scale = scale.float()
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * scale


def dequantize(
    codes: Tensor, scales: Tensor, global_scale: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The values of a canonical triple: ``[..., N, K]`` in ``dtype`` (computed in float32, then rounded once)."""
    fmt = format_of(scales)
    if codes.dtype != fmt.code_dtype:
        per_byte = "two codes" if fmt.code_bits == 4 else "one code"
        raise ValueError(f"codes have dtype {codes.dtype}; expected {fmt.code_dtype}, {per_byte} a byte")
    columns = fmt.columns(codes)
    expected = (*codes.shape[:-1], fmt.scale_columns(columns))
    if tuple(scales.shape) != expected or columns % fmt.k_multiple:
        raise ValueError(
            f"codes {tuple(codes.shape)} and {fmt.name} scales {tuple(scales.shape)} do not belong together: expected "
            f"scales of shape {expected}"
        )
    if fmt == FP8:
        return (codes.float() * scales.float()).to(dtype)
    if global_scale is not None:
        global_scale = _per_matrix(global_scale, codes.shape[:-2])[..., None, None]
    effective = effective_scales(scales, global_scale)
    values: Tensor = torch.nn.functional.embedding(codes.int(), _BYTE_VALUES.to(codes.device)).flatten(-2)
    values = values.unflatten(-1, (-1, fmt.block_size)) * effective[..., None]
    return values.flatten(-2).to(dtype)
