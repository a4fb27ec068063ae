"""The number formats of single elements (E2M1, E4M3) and of block scales (E4M3, E8M0). Pure torch.

Values are rounded to the nearest code, ties to the even code, and saturate at 6, as the instruction
``cvt.rn.satfinite.e2m1x2`` does. Source: OCP Microscaling Formats (MX) v1.0, section 5.3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_TINY = 2.0**-9  # smallest positive (subnormal) E4M3; a stored block scale is never smaller

# The code of |x| is the number of thresholds below |x|. A tie must go to the even code. At 0.25, 1.25, 2.5 and 5 that
# is the lower code. At 0.75, 1.75 and 3.5 it is the upper code, so there the threshold is the float just below the tie.
_TIES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
_TIE_GOES_UP = torch.tensor([False, True, False, True, False, True, False])
E2M1_THRESHOLDS = torch.where(_TIE_GOES_UP, torch.nextafter(_TIES, torch.zeros(7)), _TIES).tolist()
_NIBBLE_VALUES = torch.tensor(E2M1_VALUES + tuple(-v for v in E2M1_VALUES))


def encode_e2m1(x: Tensor) -> Tensor:
    """The nearest E2M1 code (ties to even, saturating): float32 ``[...]`` -> uint8 ``[...]`` in 0..15."""
    magnitude = x.abs()
    code = torch.signbit(x).to(torch.uint8) << 3
    for threshold in E2M1_THRESHOLDS:
        code += magnitude > threshold
    return code


def decode_e2m1(codes: Tensor) -> Tensor:
    """The value of each unpacked E2M1 code: uint8 ``[...]`` in 0..15 -> float32 ``[...]``."""
    return _NIBBLE_VALUES.to(codes.device)[codes.int()]


def pack_codes(codes: Tensor) -> Tensor:
    """Codes packed two to a byte, the even column in the low nibble: uint8 ``[..., K]`` -> uint8 ``[..., K/2]``.

    Raises:
        ValueError: K is odd.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"cannot pack {codes.shape[-1]} codes a row two to a byte; expected an even number")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_codes(packed: Tensor) -> Tensor:
    """The inverse of :func:`pack_codes`: uint8 ``[..., K/2]`` -> uint8 ``[..., K]``."""
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)


def encode_e4m3(x: Tensor) -> Tensor:
    """The nearest E4M3 block scale, kept in [2^-9, 448] so that none is zero: float32 -> float8_e4m3fn."""
    return x.clamp(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn)


def encode_e8m0(exponent: Tensor) -> Tensor:
    """The scale ``2**exponent``, clamped to [-127, 125] so that 6 times it is finite: int32 -> float8_e8m0fnu."""
    return (exponent.clamp(-127, 125) + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


_BYTE_VALUES = decode_e2m1(unpack_codes(torch.arange(256, dtype=torch.uint8)[:, None]))  # [256, 2], of each byte


def _encode_packed_e2m1(x: Tensor) -> Tensor:
    return pack_codes(encode_e2m1(x))


def _decode_packed_e2m1(codes: Tensor) -> Tensor:
    values: Tensor = torch.nn.functional.embedding(codes.int(), _BYTE_VALUES.to(codes.device)).flatten(-2)
    return values


def _encode_saturating_e4m3(x: Tensor) -> Tensor:
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _decode_e4m3(codes: Tensor) -> Tensor:
    return codes.to(torch.float32)


@dataclass(frozen=True)
class Element:
    """The number format of one element of a quantized tensor.

    Attributes:
        name: the name in lower case.
        bits: the number of bits of one code.
        largest: the largest magnitude; larger values saturate at it.
        code_dtype: the dtype in which codes are stored.
        encode: takes values over their scale, float32 ``[..., K]``, to the nearest codes (ties to even) ``[..., C]`` in
            ``code_dtype``. C is K/2 for E2M1, which packs two codes into a byte, and K for E4M3.
        decode: takes codes ``[..., C]`` to their values, float32 ``[..., K]``.
    """

    name: str
    bits: int
    largest: float
    code_dtype: torch.dtype
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


E2M1 = Element("e2m1", 4, E2M1_MAX, torch.uint8, _encode_packed_e2m1, _decode_packed_e2m1)
E4M3 = Element("e4m3", 8, E4M3_MAX, torch.float8_e4m3fn, _encode_saturating_e4m3, _decode_e4m3)
