"""Backends over packages that a user may have: the FP4 matmuls of QuTLASS and of FlashInfer on Blackwell.

Both take codes of two to a byte and swizzled block scales, as the other block-scaled backends do, and give bfloat16.
Neither is a dependency. What works on a device a small product finds out (probe.py).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from fp4 import ops
from fp4.backends.block_scaled import BlockScaledBackend, quantize_activation, swizzle
from fp4.backends.probe import probe
from fp4.numerics.formats import FORMATS, MXFP4, NVFP4, Format, QuantizedTensor, format_named
from fp4.numerics.rotation import identity
from fp4.scheme import Scheme

#: Codes, codes, swizzled scales ``[N', K']`` of both, a float32 factor ``[1]``, the format: bfloat16 ``[T, N]``.
_Matmul = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Format], Tensor]
_MULTIPLES = {NVFP4.name: 64, MXFP4.name: 128}  # of K, so that rows of scales need no padding


def _qutlass_matmul(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, factor: Tensor, fmt: Format) -> Tensor:
    package = importlib.import_module("qutlass")
    matmul = package.matmul_nvf4_bf16_tn if fmt == NVFP4 else package.matmul_mxf4_bf16_tn
    out: Tensor = matmul(a, b, scale_a, scale_b, factor)
    return out


def _flashinfer_matmul(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, factor: Tensor, fmt: Format) -> Tensor:
    # Its functions take the bytes of E8M0 scales, and those of E4M3 as they are.
    if fmt == MXFP4:
        scale_a, scale_b = scale_a.view(torch.uint8), scale_b.view(torch.uint8)
    out = torch.empty(a.shape[0], b.shape[0], dtype=torch.bfloat16, device=a.device)
    importlib.import_module("flashinfer").mm_fp4(
        a, b.T, scale_a, scale_b.T, factor, torch.bfloat16, out,
        block_size=fmt.block_size, use_8x4_sf_layout=False, backend="cudnn", use_nvfp4=fmt == NVFP4,
    )  # fmt: skip
    return out


def multiply(matmul: _Matmul, x: QuantizedTensor, weight: QuantizedTensor) -> Tensor:
    """Activations ``[T, K]`` and a weight ``[N, K]``, both with swizzled scales, multiplied: bfloat16 ``[T, N]``."""
    factor = torch.ones(1, dtype=torch.float64, device=x.codes.device)
    for unit in (x.global_scale, weight.global_scale):
        factor = factor if unit is None else factor * unit.reshape(1)
    return matmul(x.codes, weight.codes, x.scales, weight.scales, factor.float(), x.format)


def _swizzled(tensor: QuantizedTensor) -> QuantizedTensor:
    return tensor._replace(scales=swizzle(tensor.scales.view(torch.uint8)).view(tensor.scales.dtype))


#: The rules under which QuTLASS's own kernels round as the reference does. Its abs_max of MXFP4 is another one.
_FUSED_RULES = {NVFP4.name: "abs_max", MXFP4.name: "quest"}


def _fused_quantization(x: Tensor, fmt: Format, rotation: Tensor | None, unit: Tensor | None) -> QuantizedTensor:
    """bfloat16 x ``[T, K]`` rotated and quantized by QuTLASS's own kernels, with swizzled scales.

    Rotated values differ from the reference's in their last bits, which may move one to the neighbouring code.
    """
    package = importlib.import_module("qutlass")
    matrix = (identity(fmt.block_size) if rotation is None else rotation).to(x.device, x.dtype)
    rule = _FUSED_RULES[fmt.name]
    if unit is None:
        codes, scales = package.fusedQuantizeMx(x, matrix, method=rule)[:2]
    else:  # it takes the reciprocal
        codes, scales = package.fusedQuantizeNv(x, matrix, unit.reciprocal().float().reshape(1), method=rule)[:2]
    quantized = QuantizedTensor(codes, scales, unit, fmt)
    # Its versions of 2026 give the scales swizzled and flat; before, they were rows, padded.
    return quantized if scales.dim() == 1 else _swizzled(quantized)


@functools.cache
def _fused_matches(fmt: Format, device: torch.device) -> bool:
    """Whether the installed QuTLASS quantizes on a device as the reference does, found once by a small tensor."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    x = torch.randn(130, 256, generator=generator, device="cpu").bfloat16()
    unit = torch.tensor(0.01, dtype=torch.float64) if fmt.needs_global_scale else None
    expected = _swizzled(fmt.quantize(x, _FUSED_RULES[fmt.name], unit))
    try:
        found = _fused_quantization(x.to(device), fmt, None, None if unit is None else unit.to(device))
        codes, scales = found.codes.cpu(), found.scales.cpu().view(torch.uint8).flatten()
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return False
    # What the rows beyond the last hold is not said.
    is_row = swizzle(torch.ones(130, 256 // fmt.block_size, dtype=torch.uint8)).flatten().bool()
    theirs = expected.scales.view(torch.uint8).flatten()
    if codes.shape != expected.codes.shape or scales.shape != theirs.shape:
        return False
    different = (codes != expected.codes).float().mean() + (scales != theirs)[is_row].float().mean()
    return float(different) < 0.01  # it adds 1e-8 to the largest magnitude


class PackageBackend(BlockScaledBackend):
    """W4A4 matmuls by a package that is no dependency.

    Args:
        name: of the backend, and of the package.
        purpose: what it is used for.
        matmul: calls the package.
        fuses: whether the package's own kernels rotate and quantize where they mean the same.
        advice: how to get the package, for the reason why it cannot be used.
    """

    formats = tuple(FORMATS)
    converts = ()
    #: Kinds of devices that the package has no kernels for.
    left_to_others: tuple[str, ...] = ("cpu",)

    def __init__(self, name: str, purpose: str, matmul: _Matmul, fuses: bool, advice: str) -> None:
        self.name, self.purpose, self.advice = name, purpose, advice
        self._matmul, self._fuses = matmul, fuses
        ops.implement(name, "linear_quantized", self._run)
        super().__init__()
        self.support = functools.cache(self._support)

    def _support(self, family: str, device: torch.device) -> str | None:
        def product(x: QuantizedTensor, weight: QuantizedTensor, offsets: Tensor | None) -> Tensor:
            unit = None if weight.global_scale is None else weight.global_scale[0]
            one = QuantizedTensor(weight.codes[0], weight.scales[0], unit, weight.format)
            return multiply(self._matmul, _swizzled(x), _swizzled(one))

        return probe(self.name, FORMATS[family], False, device, product)

    def _run(
        self,
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        global_scale: Tensor | None,
        format: str,
        bias: Tensor | None,
        out_features: int,
        rotation: Tensor | None,
        input_global_scale: Tensor | None,
        rule: str,
    ) -> Tensor:
        """``ops.linear_quantized`` (W4A4)."""
        rows, fmt = x.reshape(-1, x.shape[-1]).contiguous(), format_named(format)
        if not rows.numel():
            return x.new_empty(*x.shape[:-1], out_features)
        if self._fuses and self._means_the_same(rows, fmt, rotation, input_global_scale, rule):
            activation = _fused_quantization(rows, fmt, rotation, input_global_scale)
        else:
            activation = _swizzled(quantize_activation(rows, fmt, rotation, input_global_scale, rule))
        out = multiply(self._matmul, activation, QuantizedTensor(weight, weight_scale, global_scale, fmt))
        out = out if bias is None else out + bias
        return out.to(x.dtype).view(*x.shape[:-1], out_features)

    @staticmethod
    def _means_the_same(x: Tensor, fmt: Format, rotation: Tensor | None, unit: Tensor | None, rule: str) -> bool:
        """Whether QuTLASS's kernels can rotate and quantize x: they need to know the global scale."""
        group = fmt.block_size if rotation is None else rotation.shape[0]
        known = unit is not None and unit.numel() == 1 if fmt == NVFP4 else unit is None
        fits = x.dtype == torch.bfloat16 and group in (16, 32, 64, 128) and group >= fmt.block_size
        return known and fits and rule == _FUSED_RULES[fmt.name] and _fused_matches(fmt, x.device)

    def unavailable(self) -> str | None:
        """The reason why this backend cannot run in this process, or None if it can."""
        if importlib.util.find_spec(self.name) is None:
            return f"the package {self.name} is not installed; {self.advice}"
        return None

    def refuses(self, scheme: Scheme, device: torch.device, shape: tuple[int, ...]) -> str | None:
        """The reason why this backend cannot run such a weight, or None if it can."""
        family = scheme.format.family
        if scheme.activations not in ("auto", "fp4"):
            return f"it multiplies FP4 activations alone, and this scheme's are {scheme.activations}"
        if len(shape) > 2:
            return "it multiplies single matrices, not stacks of experts"
        if device.type in self.left_to_others:
            return f"it runs on GPUs that multiply FP4, not on {device.type}"
        n, k = shape
        if k % _MULTIPLES[family] or n % 16:
            return f"N x K is {n} x {k}; it takes multiples of 16 x {_MULTIPLES[family]} in {family}"
        reason: str | None = self.support(family, device)
        return reason

    def lacks(self, fmt: Format, device: torch.device) -> str | None:
        """The reason why its quantization kernels cannot serve ``fmt``: they round rotated values alone."""
        return "its kernels rotate what they quantize"

    def prefers_quantized_input(self, device: torch.device) -> bool:
        """Whether it is fastest on ``device`` with activations in the format of the weight."""
        return True


def package_backends() -> tuple[PackageBackend, ...]:
    """The backends of this file; to be called once, since each registers its operators."""
    return (
        PackageBackend(
            "qutlass",
            "FP4 activations on Blackwell where torch refuses them; rotates and quantizes them in one kernel",
            _qutlass_matmul,
            True,
            "build it from github.com/IST-DASLab/qutlass on a machine with CUDA 12.8",
        ),
        PackageBackend(
            "flashinfer",
            "FP4 activations on Blackwell where torch and QuTLASS refuse them",
            _flashinfer_matmul,
            False,
            "pip install flashinfer-python",
        ),
    )
