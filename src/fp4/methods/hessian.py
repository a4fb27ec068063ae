"""The quadratic objective of a layer: what rounding its weight costs in outputs, from the second moments of its inputs.

For tokens X that a layer was meant to read and Q that it multiplies with (the quantized prefix, rounded to FP4), the
output error of a weight V in place of W is ``|X W^T - Q V^T|^2 = tr((V - W') H (V - W')^T) + const`` with ``H = Q^T Q``
and ``W' = W C H^-1``, ``C = X^T Q``. So the weight is first shifted to W', then rounded against H. (GPTQ, arXiv
2210.17323, is the case X = Q; the shift to the unquantized target is that of GPTAQ, arXiv 2504.02692, in closed form.)
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from fp4.calibration.observers import SecondMoments
from fp4.errors import NotQuantizable
from fp4.methods.grid import reordered

logger = logging.getLogger("fp4")

_LARGEST_DAMPING = 1.0  # as a share of the mean diagonal
_PANEL = 128  # columns that are factorised at once; the rest is matrix products


class Objective(NamedTuple):
    """What rounding is measured by.

    Attributes:
        diagonal: of the damped Hessian, float32 ``[..., K]``.
        order: in which columns are rounded, int64 ``[..., K]``.
        factor: of the inverse of the Hessian in that order: lower V ``[..., K, K]`` with ``V V^T = H^-1``. Column j
            holds how an error in the j-th column spreads to later ones.
        hessian: damped, symmetric, in the order of the weight: ``[..., K, K]`` float32. None where it was not kept.
    """

    diagonal: Tensor
    order: Tensor
    factor: Tensor
    hessian: Tensor | None


def objective(moments: SecondMoments, damping: float, name: str, block_size: int = 1, keep: bool = True) -> Objective:
    """The damped mean Hessian of a layer, factorised in the order of falling diagonal.

    Channels that were never active get the mean diagonal: nothing couples to them, so they are rounded to nearest.
    Where the factorisation fails it is tried again with ten times the damping.

    Args:
        block_size: of neighbouring columns that stay together in the order, sorted by their mean.
        keep: the Hessian beside its factor. Otherwise the factor takes the place of ``moments.hessian``, which is lost;
            of matrices as large there is no other then.

    Raises:
        NotQuantizable: the Hessian of ``name`` holds NaN or infinity, or cannot be factorised at any damping.
    """
    count = max(moments.count, 1)
    hessian = moments.hessian / count if keep else moments.hessian.div_(count)
    if not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(hessian)):
        raise NotQuantizable(
            f"the Hessian of {name} holds NaN or infinity because its inputs overflow; check the calibration data and "
            "the layers before it",
            name,
        )
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(dim=-1, keepdim=True)
    mean = torch.where(mean > 0, mean, 1.0)
    dense = torch.where(diagonal > 0, diagonal, mean)
    diagonal.copy_(dense)
    groups = dense.unflatten(-1, (-1, block_size)).mean(dim=-1)
    order = torch.argsort(groups, dim=-1, descending=True, stable=True)[..., None] * block_size
    order = (order + torch.arange(block_size, device=order.device)).flatten(-2)
    factor = hessian.clone() if keep else hessian
    _reorder_(factor, order)
    on_factor, ordered = factor.diagonal(dim1=-2, dim2=-1), dense.gather(-1, order)
    share = damping
    while share <= max(damping, _LARGEST_DAMPING):
        on_factor.copy_(ordered + share * mean)
        if invert_lower_(factor):
            if share > damping:
                logger.info("%s: Hessian damped by %g of its mean diagonal", name, share)
            diagonal = dense + share * mean
            if keep:
                hessian.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
            return Objective(diagonal, order, factor, hessian if keep else None)
        _mirror_(factor)
        share = max(10 * share, 1e-6)
    raise NotQuantizable(
        f"the Hessian of {name} cannot be factorised at any damping; give other or more calibration data", name
    )


def _panels(size: int) -> list[slice]:
    return [slice(start, min(start + _PANEL, size)) for start in range(0, size, _PANEL)]


def _reorder_(matrix: Tensor, order: Tensor) -> None:
    """Rows and columns of ``matrix`` ``[..., K, K]`` in ``order``, in place."""
    for panel in _panels(matrix.shape[-1]):
        matrix[..., panel, :] = reordered(matrix[..., panel, :], order, -1)
    for panel in _panels(matrix.shape[-1]):
        matrix[..., panel] = reordered(matrix[..., panel], order, -2)


def _mirror_(matrix: Tensor) -> None:
    """The strict upper triangle onto the lower one."""
    for panel in _panels(matrix.shape[-1]):
        above = matrix[..., panel, panel.start :].triu(1)
        matrix[..., panel.start :, panel] = matrix[..., panel.start :, panel].triu(1) + above.transpose(-1, -2)


def invert_lower_(matrix: Tensor) -> bool:
    """Turns a symmetric ``matrix`` ``[..., K, K]`` into lower V with ``V V^T = matrix^-1``, in place, by panels.

    First lower Q with ``Q^T Q = matrix`` (a Cholesky factorisation from the last row to the first), then ``V = Q^-1``:
    half the work of inverting the matrix and factorising that.

    Returns:
        False if it is not positive definite in its precision; the strict upper triangle is as it was then.
    """
    panels = _panels(matrix.shape[-1])
    for panel in reversed(panels):
        start, stop = panel.start, panel.stop
        known = matrix[..., stop:, :stop]
        left = matrix[..., panel, :stop] - known[..., panel].transpose(-1, -2) @ known
        flipped, info = torch.linalg.cholesky_ex(left[..., panel].flip(-1, -2))
        if bool(info.any()) or not bool(torch.isfinite(flipped).all()):
            return False
        upper = flipped.flip(-1, -2)
        inverse = torch.linalg.solve_triangular(upper, torch.eye(stop - start).to(upper), upper=True)
        # What is left of a panel is multiplied with the inverse, faster than solved: V has it on its diagonal anyway.
        matrix[..., panel, :start] = inverse @ left[..., :start]
        matrix[..., panel, panel] = matrix[..., panel, panel].triu(1) + inverse.transpose(-1, -2)
    matrix.tril_()
    for number, panel in enumerate(panels):
        before, own = matrix[..., : panel.start, : panel.start], matrix[..., panel, : panel.start]
        for part in panels[:number]:  # above it ``before`` is zero
            own[..., part] = own[..., part.start :] @ before[..., part.start :, part]
        own.copy_(-matrix[..., panel, panel] @ own)
    return True


def shifted(weight: Tensor, moments: SecondMoments, goal: Objective, share: float) -> Tensor:
    """``W + share (W' - W)`` with the damped Hessian: weight ``[..., N, K]`` -> the same shape, float32 if shifted.

    ``moments`` are those that ``goal`` was made of and kept.
    """
    if moments.cross is None or share == 0:
        return weight
    weight = weight.float()
    difference = (moments.cross - moments.hessian).float() / max(moments.count, 1)
    ordered = reordered(weight @ difference, goal.order, -1)
    correction = ordered @ goal.factor @ goal.factor.transpose(-1, -2)
    return weight + share * reordered(correction, goal.order.argsort(dim=-1), -1)
