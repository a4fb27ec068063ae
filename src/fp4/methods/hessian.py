"""The quadratic objective of a layer: what rounding its weight costs in outputs, from the second moments of its inputs.

For the tokens X that a layer multiplies with (from the quantized prefix, rounded to FP4 where activations are), the
output error of Q in place of the weight W is ``|X W^T - X Q^T|^2 = tr((Q - W) H (Q - W)^T)`` with ``H = X^T X``. (GPTQ,
arXiv 2210.17323, whose H is twice that: the factor changes no rounding.)
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from fp4.calibration.observers import SecondMoments
from fp4.errors import NotQuantizable
from fp4.methods.tiling import reordered

logger = logging.getLogger("fp4")

_LARGEST_DAMPING = 1.0  # as a share of the mean diagonal
_PANEL = 128  # columns that are factorised at once; the rest is matrix products


class Objective(NamedTuple):
    """The damped Hessian of a layer, in the forms that rounding against it needs.

    Attributes:
        diagonal: diagonal of the damped Hessian, float32 ``[..., K]``.
        order: indices of the columns in the order in which they are rounded, int64 ``[..., K]``.
        Hinv: Cholesky factor of the inverse of the Hessian in that order, lower triangular: ``Hinv Hinv^T = H^-1``,
            float32 ``[..., K, K]``. The paper's is its transpose. Column j holds how an error in the j-th column
            spreads to later ones.
        H: damped Hessian, symmetric, in the order of the weight: float32 ``[..., K, K]``; None where it was not kept.
    """

    diagonal: Tensor
    order: Tensor
    Hinv: Tensor
    H: Tensor | None


def objective(
    moments: SecondMoments, damping: float, name: str, block_size: int = 1, keep_hessian: bool = True
) -> Objective:
    """The damped mean Hessian of a layer, factorised in the order of falling diagonal.

    Channels that were never active get the mean diagonal: nothing couples to them, so they are rounded to nearest.
    Where the factorisation fails it is tried again with ten times the damping.

    Args:
        moments: sums over the inputs of the layer.
        damping: what is added to the diagonal, as a share of its mean.
        name: the layer's, for errors.
        block_size: this many neighbouring columns stay together in the order, sorted by the mean of their diagonal.
        keep_hessian: keep H beside Hinv. Otherwise Hinv overwrites ``moments.hessian``, so that there is only one
            matrix of this size.

    Raises:
        NotQuantizable: the Hessian holds NaN or infinity, or cannot be factorised at any damping.
    """
    count = max(moments.count, 1)
    H = moments.hessian / count if keep_hessian else moments.hessian.div_(count)
    if not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(H)):
        raise NotQuantizable(
            f"the Hessian of {name} holds NaN or infinity because its inputs overflow; check the calibration data and "
            "the layers before it",
            name,
        )
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(dim=-1, keepdim=True)
    mean = torch.where(mean > 0, mean, 1.0)
    undamped = torch.where(diagonal > 0, diagonal, mean)
    diagonal.copy_(undamped)
    blocks = undamped.unflatten(-1, (-1, block_size)).mean(dim=-1)
    order = torch.argsort(blocks, dim=-1, descending=True, stable=True)[..., None] * block_size
    order = (order + torch.arange(block_size, device=order.device)).flatten(-2)
    Hinv = H.clone() if keep_hessian else H
    _reorder_(Hinv, order)
    ordered_diagonal, ordered_undamped = Hinv.diagonal(dim1=-2, dim2=-1), undamped.gather(-1, order)
    share = damping
    while share <= max(damping, _LARGEST_DAMPING):
        ordered_diagonal.copy_(ordered_undamped + share * mean)
        if invert_lower_(Hinv):
            if share > damping:
                logger.info("%s: Hessian damped by %g of its mean diagonal", name, share)
            diagonal = undamped + share * mean
            if keep_hessian:
                H.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
            return Objective(diagonal, order, Hinv, H if keep_hessian else None)
        _mirror_(Hinv)
        share = max(10 * share, 1e-6)
    raise NotQuantizable(
        f"the Hessian of {name} cannot be factorised at any damping; give other or more calibration data", name
    )


def _panels(size: int) -> list[slice]:
    return [slice(start, min(start + _PANEL, size)) for start in range(0, size, _PANEL)]


def _reorder_(matrix: Tensor, order: Tensor) -> None:
    """Put the rows and columns of ``matrix`` ``[..., K, K]`` into ``order``, in place."""
    for panel in _panels(matrix.shape[-1]):
        matrix[..., panel, :] = reordered(matrix[..., panel, :], order, -1)
    for panel in _panels(matrix.shape[-1]):
        matrix[..., panel] = reordered(matrix[..., panel], order, -2)


def _mirror_(matrix: Tensor) -> None:
    """Copy the strict upper triangle of ``matrix`` onto the lower one, in place."""
    for panel in _panels(matrix.shape[-1]):
        above = matrix[..., panel, panel.start :].triu(1)
        matrix[..., panel.start :, panel] = matrix[..., panel.start :, panel].triu(1) + above.transpose(-1, -2)


def invert_lower_(matrix: Tensor) -> bool:
    """Turn a symmetric ``matrix`` ``[..., K, K]`` into lower V with ``V V^T = matrix^-1``, in place, by panels.

    First lower L with ``L^T L = matrix`` (a Cholesky factorisation from the last row to the first), then ``V = L^-1``:
    half the work of inverting the matrix and factorising that.

    Returns:
        False if the matrix is not positive definite in its precision; its strict upper triangle is unchanged then.
    """
    panels = _panels(matrix.shape[-1])
    for panel in reversed(panels):
        start, stop = panel.start, panel.stop
        below = matrix[..., stop:, :stop]  # the rows of L that are known
        rest = matrix[..., panel, :stop] - below[..., panel].transpose(-1, -2) @ below
        flipped, info = torch.linalg.cholesky_ex(rest[..., panel].flip(-1, -2))
        if bool(info.any()) or not bool(torch.isfinite(flipped).all()):
            return False
        upper = flipped.flip(-1, -2)
        inverse = torch.linalg.solve_triangular(upper, torch.eye(stop - start).to(upper), upper=True)
        # Multiplying the rest of the panel with the inverse is faster than solving, and V needs the inverse anyway.
        matrix[..., panel, :start] = inverse @ rest[..., :start]
        matrix[..., panel, panel] = matrix[..., panel, panel].triu(1) + inverse.transpose(-1, -2)
    matrix.tril_()
    for number, panel in enumerate(panels):
        inverted, rows = matrix[..., : panel.start, : panel.start], matrix[..., panel, : panel.start]
        for part in panels[:number]:  # the columns ``part`` of the inverted triangle are zero above their diagonal
            rows[..., part] = rows[..., part.start :] @ inverted[..., part.start :, part]
        rows.copy_(-matrix[..., panel, panel] @ rows)
    return True
