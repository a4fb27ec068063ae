"""The fp_quant format (Transformers ``FPQuantConfig``, FP-Quant's exports, vLLM ``fp_quant``).

Per Linear layer, besides ``bias``:

* ``qweight`` uint8 ``[N, K/2]`` and ``scales`` uint8 ``[N, K/B]`` (bits of E4M3 or E8M0), or ``dqweight`` ``[N, K]``,
  the dequantized values of a pseudo-quantized checkpoint;
* ``weight_global_scale``, ``act_global_scale`` ``[1]``: reciprocals of the canonical global scales;
* ``forward_hadamard_matrix``, ``backward_hadamard_matrix`` ``[h, h]``, equal: the rotation of input and weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fp4.checkpoint.recover import recover
from fp4.formats import Format, QuantizedTensor, dequantize, format_of

SUFFIXES = (
    "qweight",
    "scales",
    "dqweight",
    "weight_global_scale",
    "act_global_scale",
    "forward_hadamard_matrix",
    "backward_hadamard_matrix",
)


class StoredLinear(NamedTuple):
    """One layer as read: weight (rotated basis), global scale of its input float64 [] or None, rotation or None."""

    weight: QuantizedTensor
    input_global_scale: Tensor | None
    rotation: Tensor | None


def read(tensors: Mapping[str, Tensor], fmt: Format, out_features: int, in_features: int) -> StoredLinear:
    """Canonical form of one stored layer.

    Args:
        tensors: by suffix (``SUFFIXES``).
        fmt: what the checkpoint's configuration says the weight is in.
        out_features, in_features: N and K of the model's layer.

    Raises:
        ValueError: a tensor is missing, or its shape, dtype or values contradict the format.
    """
    rotation = _read_rotation(tensors, in_features)
    unit = _read_global_scale(_get(tensors, "weight_global_scale"), "weight_global_scale")
    if "dqweight" in tensors and "qweight" not in tensors:
        dense = _expect(tensors["dqweight"], "dqweight", (out_features, in_features))
        codes, scales, exact = recover(dense, fmt, unit)
        if not bool(exact.all()):
            raise ValueError(
                f"dqweight has {int((~exact).sum())} blocks that no {fmt.name} scale reproduces; it was not written "
                f"by pseudo-quantization to {fmt.name}, or was changed since"
            )
    else:
        codes = _expect(_get(tensors, "qweight"), "qweight", (out_features, in_features // 2), torch.uint8)
        scales = _read_scales(_get(tensors, "scales"), fmt, out_features, in_features)
    input_unit = _read_global_scale(_get(tensors, "act_global_scale"), "act_global_scale")
    return StoredLinear(QuantizedTensor(codes, scales, _meant(unit, fmt)), _meant(input_unit, fmt), rotation)


def write(
    weight: QuantizedTensor,
    input_global_scale: Tensor | None,
    rotation: Tensor | None,
    pseudo_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The tensors to store for one layer, by suffix; ``pseudo_dtype`` asks for ``dqweight`` in that dtype instead."""
    one = torch.ones(1, dtype=torch.float64, device=weight.codes.device)
    unit = one if weight.global_scale is None else weight.global_scale.reshape(1)
    input_unit = one
    if input_global_scale is not None:
        input_unit = input_global_scale.reshape(1)
    elif format_of(weight.scales).needs_global_scale:
        # A dynamic input scale has no place in the format; FP-Quant's constant keeps such files usable there.
        input_unit = one / 3
    matrix = torch.eye(16, device=one.device) if rotation is None else rotation.to(one.device, torch.float32)
    stored = {
        "weight_global_scale": (1 / unit).float(),
        "act_global_scale": (1 / input_unit).float(),
        "forward_hadamard_matrix": matrix.clone(),
        "backward_hadamard_matrix": matrix.clone(),
    }
    if pseudo_dtype is not None:
        stored["dqweight"] = dequantize(*weight, pseudo_dtype)
    else:
        stored |= {"qweight": weight.codes, "scales": weight.scales.view(torch.uint8)}
    return stored


def _get(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"{name} is missing; found only {', '.join(sorted(tensors))}")
    return tensors[name]


def _expect(tensor: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    if tuple(tensor.shape) != shape or (dtype is not None and tensor.dtype != dtype):
        found = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"{name} is {found}; the model expects {dtype or 'floating point'} {shape}")
    return tensor


def _read_scales(stored: Tensor, fmt: Format, out_features: int, in_features: int) -> Tensor:
    shape = (out_features, in_features // fmt.block_size)
    padded = (-(-shape[0] // 128) * 128, -(-shape[1] // 4) * 4)
    if stored.ndim == 2 and tuple(stored.shape) == padded:
        # fp_quant 0.3 pads what it quantizes on the fly to the tiles of its kernel.
        stored = stored[: shape[0], : shape[1]].contiguous()
    if stored.element_size() != 1:
        raise ValueError(f"scales are {stored.dtype}; expected one byte each ({fmt.scale_dtype})")
    scales = _expect(stored.view(torch.uint8), f"scales ({fmt.name})", shape, torch.uint8).view(fmt.scale_dtype)
    values = scales.float()
    if torch.isnan(values).any() or (values < 0).any():
        raise ValueError(f"scales hold {int((~(values >= 0)).sum())} NaN or negative values; the file is damaged")
    return scales


def _read_global_scale(stored: Tensor, name: str) -> Tensor:
    if stored.numel() != 1 or not bool(torch.isfinite(stored).all() & (stored > 0).all()):
        raise ValueError(f"{name} is {stored.flatten()[:4].tolist()}; expected one positive, finite number")
    return 1 / stored.double().reshape(())


def _meant(unit: Tensor, fmt: Format) -> Tensor | None:
    """A global scale of 1 is how this format writes that there is none."""
    return None if unit == 1 and not fmt.needs_global_scale else unit


def _read_rotation(tensors: Mapping[str, Tensor], in_features: int) -> Tensor | None:
    matrix = tensors.get("forward_hadamard_matrix")
    if matrix is None:
        return None
    size = matrix.shape[0]
    if matrix.ndim != 2 or matrix.shape[1] != size or in_features % size:
        raise ValueError(
            f"forward_hadamard_matrix is {tuple(matrix.shape)}; expected square, of a size that divides {in_features}"
        )
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("forward_hadamard_matrix holds NaN or infinity")
    matrix = matrix.float()
    return None if torch.equal(matrix, torch.eye(size, device=matrix.device)) else matrix
