"""The CPU backend: compiled kernels (csrc/cpu) on weights regrouped into panels of sixteen rows."""

from __future__ import annotations

import importlib
import math
import os

import torch
from torch import Tensor
from torch.nn.functional import pad

from fp4 import ops  # noqa: F401  (the operators' schemas, which the library implements)
from fp4.backends.base import Backend
from fp4.numerics.formats import FP8, MXFP4, NVFP4, Format
from fp4.scheme import Scheme

_PANEL_ROWS = 16
_LARGE_PAGE = 2 << 20  # bytes
_ISAS = ("scalar", "avx2", "avx512")

try:
    importlib.import_module("fp4._C_cpu")
    _UNAVAILABLE = None
except ImportError as error:
    _UNAVAILABLE = (
        "the CPU kernels were not built with this installation; install a C++ compiler and reinstall with FP4_CPU=1, "
        f"which shows why they cannot be built ({error})"
    )


def isa() -> str | None:
    """The instruction set that the kernels run with: ``scalar``, ``avx2`` or ``avx512``; None where they are not built.

    The environment variable ``FP4_CPU_ISA`` chooses a narrower one than the CPU has.

    Raises:
        ValueError: ``FP4_CPU_ISA`` is none of these names.
    """
    _require_known_isa()
    return None if _UNAVAILABLE else str(torch.ops.fp4.cpu_isa())


def _require_known_isa() -> None:
    wanted = os.environ.get("FP4_CPU_ISA")
    if wanted is not None and wanted not in _ISAS:
        raise ValueError(f"FP4_CPU_ISA is {wanted!r}; expected one of {', '.join(_ISAS)}, or leave it unset")


def _panels(rows: Tensor) -> Tensor:
    """Rows in panels of 16, the last one padded with zero bytes: ``[..., N, bytes]`` -> ``[..., P, 16, bytes]``."""
    missing = -rows.shape[-2] % _PANEL_ROWS
    padded: Tensor = pad(rows, (0, 0, 0, missing))
    panels: Tensor = padded.unflatten(-2, (-1, _PANEL_ROWS))
    return panels


def _laid_out(view: Tensor) -> Tensor:
    """A contiguous copy of a uint8 tensor, in large pages where the system offers them.

    All of a weight is read for every token, and large pages save most of the address translations.
    """
    size = view.numel()
    if size < _LARGE_PAGE:
        return view.contiguous()
    memory = torch.empty(size + _LARGE_PAGE, dtype=torch.uint8)  # the rest beside the aligned part is never touched
    skipped = -memory.data_ptr() % _LARGE_PAGE
    aligned = memory[skipped : skipped + size]
    torch.ops.fp4.cpu_prefer_large_pages(aligned)
    return aligned.view(view.shape).copy_(view)


def _pack_nibbles(codes: Tensor, scales: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    lead = codes.shape[:-2]
    # The rows of a panel are (h, lane, i) and its byte columns (c, jj). layout.h orders both as (c, lane, h, i, jj).
    bytes_ = _panels(codes).unflatten(-2, (2, 2, 4)).unflatten(-1, (-1, 2))
    at = [*range(len(lead) + 1), *(len(lead) + d for d in (4, 2, 1, 3, 5))]
    weight = _laid_out(bytes_.permute(at)).view(*lead, bytes_.shape[len(lead)], -1, fmt.block_size * _PANEL_ROWS // 2)
    packed = _laid_out(_panels(scales.view(torch.uint8)).transpose(-1, -2))
    return weight, packed.view(scales.dtype)


def _unpack_nibbles(weight: Tensor, weight_scale: Tensor, out_features: int) -> tuple[Tensor, Tensor]:
    lead = weight.shape[:-3]
    columns = math.prod(weight.shape[-2:]) // _PANEL_ROWS
    bytes_ = weight.reshape(*lead, -1, columns // 2, 2, 2, 4, 2)
    at = [*range(len(lead) + 1), *(len(lead) + d for d in (3, 2, 4, 1, 5))]
    codes = bytes_.permute(at).reshape(*lead, -1, columns)[..., :out_features, :]
    scales = weight_scale.view(torch.uint8).transpose(-1, -2).flatten(-3, -2)[..., :out_features, :]
    return codes.contiguous(), scales.contiguous().view(weight_scale.dtype)


def _pack_bytes(codes: Tensor, scales: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    columns = _laid_out(_panels(codes.view(torch.uint8)).transpose(-1, -2))
    return columns.view(codes.dtype), _panels(scales).squeeze(-1).contiguous()


def _unpack_bytes(weight: Tensor, weight_scale: Tensor, out_features: int) -> tuple[Tensor, Tensor]:
    rows = weight.view(torch.uint8).transpose(-1, -2).flatten(-3, -2)[..., :out_features, :].contiguous()
    row_scales = weight_scale.flatten(-2)[..., :out_features, None].contiguous()
    return rows.view(weight.dtype), row_scales


# For each format with kernels, the functions that pack into its layout and unpack from it.
_LAYOUTS = {
    NVFP4.name: (_pack_nibbles, _unpack_nibbles),
    MXFP4.name: (_pack_nibbles, _unpack_nibbles),
    FP8.name: (_pack_bytes, _unpack_bytes),
}


class CpuBackend(Backend):
    """Weight-only and W4A4 matmuls on any CPU, with AVX2 or AVX-512 where it has them; FP8 weights are decoded.

    The layout, for which csrc/cpu/layout.h gives the reasons, is ``weight`` uint8 ``[..., panels, K/B, 8*B]`` and
    ``weight_scale`` ``[..., panels, K/B, 16]``, where a panel is sixteen rows. For FP8 it is ``weight`` float8_e4m3fn
    ``[..., panels, K, 16]`` and ``weight_scale`` ``[..., panels, 16]``.
    """

    name = "cpu"
    purpose = "packed weights on CPUs"
    formats = tuple(_LAYOUTS)
    keeps_layout = False

    def unavailable(self) -> str | None:
        """The reason why this backend cannot run in this process, or None if it can."""
        _require_known_isa()
        return _UNAVAILABLE

    def refuses(self, scheme: Scheme, device: torch.device, shape: tuple[int, ...]) -> str | None:
        """The reason why this backend cannot run such a weight, or None if it can."""
        return None if device.type == "cpu" else f"it runs on CPUs, not on {device.type}"

    def lay_out(self, codes: Tensor, scales: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
        """Canonical codes and scales in the layout that the class describes."""
        return _LAYOUTS[fmt.name][0](codes, scales, fmt)

    def canonical(self, weight: Tensor, weight_scale: Tensor, fmt: Format, out_features: int) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`lay_out`."""
        return _LAYOUTS[fmt.name][1](weight, weight_scale, out_features)
