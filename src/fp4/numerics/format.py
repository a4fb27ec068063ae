"""The base classes of formats, and :class:`QuantizedTensor`, which pairs quantized data with its format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fp4.numerics.block_scales import effective_scales, over_scales
from fp4.numerics.elements import Element
from fp4.numerics.tensors import INPUT_DTYPES, largest_magnitude, per_matrix, row_tiles


@dataclass(frozen=True)
class Format(ABC):
    """How the numbers of a tensor ``[..., N, K]`` are stored. Formats are equal by value, in copies and pickles too.

    Attributes:
        block_size: the number of columns that share a scale, by default ``own_block_size``; 0 stands for a whole row.
        name: the name of the family, followed by the block size where that is wider than the family's own:
            ``nvfp4_32``.
        family: the name of the format with its own block size.
        element: the number format of one code.
        own_block_size: the narrowest block, the one that kernels implement; wider blocks are multiples of it.
        scale_dtype: the dtype of the scales.
        scale_dtypes: all dtypes that the scales may have.
        rules: the names of the rules that choose scales, the plainest first.
        needs_global_scale: whether block scales alone lack the range of a weight, so that a global scale is taken from
            the data.
        takes_global_scale: whether the format can hold a global scale.
        feeds_errors: whether elements are so coarse that methods gain by feeding rounding errors on to later columns.
        fine_scales: whether block scales lie so close together that small changes of a scale can be stored, which
            powers of two do not.
        block_rows: the number of rows that share a scale.
        scale_bytes: the smallest and the largest byte that a rule may choose, where scales are single bytes.
        scale_nan: the byte of a NaN scale, where scales are single bytes; bytes of valid scales are smaller.
    """

    family: ClassVar[str]
    element: ClassVar[Element]
    own_block_size: ClassVar[int]
    scale_dtype: ClassVar[torch.dtype]
    rules: ClassVar[tuple[str, ...]]
    needs_global_scale: ClassVar[bool] = False
    takes_global_scale: ClassVar[bool] = True
    feeds_errors: ClassVar[bool] = True
    fine_scales: ClassVar[bool] = False
    block_rows: ClassVar[int] = 1
    scale_bytes: ClassVar[tuple[int, int]]
    scale_nan: ClassVar[int]

    block_size: int = 0
    name: str = field(init=False)

    def __post_init__(self) -> None:
        size, own = self.block_size or self.own_block_size, self.own_block_size
        if size != own and (size < own or own == 0 or size % own):
            raise ValueError(f"{self.family} in blocks of {size} was asked for; expected a multiple of {own}")
        object.__setattr__(self, "block_size", size)
        object.__setattr__(self, "name", self.family if size == own else f"{self.family}_{size}")

    @property
    def base(self) -> Format:
        """The format of the same family with the narrowest block, which kernels implement."""
        return type(self)()

    def wide(self, block_size: int) -> Format:
        """The same format with a scale shared by more columns; ModelOpt's W4A8, for example, shares one by 32.

        Raises:
            ValueError: ``block_size`` is not a multiple of the family's own.
        """
        return type(self)(block_size)

    def in_base(self, scales: Tensor) -> Tensor:
        """The same scales for the narrower blocks of :attr:`base`, each repeated as often as its block is divided.

        Args:
            scales: ``[..., K / block_size]``.

        Returns:
            ``[..., K / own_block_size]``, which is ``scales`` itself where this format is the base.
        """
        repeats = self._repeats()
        if repeats == 1:
            return scales
        return scales.view(torch.uint8).repeat_interleave(repeats, dim=-1).view(scales.dtype)

    def from_base(self, scales: Tensor) -> Tensor:
        """The inverse of :meth:`in_base`: ``[..., K / own_block_size]`` -> ``[..., K / block_size]``."""
        repeats = self._repeats()
        return scales if repeats == 1 else scales[..., ::repeats].contiguous()

    def _repeats(self) -> int:
        return self.block_size // self.own_block_size if self.own_block_size else 1

    @property
    def kind(self) -> str:
        """``"FP4"`` or ``"FP8"``."""
        return f"FP{self.element.bits}"

    @property
    def native_activations(self) -> Literal["fp4", "fp8"]:
        """The precision of the activations that hardware multiplies with weights in this format."""
        return "fp4" if self.element.bits == 4 else "fp8"

    @property
    def code_dtype(self) -> torch.dtype:
        """The dtype in which codes are stored."""
        return self.element.code_dtype

    @property
    @abstractmethod
    def bits_per_weight(self) -> float:
        """Bits of code and block scale per element; scales of rows and global scales are not counted."""

    @property
    def k_multiple(self) -> int:
        """The number that K, the number of columns, must be a multiple of."""
        return self.block_size or 1

    def code_columns(self, k: int) -> int:
        """The number of columns that the codes of a matrix with ``k`` columns have."""
        return k * self.element.bits // (8 * self.code_dtype.itemsize)

    def scale_columns(self, k: int) -> int:
        """The number of columns that the scales of a matrix with ``k`` columns have."""
        return k // self.block_size if self.block_size else 1

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the scales of a tensor whose shape is ``[..., N, K]``."""
        *lead, n, k = shape
        return (*lead, -(-n // self.block_rows), self.scale_columns(k))

    def columns(self, codes: Tensor) -> int:
        """The number of columns K of the matrix that ``codes`` ``[..., N, C]`` belong to."""
        return codes.shape[-1] * 8 * self.code_dtype.itemsize // self.element.bits

    def scale_rows(self, rows: slice) -> slice:
        """The rows of the scales that belong to ``rows`` of a matrix; these must start at a block's first row."""
        return slice(rows.start // self.block_rows, -(-rows.stop // self.block_rows))

    @property
    def scale_dtypes(self) -> tuple[torch.dtype, ...]:
        """All dtypes that the scales may have."""
        return (self.scale_dtype,)

    def scale_dtype_of(self, source: torch.dtype) -> torch.dtype:
        """The dtype that the scales of a tensor of dtype ``source`` have."""
        return self.scale_dtype

    def empty(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Uninitialised codes and scales for a weight.

        Args:
            shape: the weight's shape ``[..., N, K]``.
            dtype: the weight's dtype before it is quantized.
            device: where to allocate; None is torch's default device.

        Returns:
            codes in ``code_dtype`` and scales in the dtype that :meth:`scale_dtype_of` names.
        """
        codes = torch.empty(*shape[:-1], self.code_columns(shape[-1]), dtype=self.code_dtype, device=device)
        return codes, torch.empty(self.scale_shape(shape), dtype=self.scale_dtype_of(dtype), device=device)

    def require_rule(self, rule: str) -> None:
        """Check that the format defines the rule.

        Raises:
            ValueError: it does not; the message lists the rules that it defines.
        """
        if rule not in self.rules:
            raise ValueError(f"scale rule {rule!r} is not defined for {self.name}; use one of {', '.join(self.rules)}")

    def quantize(self, x: Tensor, rule: str = "abs_max", global_scale: Tensor | None = None) -> QuantizedTensor:
        """Quantize the last axis of ``x``.

        Args:
            x: float32, bfloat16 or float16 ``[..., N, K]``, K a multiple of ``k_multiple``.
            rule: how a block's scale is chosen, one of ``rules``. ``abs_max`` maps the largest magnitude to the largest
                code (for MXFP4 by the OCP floor rule), ``mse`` takes the representable scale of least squared error
                (squares that overflow, |x| > 1e19, leave it at abs_max), ``four_over_six`` the better of amax/6 and
                amax/4, ``quest`` the Gaussian optimum; ``even``, ``ceil`` and ``below_six`` are the other exponent
                rules in use for MXFP4.
            global_scale: float64, broadcastable to the leading axes. By default NVFP4 takes it from ``x``, one per
                matrix (:func:`.global_scale_for`), and MXFP4 has none; FP8 never has one.

        Returns:
            :class:`QuantizedTensor` in canonical form. NaN in ``x`` becomes a NaN scale, so that it is never hidden.

        Raises:
            ValueError: for a shape or dtype other than these, or a rule the format does not define.
        """
        self.require_rule(rule)
        if x.dtype not in INPUT_DTYPES:
            raise ValueError(f"cannot quantize {x.dtype}; expected float32, bfloat16 or float16")
        if x.ndim < 2 or x.shape[-1] % self.k_multiple:
            raise ValueError(
                f"cannot quantize shape {tuple(x.shape)}; {self.name} needs [..., N, K], K a multiple of "
                f"{self.k_multiple}"
            )
        if global_scale is None:
            global_scale = self.global_scale_for(largest_magnitude(x), rule) if self.needs_global_scale else None
        elif self.takes_global_scale:
            global_scale = per_matrix(global_scale, x.shape[:-2]).to(device=x.device, dtype=torch.float64)
        else:
            raise ValueError(f"{self.name} has no global scale, but one was given; leave it out")
        return self._quantize(x, rule, global_scale)

    @abstractmethod
    def _quantize(self, x: Tensor, rule: str, global_scale: Tensor | None) -> QuantizedTensor: ...

    def global_scale_for(self, amax: Tensor, rule: str) -> Tensor:
        """The global scale of matrices by their largest magnitudes: float ``[...]`` -> float64 ``[...]``.

        Raises:
            ValueError: the format takes no global scale from the data.
        """
        raise ValueError(f"{self.name} takes no global scale from the data")

    def nearest_scales(self, values: Tensor) -> Tensor:
        """The scales nearest to positive values, for powers of two in their logarithm: float32 -> ``scale_dtype``.

        Raises:
            ValueError: methods do not choose the scales of this format.
        """
        raise ValueError(f"{self.name} has no block scales for a method to choose")

    def full_range_scales(self, amax: Tensor) -> Tensor:
        """The scales that map largest magnitudes to the top of the element's range, as the rule ``abs_max`` does.

        Args:
            amax: the largest magnitude of each block over the global scale, float32 ``[...]``.

        Returns:
            ``[...]`` in ``scale_dtype``.

        Raises:
            ValueError: methods do not choose the scales of this format.
        """
        raise ValueError(f"{self.name} has no block scales for a method to choose")

    def dequantize(
        self, codes: Tensor, scales: Tensor, global_scale: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The values of canonical codes and scales, computed in float32 and then rounded once.

        Args:
            codes: ``[..., N, C]`` in ``code_dtype``.
            scales: of the shape that :meth:`scale_shape` names.
            global_scale: float64, one number or ``[...]``; None stands for 1.
            dtype: the dtype of the result.

        Returns:
            ``[..., N, K]`` in ``dtype``.

        Raises:
            ValueError: the tensors are not of this format, or their shapes do not belong together.
        """
        if codes.dtype != self.code_dtype:
            per_byte = f"{('one code', 'two codes')[self.element.bits == 4]} a byte"
            raise ValueError(f"codes have dtype {codes.dtype}; expected {self.code_dtype}, {per_byte}")
        if scales.dtype not in self.scale_dtypes:
            expected_dtypes = ", ".join(map(str, self.scale_dtypes))
            raise ValueError(f"scales have dtype {scales.dtype}; {self.name} expects {expected_dtypes}")
        columns = self.columns(codes)
        expected = self.scale_shape((1, *codes.shape[:-1], columns))[1:]
        if tuple(scales.shape) != expected or columns % self.k_multiple:
            raise ValueError(
                f"codes {tuple(codes.shape)} and {self.name} scales {tuple(scales.shape)} do not belong together: "
                f"expected scales of shape {expected}"
            )
        if global_scale is not None:
            global_scale = per_matrix(global_scale, codes.shape[:-2])[..., None, None]
        return self.spread(self.element.decode(codes), effective_scales(scales, global_scale)).to(dtype)

    def spread(self, values: Tensor, effective: Tensor) -> Tensor:
        """Values ``[..., N, K]`` times the effective scales that they share."""
        blocks = values.unflatten(-1, (effective.shape[-1], self.block_size or values.shape[-1]))
        spread: Tensor = (blocks * effective[..., None]).flatten(-2)
        return spread

    @abstractmethod
    def fake_quantize(self, x: Tensor, rule: str = "abs_max", global_scale: Tensor | None = None) -> Tensor:
        """Activations quantized and dequantized: the values that a matmul in this format sees.

        Args:
            x: float32, bfloat16 or float16 ``[..., K]``.
            rule: how a block's scale is chosen, one of ``rules``.
            global_scale: float64, one number or one a row of x ``[T, K]``; None takes it from x where the format needs
                one.

        Returns:
            float32 ``[..., K]``.
        """


class BlockFormat(Format):
    """A format whose blocks lie within a row, each under a scale of one byte."""

    @property
    def bits_per_weight(self) -> float:
        """Bits of code and block scale per element: 4.5 for NVFP4, 4.25 for MXFP4 and for NVFP4 in blocks of 32."""
        return self.element.bits + 8 / self.block_size

    @abstractmethod
    def block_scales(self, blocks: Tensor, rule: str, global_scale: Tensor | None) -> Tensor:
        """The scale of each block by a rule.

        Args:
            blocks: float32 ``[..., B]``.
            rule: one of ``rules``.
            global_scale: float64, broadcastable to ``[...]``; None stands for 1.

        Returns:
            ``[...]`` in ``scale_dtype``.
        """

    def _quantize(self, x: Tensor, rule: str, global_scale: Tensor | None) -> QuantizedTensor:
        rows = x.flatten(0, -2)
        by_row = None
        if global_scale is not None:
            by_row = global_scale.expand(x.shape[:-2])[..., None].expand(x.shape[:-1]).flatten()
        codes, scales = self.empty(tuple(rows.shape), x.dtype, x.device)
        bits = scales.view(torch.uint8)  # few operations know 8-bit floats
        for tile in row_tiles(*rows.shape):
            blocks = rows[tile].float().unflatten(-1, (-1, self.block_size))
            own = None if by_row is None else by_row[tile, None]
            chosen = self.block_scales(blocks, rule, own)
            bits[tile] = chosen.view(torch.uint8)
            codes[tile] = self.element.encode(over_scales(blocks, effective_scales(chosen, own)).flatten(-2))
        return QuantizedTensor(
            codes.view(*x.shape[:-1], codes.shape[1]), scales.view(*x.shape[:-1], scales.shape[1]), global_scale, self
        )

    def fake_quantize(self, x: Tensor, rule: str = "abs_max", global_scale: Tensor | None = None) -> Tensor:
        """Activations quantized and dequantized, as :meth:`Format.fake_quantize` describes."""
        rows = x.reshape(-1, x.shape[-1])
        if global_scale is not None and global_scale.numel() != 1:
            return dequantize(*self.quantize(rows[:, None], rule, global_scale)).view(x.shape)
        return dequantize(*self.quantize(rows, rule, global_scale)).view(x.shape)


class QuantizedTensor(NamedTuple):
    """A weight ``[..., N, K]`` in canonical form, as :mod:`fp4.numerics.formats` describes it.

    Attributes:
        codes: ``uint8 [..., N, K/2]`` in the 4-bit formats, ``float8_e4m3fn [..., N, K]`` in FP8.
        scales: ``[..., N, K/B]``, FP8 ``[..., N, 1]``.
        global_scale: float64 ``[...]``, or None.
        format: the format of codes and scales.
    """

    codes: Tensor
    scales: Tensor
    global_scale: Tensor | None
    format: Format

    def rows(self, rows: slice) -> QuantizedTensor:
        """Some rows of a single matrix ``[N, K]``; the slice must start at the first row of a block."""
        return self._replace(codes=self.codes[rows], scales=self.scales[self.format.scale_rows(rows)])


def quantize(x: Tensor, fmt: Format, rule: str = "abs_max", global_scale: Tensor | None = None) -> QuantizedTensor:
    """Quantize ``x`` ``[..., N, K]`` as :meth:`Format.quantize` of ``fmt`` does."""
    return fmt.quantize(x, rule, global_scale)


def dequantize(
    codes: Tensor, scales: Tensor, global_scale: Tensor | None, fmt: Format, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The values of a quantized tensor's parts, as :meth:`Format.dequantize` of ``fmt`` computes them."""
    return fmt.dequantize(codes, scales, global_scale, dtype)
