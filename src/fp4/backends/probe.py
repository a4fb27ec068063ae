"""A small product on a device, compared with the reference: how a backend of others' kernels finds what they can."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from fp4.numerics.formats import Format, QuantizedTensor, dequantize

_ROWS, _N, _K = 64, 160, 256  # both operands need padding where scales are swizzled
_OFFSETS = (0, 17, 17, 64)

#: Rows ``[T, K]`` times experts ``[E, N, K]``, or times the first of them where the offsets are None.
Product = Callable[[QuantizedTensor, QuantizedTensor, "Tensor | None"], Tensor]


def _values(generator: torch.Generator, *shape: int) -> Tensor:
    """Random numbers on the CPU whose blocks differ in size."""
    tensor = torch.randn(shape, generator=generator, device="cpu")
    exponents = torch.randint(-2, 3, (*shape[:-1], shape[-1] // 32), generator=generator, device="cpu")
    values: Tensor = (tensor.unflatten(-1, (-1, 32)) * torch.exp2(exponents)[..., None]).flatten(-2)
    return values


def _to(tensor: QuantizedTensor, device: torch.device) -> QuantizedTensor:
    return tensor._replace(
        codes=tensor.codes.to(device),
        scales=tensor.scales.to(device),
        global_scale=None if tensor.global_scale is None else tensor.global_scale.to(device),
    )


def probe(name: str, fmt: Format, grouped: bool, device: torch.device, product: Product) -> str | None:
    """The reason why a product does not work on a device, or None if it does.

    Args:
        name: what to call the product in the reason.
        fmt: the format of both operands.
        grouped: whether experts are multiplied.
        device: where.
        product: takes canonical tensors on the device.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    x = fmt.quantize(_values(generator, _ROWS, _K))
    weight = fmt.quantize(_values(generator, len(_OFFSETS) - 1, _N, _K))
    try:
        offsets = torch.tensor(_OFFSETS, dtype=torch.int32, device=device) if grouped else None
        found = product(_to(x, device), _to(weight, device), offsets).cpu().double()
    except (RuntimeError, ValueError, TypeError, AttributeError, ImportError, AssertionError) as error:
        # What a build of torch, a package or a GPU lacks shows as any of these.
        return f"{name} does not multiply {fmt.name} on {device}: {(str(error).strip() or repr(error)).splitlines()[0]}"
    rows, matrices = dequantize(*x).double(), dequantize(*weight).double()
    parts = list(itertools.pairwise(_OFFSETS)) if grouped else [(0, _ROWS)]
    for expert, (start, end) in enumerate(parts):
        expected = rows[start:end] @ matrices[expert].T
        # The result's rounding, and that of float32 sums.
        bound = expected.abs() / 128 + rows[start:end].abs() @ matrices[expert].abs().T / 4096
        if not bool(((found[start:end] - expected).abs() <= bound).all()):
            return f"{name}'s product of {fmt.name} on {device} is wrong; report the GPU and the versions"
    return None
