"""Block rotations: small orthogonal matrices applied to groups of ``h`` neighbouring columns of input and weight.

For an orthogonal R, ``(x R)(w R)^T = x w^T``, so a rotation changes what is rounded but not what is computed. All
matrices are built in float64; they are applied as ``x @ R`` in float32.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable

import torch
from torch import Tensor


def _sylvester(size: int) -> Tensor:
    if size < 1 or size & (size - 1):
        raise ValueError(f"a Hadamard matrix of size {size} was asked for; expected a power of two")
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def hadamard(size: int) -> Tensor:
    """Sylvester's Hadamard matrix over sqrt(size), symmetric: float64 ``[size, size]``.

    Raises:
        ValueError: ``size`` is not a power of two.
    """
    return _sylvester(size) / math.sqrt(size)


def identity(size: int) -> Tensor:
    """The rotation that changes nothing: float64 ``[size, size]``."""
    return torch.eye(size, dtype=torch.float64, device="cpu")


def gsr(size: int) -> Tensor:
    """The Walsh matrix over sqrt(size), Hadamard's rows by their number of sign changes: float64 ``[size, size]``.

    Applied to groups of columns it is the grouped sequency-arranged rotation (GSR) of arXiv 2505.03810.

    Raises:
        ValueError: ``size`` is not a power of two.
    """
    matrix = _sylvester(size)
    changes = (matrix[:, 1:] != matrix[:, :-1]).sum(dim=1)
    return matrix[torch.argsort(changes)] / math.sqrt(size)


ROTATIONS: dict[str, Callable[[int], Tensor]] = {"hadamard": hadamard, "identity": identity, "gsr": gsr}


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Each group of neighbouring columns times a rotation.

    Args:
        x: any floating-point dtype, ``[..., K]``.
        rotation: ``[h, h]``, h dividing K.

    Returns:
        float32 ``[..., K]``.
    """
    groups = x.float().unflatten(-1, (-1, rotation.shape[0]))
    rotated: Tensor = groups @ rotation.float()
    return rotated.flatten(-2)


def rotation_for(name: str, size: int, dtype: torch.dtype | None) -> Tensor | None:
    """The rotation that layers of a model in ``dtype`` share.

    It is rounded to ``dtype``, because checkpoints store it so, and is then applied in float32.

    Args:
        name: a name in ``ROTATIONS``.
        size: h, the number of columns rotated together, a power of two.
        dtype: the model's dtype; None is torch's default dtype.

    Returns:
        float32 ``[h, h]``, or None for ``"identity"``.
    """
    if name == "identity":
        return None
    return share(ROTATIONS[name](size).to(dtype or torch.get_default_dtype()).float())


_shared: weakref.WeakValueDictionary[tuple[object, ...], Tensor] = weakref.WeakValueDictionary()


def share(rotation: Tensor) -> Tensor:
    """The one tensor that stands for all equal rotations on a device, so that a model holds each matrix once.

    Args:
        rotation: ``[h, h]``.

    Returns:
        an equal tensor that was shared before, else ``rotation`` itself; a weak reference to it is kept.
    """
    if rotation.device.type == "meta":
        return rotation
    key = (rotation.device, rotation.dtype, rotation.shape[0], rotation.cpu().numpy().tobytes())
    return _shared.setdefault(key, rotation)
