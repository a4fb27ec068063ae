"""Checks of the tensors that codecs read, and of what a format has no place for when they write."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fp4.checkpoint.formats.codec import StoredLinear
from fp4.numerics.formats import Format, QuantizedTensor


def require(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor that a layer must have under a suffix.

    Raises:
        ValueError: there is none; the message lists the tensors that there are.
    """
    if name not in tensors:
        found = ", ".join(sorted(key.lstrip("._") for key in tensors)) or "nothing"
        raise ValueError(f"{name.lstrip('._')} is missing; found only {found}")
    return tensors[name]


def read_codes(stored: Tensor, name: str, shape: tuple[int, int] | None = None) -> Tensor:
    """The checked codes of an FP4 weight.

    Args:
        stored: the tensor as read.
        name: its name, for messages.
        shape: N, K of the model's layer, or None if it is not known.

    Returns:
        ``stored``, uint8 ``[N, K/2]``.

    Raises:
        ValueError: the dtype is not uint8, the tensor is no matrix, or its shape is not the layer's.
    """
    found = f"{name} is {stored.dtype} {tuple(stored.shape)}"
    if stored.dtype != torch.uint8 or stored.ndim != 2:
        raise ValueError(f"{found}; expected a matrix of torch.uint8, [N, K/2]")
    if shape is not None and tuple(stored.shape) != (shape[0], shape[1] // 2):
        raise ValueError(f"{found}; the model expects torch.uint8 {(shape[0], shape[1] // 2)}")
    return stored


def read_scales(stored: Tensor, name: str, fmt: Format, codes: Tensor) -> Tensor:
    """The checked block scales of an FP4 weight.

    Args:
        stored: the scales, in the dtype of ``fmt`` or as its bits in uint8.
        name: the tensor's name, for messages.
        fmt: the format of the weight.
        codes: the weight's codes, whose shape the scales must fit.

    Returns:
        the scales ``[..., N, K/B]`` in ``fmt.scale_dtype``, B the format's block size.

    Raises:
        ValueError: dtype or shape do not fit, or a scale is NaN or negative.
    """
    if stored.dtype not in (torch.uint8, fmt.scale_dtype):
        raise ValueError(f"{name} is {stored.dtype}; {fmt.name} expects {fmt.scale_dtype} or its bits as uint8")
    columns = fmt.columns(codes)
    expected = (*codes.shape[:-1], fmt.scale_columns(columns))
    if columns % fmt.k_multiple or tuple(stored.shape) != expected:
        raise ValueError(
            f"{name} ({fmt.name}) is {stored.dtype} {tuple(stored.shape)}; the model expects {expected} for codes of "
            f"{tuple(codes.shape)} in blocks of {fmt.block_size}"
        )
    bits = stored.view(torch.uint8)
    # One comparison finds both faults: E4M3's NaN is 0x7F and negative values lie above it, and E8M0, which has no
    # negative values, has its NaN at 0xFF.
    largest_valid = fmt.scale_nan - 1
    if not bits.is_meta and bits.numel() and _largest(bits) > largest_valid:
        bad = int((bits > largest_valid).sum())
        raise ValueError(f"{name}: scales hold {bad} NaN or negative values out of {bits.numel()}; the file is damaged")
    return bits.view(fmt.scale_dtype)


def _largest(bits: Tensor) -> int:
    # NumPy finds the maximum on one thread. torch.max would wake torch's thread pool, which no other step of a
    # conversion does. Its threads would then spin for longer than a layer takes: on two cores that halves the speed.
    return int(bits.numpy().max() if bits.device.type == "cpu" else bits.max())


def read_scalar(stored: Tensor, name: str) -> Tensor:
    """The checked value of a stored global scale.

    Args:
        stored: a floating-point tensor of one element, of any shape.
        name: its name, for messages.

    Returns:
        the value, float64 ``[]``.

    Raises:
        ValueError: the tensor is not one floating-point number, or the number is not positive and finite.
    """
    if stored.numel() != 1 or not stored.is_floating_point() or stored.element_size() < 2:
        raise ValueError(f"{name} is {stored.dtype} {tuple(stored.shape)}; expected one floating-point number")
    value = stored.double().reshape(())
    if not (torch.isfinite(value) & (value > 0)):
        raise ValueError(f"{name} is {stored.flatten().tolist()}; expected one positive, finite number")
    return value


def require_no_global_scale(weight: QuantizedTensor, codec: str) -> None:
    """Refuse a weight with a global scale, which MXFP4 has only in FP-Quant's checkpoints.

    Args:
        weight: an MXFP4 weight.
        codec: the name of the target format, for the message.

    Raises:
        ValueError: the weight has a global scale other than 1.
    """
    if weight.global_scale is not None and weight.global_scale != 1:
        raise ValueError(
            f"its MXFP4 weight has a global scale of {weight.global_scale.item():.9g}, for which {codec} has no place"
        )


def require_no_input_factors(stored: StoredLinear, codec: str) -> None:
    """Refuse a layer whose input is smoothed, for formats that cannot store its factors.

    Args:
        stored: the layer in canonical form.
        codec: the name of the target format, for the message.

    Raises:
        ValueError: the input is multiplied by factors first.
    """
    if stored.input_factors is not None:
        raise ValueError(f"its input is smoothed by AWQ, for whose factors {codec} has no place; quantize it anew")


def require_no_rotation(stored: StoredLinear, codec: str) -> None:
    """Refuse a rotated layer, for formats that cannot store a rotation.

    Args:
        stored: the layer in canonical form.
        codec: the name of the target format, for the message.

    Raises:
        ValueError: the layer is rotated.
    """
    if stored.rotation is not None:
        size = stored.rotation.shape[0]
        raise ValueError(f"its weight and input are rotated in groups of {size}, for which {codec} has no place")
