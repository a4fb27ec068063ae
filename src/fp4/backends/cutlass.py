"""The CUTLASS backend: block-scaled matmuls on Blackwell's FP4 tensor cores (csrc/cuda)."""

from __future__ import annotations

import importlib

import torch

from fp4 import ops  # noqa: F401  (the operators' schemas, which the library implements)
from fp4.backends.block_scaled import BlockScaledBackend
from fp4.numerics.formats import Format
from fp4.scheme import Scheme

_K_MULTIPLE = 32  # codes in 16 bytes, the granularity of the tensor memory accelerator
_N_MULTIPLE = 8  # 16-bit results in 16 bytes
_ROTATIONS = (16, 32, 64, 128)
_RULES = ("abs_max", "mse", "four_over_six", "even", "ceil", "below_six", "quest")

try:
    importlib.import_module("fp4._C_cuda")
    _UNAVAILABLE = None
except ImportError as error:
    _UNAVAILABLE = (
        "the CUDA kernels were not built with this installation; reinstall with FP4_CUDA=1 where nvcc 12.8 or newer is "
        f"at hand, or with FP4_CUDA=pypi, which downloads it ({error})"
    )


# Asked once, since torch.compile cannot trace an operator that returns text.
_ARCHITECTURES = () if _UNAVAILABLE else tuple(str(torch.ops.fp4.cutlass_architectures()).split(";"))
_CONFIGURATIONS = () if _UNAVAILABLE else tuple(str(torch.ops.fp4.cutlass_configurations()).split(";"))


def architectures() -> tuple[str, ...]:
    """The GPU architectures that the kernels were compiled for (``"100a"``, ``"120a"``); empty if not built."""
    return _ARCHITECTURES


def configurations() -> tuple[str, ...]:
    """The compiled configurations of the matmul, among ``small``, ``large`` and ``grouped``; empty if not built."""
    return _CONFIGURATIONS


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``architecture`` runs on a GPU of this compute capability."""
    major, minor = capability
    number = int(architecture.rstrip("af"))
    if architecture.endswith("a"):
        return number == 10 * major + minor
    return number // 10 == major and number % 10 <= minor


def _multiplies_fp4(architecture: str) -> bool:
    return architecture[-1] in "af" and int(architecture[:-1]) >= 100


class CutlassBackend(BlockScaledBackend):
    """W4A4 matmuls on Blackwell: one kernel rotates and quantizes activations, and another multiplies.

    In its layout ``weight`` holds the canonical codes, and ``weight_scale`` the block scales in their own dtype and in
    the order in which the tensor cores read them (:func:`.swizzle`).
    """

    name = "cutlass"
    purpose = "FP4 activations on Blackwell: shapes and experts that torch refuses"

    def unavailable(self) -> str | None:
        """The reason why this backend cannot run in this process, or None if it can."""
        if _UNAVAILABLE is not None:
            return _UNAVAILABLE
        if not torch.cuda.is_available():
            what = "has no CUDA GPU" if torch.version.cuda else "was built without CUDA"
            built = ", ".join(f"sm_{a}" for a in architectures())
            return f"this torch {what}; the kernels are built for {built}"
        return None

    def refuses(self, scheme: Scheme, device: torch.device, shape: tuple[int, ...]) -> str | None:
        """The reason why this backend cannot run such a weight, or None if it can."""
        if device.type != "cuda":
            return f"it runs on Blackwell GPUs, not on {device.type}"
        if scheme.activations not in ("auto", "fp4"):
            return f"it multiplies FP4 activations alone, and this scheme's are {scheme.activations}"
        needed = {"grouped"} if len(shape) > 2 else {"small", "large"}
        if not needed & set(configurations()):
            return f"it was built without its {' or '.join(sorted(needed))} kernels (FP4_CUDA_CONFIGURATIONS)"
        return self._refuses_gpu(torch.cuda.get_device_capability(device)) or self._refuses_shape(scheme, shape)

    def lacks(self, fmt: Format, device: torch.device) -> str | None:
        """The reason why its quantization kernels cannot serve ``fmt`` on ``device``, or None if they can."""
        # The quantization kernels use no FP4 tensor cores, so any GPU that they were compiled for runs them.
        if device.type != "cuda":
            return f"it runs on GPUs, not on {device.type}"
        capability = torch.cuda.get_device_capability(device)
        if any(_runs_on(a, capability) for a in architectures()):
            return None
        return f"its kernels were built for {', '.join(architectures())}, not for {capability[0]}.{capability[1]}"

    @staticmethod
    def _refuses_gpu(capability: tuple[int, int]) -> str | None:
        named = f"{capability[0]}.{capability[1]}"
        if capability[0] < 10:
            return f"the GPU has compute capability {named}; tensor cores multiply FP4 from 10.0 (Blackwell)"
        usable = [a for a in architectures() if _multiplies_fp4(a)]
        if not any(_runs_on(a, capability) for a in usable):
            name = "".join(map(str, capability)) + "a"
            built = ", ".join(usable) or "no architecture that multiplies FP4"
            return (
                f"the GPU has compute capability {named}, and the kernels were built for {built}; reinstall with "
                + (f"FP4_CUDA=1 FP4_CUDA_ARCHS={name}")
            )
        return None

    @staticmethod
    def _refuses_shape(scheme: Scheme, shape: tuple[int, ...]) -> str | None:
        n, k = shape[-2:]
        if k % _K_MULTIPLE:
            return f"K is {k}; FP4 tensor cores want a multiple of {_K_MULTIPLE}"
        if n % _N_MULTIPLE:
            return f"N is {n}; results are stored {_N_MULTIPLE} at a time, so it must be a multiple of that"
        if scheme.rotation != "identity" and scheme.group_size not in _ROTATIONS:
            return f"the rotation has size {scheme.group_size}; its kernel knows {', '.join(map(str, _ROTATIONS))}"
        if scheme.activation_rule not in _RULES:
            return f"it has no kernel for the scale rule {scheme.activation_rule!r}"
        return None

    def prefers_quantized_input(self, device: torch.device) -> bool:
        """Whether it is fastest on ``device`` with activations in the format of the weight."""
        return True
