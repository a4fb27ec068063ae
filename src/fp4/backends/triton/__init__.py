"""The Triton backend: packed FP4 weights on NVIDIA GPUs from compute capability 8.0 and on some of AMD's."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fp4 import ops
from fp4.backends.base import Backend
from fp4.backends.triton import layout
from fp4.numerics.formats import Format, QuantizedTensor
from fp4.scheme import Scheme

#: AMD's GPUs that the kernels were compiled for, without having been run.
AMD = ("gfx942", "gfx950", "gfx1100")
# Triton's interpreter runs the kernels on the CPU, which the tests use where there is no GPU.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """A wrapper that makes the first argument's device the current one.

    Triton launches on the current device, which may be another than that of the tensors.
    """

    @functools.wraps(function)
    def run(x: Tensor, *arguments: Any, **options: Any) -> Any:
        if x.device.index == torch.cuda.current_device():
            return function(x, *arguments, **options)
        with torch.cuda.device(x.device):
            return function(x, *arguments, **options)

    return run


def _register() -> str | None:
    """Register the operators; return the reason if that is impossible, else None."""
    try:
        import triton.language  # noqa: F401  (a folder called triton is a package to Python as well)
    except ImportError as error:
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed; CUDA builds of torch for Linux bring it"
        return f"the package triton cannot be imported: {error}"
    from fp4.backends.triton import largest_magnitude, linear, quantize

    functions = (
        linear.linear, linear.linear_quantized, linear.grouped_linear, linear.grouped_linear_quantized,
        quantize.quantize, quantize.dequantize, largest_magnitude.largest_magnitude,
    )  # fmt: skip
    for function in functions:
        ops.implement("triton", function.__name__, _on_its_device(function), "CUDA")
        if _INTERPRETED:
            ops.implement("triton", function.__name__, function, "CPU")
    return None


_UNAVAILABLE = _register()


class TritonBackend(Backend):
    """Weight-only and W4A4 matmuls on NVIDIA GPUs; layout.py describes the layout of packed weights."""

    name = "triton"
    purpose = "unquantized activations on GPUs from compute capability 8.0"
    keeps_layout = False

    def unavailable(self) -> str | None:
        """The reason why this backend cannot run in this process, or None if it can."""
        if _UNAVAILABLE is None and not _INTERPRETED and not torch.cuda.is_available():
            return "no CUDA device is visible"
        return _UNAVAILABLE

    def refuses(self, scheme: Scheme, device: torch.device, shape: tuple[int, ...]) -> str | None:
        """The reason why this backend cannot run such a weight, or None if it can."""
        refusal = super().refuses(scheme, device, shape)
        if refusal is not None:
            return refusal
        if _INTERPRETED and device.type == "cpu":
            return None
        if device.type != "cuda":
            return f"it runs on GPUs, not on {device.type}"
        if torch.version.hip is not None:
            name = str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
            return None if name in AMD else f"its kernels were compiled for {', '.join(AMD)}, and this GPU is {name}"
        major, minor = torch.cuda.get_device_capability(device)
        return None if major >= 8 else f"it needs compute capability 8.0, this device has {major}.{minor}"

    def prefers_quantized_input(self, device: torch.device) -> bool:
        """Whether it is fastest on ``device`` with activations in the format of the weight."""
        if self.unavailable() is not None:
            return False
        from fp4.backends.triton import linear

        return linear.has_fp4_tensor_cores(device)

    def quantize_activation(
        self,
        x: Tensor,
        fmt: Format,
        rotation: Tensor | None,
        global_scale: Tensor | None,
        rule: str,
        offsets: Tensor | None = None,
    ) -> QuantizedTensor:
        """Activations rotated and quantized in one pass, as :meth:`.Backend.quantize_activation` describes."""
        from fp4.backends.triton import quantize

        if fmt != fmt.base or not x.numel():
            return super().quantize_activation(x, fmt, rotation, global_scale, rule, offsets)
        run = quantize.quantize_activation if _INTERPRETED else _on_its_device(quantize.quantize_activation)
        mode = quantize.CANONICAL.value
        codes, scales, unit = run(x.contiguous(), fmt, rotation, global_scale, rule, mode, offsets=offsets)
        assert scales is not None
        unit = unit.reshape(()) if unit is not None and unit.numel() == 1 else unit
        return QuantizedTensor(codes, scales.view(fmt.scale_dtype), unit, fmt)

    def lay_out(self, codes: Tensor, scales: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
        """Canonical codes and scales in the layout that the class describes."""
        return layout.pack(codes, scales, fmt.block_size)

    def canonical(self, weight: Tensor, weight_scale: Tensor, fmt: Format, out_features: int) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`lay_out`."""
        return layout.unpack(weight, weight_scale, fmt.block_size, out_features)
