"""Global scales in the two forms that checkpoints store: multiplied, or as reciprocals."""

from __future__ import annotations

import torch
from torch import Tensor

_E4M3_POSITIVE = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()


def _same_effective_scales(a: Tensor, b: Tensor) -> bool:
    return torch.equal((_E4M3_POSITIVE * a).float(), (_E4M3_POSITIVE * b).float())


class InexactScale(ValueError):
    """A global scale that a format can hold only rounded, which needs ``allow_rounding``."""


def _rounding_error(name: str, wanted: Tensor, held: Tensor) -> InexactScale:
    return InexactScale(
        f"{name} {wanted.item():.17g} cannot be stored exactly, the nearest that the format holds is {held.item():.17g}"
    )


def store_multiplied(global_scale: Tensor, name: str, allow_rounding: bool) -> Tensor:
    """A global scale in the form in which it multiplies the block scales, float32 ``[]``.

    Rounding float64 to float32 may change the scale. It changes nothing that matters if the float32 products with all
    126 positive E4M3 block scales stay the same, because then no dequantized value changes, and if the float32
    reciprocal stays the same too, because then a format that stores reciprocals gets the same bytes back.

    Args:
        global_scale: the canonical scale, float64 ``[]``.
        name: the stored tensor's name, for messages.
        allow_rounding: accept a scale that changes.

    Raises:
        InexactScale: the scale changes, and ``allow_rounding`` is False.
    """
    wanted = global_scale.double().cpu()
    held = wanted.float()
    exact = held.double() == wanted or (
        _same_effective_scales(wanted, held.double()) and (1 / held.double()).float() == (1 / wanted).float()
    )
    if not exact and not allow_rounding:
        raise _rounding_error(name, wanted, held.double())
    return held.to(global_scale.device)


def store_reciprocal(global_scale: Tensor, name: str, allow_rounding: bool) -> Tensor:
    """The reciprocal of a global scale, float32 ``[]``, for formats that divide by what they store.

    Args:
        global_scale: the canonical scale, float64 ``[]``.
        name: the stored tensor's name, for messages.
        allow_rounding: accept a scale that rounding changes, in the sense of :func:`store_multiplied`.

    Raises:
        InexactScale: the scale changes, and ``allow_rounding`` is False.
    """
    wanted = global_scale.double().cpu()
    stored = (1 / wanted).float()
    held = 1 / stored.double()
    exact = held == wanted or (_same_effective_scales(wanted, held) and held.float() == wanted.float())
    if not exact and not allow_rounding:
        raise _rounding_error(name, wanted, held)
    return stored.to(global_scale.device)
