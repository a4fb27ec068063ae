"""The list of backends, and the choice of one for a weight.

A module chooses once, when its weights arrive on a device, and never in ``forward``.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from fp4.backends.base import Backend
from fp4.backends.cpu import CpuBackend
from fp4.backends.cutlass import CutlassBackend
from fp4.backends.packages import package_backends
from fp4.backends.reference import ReferenceBackend
from fp4.backends.scaled_mm import ScaledMMBackend
from fp4.backends.triton import TritonBackend
from fp4.numerics.formats import NVFP4, Format
from fp4.scheme import Scheme

logger = logging.getLogger("fp4")

#: The order of ``auto``: the first that does not refuse a weight is chosen. Kernels that many have run come first.
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        ScaledMMBackend(),  # torch's products, wherever a probe finds that they multiply the format
        *package_backends(),  # QuTLASS and FlashInfer, where a user has them
        CutlassBackend(),  # Blackwell: shapes and stacks of experts that torch refuses
        CpuBackend(),
        TritonBackend(),  # any GPU from compute capability 8.0: unquantized activations, and what the others refuse
        ReferenceBackend(),
    )
}
REFERENCE = BACKENDS["reference"]


@functools.cache
def _log_once(message: str) -> None:
    logger.info(message)


def named(name: str) -> Backend:
    """The one instance of the backend called ``name``, a key of ``BACKENDS``."""
    return BACKENDS[name]


def _reason_against(backend: Backend, scheme: Scheme, device: torch.device, shape: tuple[int, ...]) -> str | None:
    if scheme.format.family not in backend.formats:
        return f"it has no kernels for {scheme.format.name}"
    return backend.unavailable() or backend.refuses(scheme, device, shape)


def for_device(device: torch.device, fmt: Format = NVFP4) -> Backend:
    """The backend whose quantize and dequantize kernels serve tensors in ``fmt`` on ``device``."""
    return next(
        b for b in BACKENDS.values() if fmt.family in b.formats and not b.unavailable() and not b.lacks(fmt, device)
    )


def largest_magnitude(x: Tensor) -> Tensor:
    """The largest magnitude of each matrix, by the kernel for its device: x ``[..., N, K]`` -> float32 ``[...]``."""
    return for_device(x.device).largest_magnitude(x)


def select(
    scheme: Scheme, device: torch.device, shape: tuple[int, ...], preference: str = "auto"
) -> tuple[Backend, bool]:
    """Choose the backend for a weight.

    Args:
        scheme: the scheme of the layer.
        device: where the weight is.
        shape: the weight's shape ``[..., N, K]``.
        preference: ``"auto"``, or the name of the backend that must run it.

    Returns:
        the backend, and whether activations are quantized (to ``scheme.input_format``).

    Raises:
        ValueError: ``preference`` names a backend that is unknown or cannot run this weight here; the message says why.
    """
    if preference != "auto":
        if preference not in BACKENDS:
            raise ValueError(f"backend {preference!r} is unknown; use 'auto' or one of {', '.join(BACKENDS)}")
        chosen = BACKENDS[preference]
        reason = _reason_against(chosen, scheme, device, shape)
        if reason is not None:
            raise ValueError(f"backend {preference!r} cannot run {scheme.format.name} {shape} on {device}: {reason}")
    else:
        chosen = next(b for b in BACKENDS.values() if _reason_against(b, scheme, device, shape) is None)
    asked = scheme.activations in ("fp4", "fp8")
    quantizes = asked or (scheme.activations == "auto" and chosen.prefers_quantized_input(device))
    kind = scheme.input_format.kind
    left = f"unquantized activations, since nothing here multiplies {kind} ones natively"
    how = f"{kind} activations" if quantizes else left if scheme.activations == "auto" else "unquantized activations"
    _log_once(f"{scheme.format.name} weights on {device.type} run through the {chosen.name} backend, {how}")
    return chosen, quantizes
