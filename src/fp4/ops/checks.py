"""Checks of arguments that several operators share; each raises RuntimeError with what was expected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp4.numerics.formats import Format
from fp4.numerics.tensors import INPUT_DTYPES


def require_input(x: Tensor, name: str, axes: str = "[..., K]", least: int = 1) -> None:
    """Check dtype and number of axes of an input: activations, a gradient, or a tensor to be quantized."""
    torch._check(
        x.dtype in INPUT_DTYPES, lambda: f"{name} is {x.dtype}; expected float32, bfloat16 or float16: convert it"
    )
    torch._check(x.dim() >= least, lambda: f"{name} has shape {tuple(x.shape)}; expected {axes}")


def require_columns(columns: Any, fmt: Format) -> None:
    """Check that the last axis consists of whole blocks, as the format packs them."""
    torch._check(
        columns % fmt.k_multiple == 0,
        lambda: f"the last axis has {columns} elements; {fmt.name} needs a multiple of {fmt.k_multiple}",
    )


def require_weight(weight: Tensor, weight_scale: Tensor, global_scale: Tensor | None, fmt: Format, count: Any) -> None:
    """Check a packed weight; ``count`` is the number of matrices, each of which has one global scale."""
    torch._check(
        weight.dtype == fmt.code_dtype,
        lambda: f"weight is {weight.dtype}; {fmt.name} weights are {fmt.code_dtype}, as Backend.pack returns them",
    )
    torch._check(
        weight_scale.dtype in fmt.scale_dtypes,
        lambda: f"weight_scale is {weight_scale.dtype}; {fmt.name} expects {', '.join(map(str, fmt.scale_dtypes))}",
    )
    require_global_scale(global_scale, fmt, (count,))


def require_global_scale(global_scale: Tensor | None, fmt: Format, counts: tuple[Any, ...]) -> None:
    """Check a global scale against the format; it may have as many elements as one of ``counts`` says."""
    if global_scale is None:
        torch._check(not fmt.needs_global_scale, lambda: f"{fmt.name} needs a global scale, but there is none")
        return
    torch._check(fmt.takes_global_scale, lambda: f"{fmt.name} has no global scale, but one was given; leave it out")
    torch._check(global_scale.dtype == torch.float64, lambda: f"global_scale is {global_scale.dtype}; expected float64")
    torch._check(
        any(global_scale.numel() == count for count in counts),
        lambda: f"global_scale has shape {tuple(global_scale.shape)}; expected {counts[-1]} elements, one a matrix",
    )


def require_bias(bias: Tensor | None, shape: tuple[Any, ...]) -> None:
    """Check dtype and shape of a bias, where there is one."""
    if bias is None:
        return
    torch._check(bias.dtype in INPUT_DTYPES, lambda: f"bias is {bias.dtype}; expected float32, bfloat16 or float16")
    torch._check(
        tuple(bias.shape) == shape, lambda: f"bias has shape {tuple(bias.shape)}; expected {shape}, one an output"
    )


def require_rotation(rotation: Tensor | None, columns: Any) -> None:
    """Check that a rotation, where there is one, is a square matrix that divides the columns into groups."""
    if rotation is None:
        return
    torch._check(
        rotation.dim() == 2 and rotation.shape[0] == rotation.shape[1] and columns % rotation.shape[0] == 0,
        lambda: f"rotation has shape {tuple(rotation.shape)}; expected a square that divides {columns} columns",
    )


def require_offsets(x: Tensor, weight: Tensor, offsets: Tensor) -> None:
    """Check the input of a grouped operator, and where in it the rows of each expert begin."""
    torch._check(x.dim() == 2, lambda: f"x has shape {tuple(x.shape)}; expected [T, K], sorted by expert")
    torch._check(
        offsets.dtype == torch.int32 and tuple(offsets.shape) == (weight.shape[0] + 1,),
        lambda: (
            f"offsets are {offsets.dtype} {tuple(offsets.shape)}; expected int32 ({weight.shape[0] + 1},), where "
            "each expert's rows begin, and where the last one's end"
        ),
    )


def require_activation(input_global_scale: Tensor | None, rule: str, fmt: Format, count: Any) -> None:
    """Check how activations are quantized; ``count`` is the number of experts, or 1."""
    torch._check(
        rule in fmt.rules,
        lambda: f"scale rule {rule!r} is not defined for {fmt.name}; use one of {', '.join(fmt.rules)}",
    )
    if input_global_scale is not None:
        elements = input_global_scale.numel()
        torch._check(
            elements in (1, count),
            lambda: (
                f"input_global_scale has shape {tuple(input_global_scale.shape)}; expected 1 element"
                f"{'' if count == 1 else f', or {count}, one an expert'}"
            ),
        )
