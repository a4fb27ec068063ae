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

logger = logging.getLogger("fp4")

_LARGEST_DAMPING = 1.0  # as a share of the mean diagonal
_SMALL = 128  # rows of a triangular matrix that are inverted at once


class Objective(NamedTuple):
    """What rounding is measured by.

    Attributes:
        hessian: damped, symmetric, positive definite: ``[..., K, K]`` float32.
        factor: its lower Cholesky factor, the same shape.
        damping: what was added to the diagonal, as a share of its mean.
    """

    hessian: Tensor
    factor: Tensor
    damping: float


def objective(moments: SecondMoments, damping: float, name: str) -> Objective:
    """The damped mean Hessian of a layer, and its factor.

    Channels that were never active get the mean diagonal: nothing couples to them, so they are rounded to nearest.
    Where the factorisation fails in float32 it is tried in float64, then with ten times the damping.

    Raises:
        ValueError: the Hessian of ``name`` holds NaN or infinity, or cannot be factorised at any damping.
    """
    hessian = moments.hessian / max(moments.count, 1)
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError(
            f"the Hessian of {name} holds NaN or infinity: its inputs overflow. Check the calibration data and the "
            "layers before it, or leave the layer out with --skip"
        )
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(dim=-1, keepdim=True)
    mean = torch.where(mean > 0, mean, 1.0)
    diagonal.copy_(torch.where(diagonal > 0, diagonal, mean))
    share = damping
    while share <= max(damping, _LARGEST_DAMPING):
        for dtype in (torch.float32, torch.float64):
            damped = hessian.to(dtype) + torch.diag_embed((share * mean).to(dtype).expand(diagonal.shape))
            factor, info = torch.linalg.cholesky_ex(damped)
            if not bool(info.any()) and bool(torch.isfinite(factor).all()):
                if share > damping:
                    logger.info("%s: Hessian damped by %g of its mean diagonal", name, share)
                return Objective(damped.float(), factor.float(), share)
        share = max(10 * share, 1e-6)
    raise ValueError(f"the Hessian of {name} cannot be factorised at any damping; leave the layer out with --skip")


def upper_factor(hessian: Tensor, name: str) -> Tensor:
    """Upper U with ``U^T U = hessian^-1``, ``[..., K, K]``: row j holds how an error in column j spreads to later ones.

    With ``hessian = R R^T``, R upper (a Cholesky factorisation from the last row to the first), U is ``R^-1``: half the
    work of inverting the Hessian and factorising that.
    """
    for dtype in (hessian.dtype, torch.float64):
        lower, info = torch.linalg.cholesky_ex(hessian.flip(-1, -2).to(dtype))
        if not bool(info.any()):
            return _inverse_of_upper(lower.flip(-1, -2)).to(hessian.dtype)
    raise ValueError(f"the Hessian of {name} is not positive definite; raise the damping")


def _inverse_of_upper(matrix: Tensor) -> Tensor:
    """By halves, so that nearly all of it is matrix products: no library call knows that the result is triangular."""
    size = matrix.shape[-1]
    if size <= _SMALL:
        return torch.linalg.solve_triangular(matrix, torch.eye(size).to(matrix), upper=True)
    first, last = slice(0, size // 2), slice(size // 2, size)
    inverse = torch.zeros_like(matrix)
    inverse[..., first, first] = _inverse_of_upper(matrix[..., first, first])
    inverse[..., last, last] = _inverse_of_upper(matrix[..., last, last])
    inverse[..., first, last] = -inverse[..., first, first] @ (matrix[..., first, last] @ inverse[..., last, last])
    return inverse


def shifted(weight: Tensor, moments: SecondMoments, goal: Objective, share: float) -> Tensor:
    """``W + share (W' - W)`` with the damped Hessian: weight ``[..., N, K]`` float32 -> the same shape."""
    if moments.cross is None or share == 0:
        return weight
    difference = (moments.cross - moments.hessian).float() / max(moments.count, 1)
    correction = torch.cholesky_solve((weight @ difference).transpose(-1, -2), goal.factor).transpose(-1, -2)
    return weight + share * correction
