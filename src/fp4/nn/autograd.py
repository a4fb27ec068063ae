"""Gradients of matrix products with packed weights, needed to train LoRA adapters and embeddings around them.

Packed weights themselves are not trained. Where a layer quantizes its activations, the gradient is the straight-through
estimator: quantization counts as the identity.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fp4 import backends, ops
from fp4.backends.base import Backend, expert_of_rows
from fp4.numerics.formats import Format, QuantizedTensor, format_named
from fp4.numerics.rotation import rotate
from fp4.numerics.tensors import row_tiles

# Weights are dequantized in row tiles of this many elements (8 MB of float32), so that no layer is ever held dense.
_TILE_ELEMENTS = 1 << 21

#: A packed layer's forward product: takes x and a bias (or None) and calls the backend of the layer.
Run = Callable[[Tensor, "Tensor | None"], Tensor]


def _times_weight(rows: Tensor, weight: QuantizedTensor) -> Tensor:
    """Product of rows ``[T, N]`` (float32) and a canonical weight ``[N, K]``: float32 ``[T, K]``."""
    fmt = weight.format
    columns = fmt.columns(weight.codes)
    converter = backends.for_device(rows.device, fmt)
    out = rows.new_zeros(rows.shape[0], columns)
    for tile in row_tiles(rows.shape[1], columns, fmt.block_rows, _TILE_ELEMENTS):
        out.addmm_(rows[:, tile], converter.dequantize(weight.rows(tile), torch.float32))
    return out


def _implement(backend: Backend) -> None:
    """Register the input-gradient operators of ``backend``, which unpack its layout and multiply in float32."""

    def input_gradient(
        gradient: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        global_scale: Tensor | None,
        format: str,
        in_features: int,
        rotation: Tensor | None,
    ) -> Tensor:
        fmt = format_named(format)
        codes, scales = backend.unpack(weight, weight_scale, fmt, gradient.shape[-1])
        rows = gradient.reshape(-1, gradient.shape[-1]).float()
        out = _times_weight(rows, QuantizedTensor(codes, scales, global_scale, fmt))
        out = out if rotation is None else rotate(out, rotation.T)
        return out.to(gradient.dtype).view(*gradient.shape[:-1], in_features)

    def grouped_input_gradient(
        gradient: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        global_scale: Tensor | None,
        format: str,
        offsets: Tensor,
        in_features: int,
        rotation: Tensor | None,
    ) -> Tensor:
        fmt = format_named(format)
        codes, scales = backend.unpack(weight, weight_scale, fmt, gradient.shape[-1])
        out = gradient.new_zeros(gradient.shape[0], in_features)
        for expert, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
            if start == end:
                continue
            own_scale = None if global_scale is None else global_scale[expert]
            own = QuantizedTensor(codes[expert], scales[expert], own_scale, fmt)
            rows = _times_weight(gradient[start:end].float(), own)
            out[start:end] = rows if rotation is None else rotate(rows, rotation.T)
        return out

    ops.implement(backend.name, "input_gradient", input_gradient)
    ops.implement(backend.name, "grouped_input_gradient", grouped_input_gradient)


for _backend in backends.BACKENDS.values():
    _implement(_backend)


class _PackedMatmul(torch.autograd.Function):
    """The autograd function behind :func:`packed_matmul`; only x and bias have gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        run: Run,
        backend: str,
        weight: Tensor,
        weight_scale: Tensor,
        global_scale: Tensor | None,
        format: str,
        rotation: Tensor | None,
        offsets: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(weight, weight_scale, global_scale, rotation, offsets)
        ctx.backend, ctx.format, ctx.in_features = backend, format, x.shape[-1]
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        return run(x, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        weight, weight_scale, global_scale, rotation, offsets = ctx.saved_tensors
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            grouped = [] if offsets is None else [offsets]
            operator = ops.operator(ctx.backend, "grouped_input_gradient" if grouped else "input_gradient")
            of_x = operator(
                gradient, weight, weight_scale, global_scale, ctx.format, *grouped, ctx.in_features, rotation
            )
        if ctx.needs_input_grad[1]:
            shape, dtype = ctx.bias
            of_bias = _of_bias(gradient, shape, dtype, offsets)
        return of_x, of_bias, *[None] * 8


def _of_bias(gradient: Tensor, shape: torch.Size, dtype: torch.dtype, offsets: Tensor | None) -> Tensor:
    """Gradient of a bias of ``shape``: the sum of the rows that it was added to."""
    if offsets is None:
        return gradient.flatten(0, -2).float().sum(dim=0).to(dtype)
    # Rows from offsets[E] on belong to no expert of this process. Their gradients are zero, so that adding them to any
    # expert changes nothing.
    experts = expert_of_rows(gradient, offsets)
    sums = torch.zeros(shape, dtype=torch.float32, device=gradient.device)
    return sums.index_add(0, experts, gradient.float()).to(dtype)


def as_autocast(x: Tensor) -> Tensor:
    """x as a dense layer would see it: cast to the dtype of autocast where that is on, else x itself."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def needs_gradient(x: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd needs the product of x and a packed weight to go through :func:`packed_matmul`."""
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def packed_matmul(
    x: Tensor,
    bias: Tensor | None,
    run: Run,
    backend: Backend,
    weight: tuple[Tensor, Tensor, Tensor | None, Format],
    rotation: Tensor | None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Differentiable product with a packed weight: ``run(x, bias)``, with gradients for x and bias.

    Args:
        x: ``[..., K]``, or ``[T, K]`` with rows sorted by expert for a stack of experts.
        bias: ``[N]``, or ``[E, N]`` for a stack, or None.
        run: computes the forward product.
        backend: the backend whose layout the weight has.
        weight: codes and block scales as ``backend`` lays them out, global scale, and format.
        rotation: float32 ``[h, h]`` that x is multiplied with first, or None.
        offsets: int32 ``[E + 1]``; expert e has rows ``offsets[e]:offsets[e + 1]``. None if there is one matrix.

    Returns:
        What ``run`` returns: ``[..., N]`` in the dtype of x.
    """
    *tensors, fmt = weight
    name = backend.runs_as(fmt)
    found: Tensor = _PackedMatmul.apply(x, bias, run, backend.name, *tensors, name, rotation, offsets)
    return found
