"""QuTLASS and FlashInfer as backends, against stand-ins with their functions' names, arguments and meaning.

The stand-ins compute in float64 from the documented layout of block scales (tests/helpers/scaled_mm.py), and quantize
by the formulas of QuTLASS's own tests.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from scaled_mm import codes_of, scale_values, unswizzled
from torch import Tensor, nn

from fp4 import backends
from fp4.backends import packages
from fp4.nn import FP4Linear
from fp4.numerics.formats import FORMATS, MXFP4, NVFP4, Format
from fp4.scheme import Scheme

CPU = torch.device("cpu")
FORMAT = pytest.mark.parametrize("fmt", list(FORMATS.values()), ids=list(FORMATS))
NAMES = pytest.mark.parametrize("name", ["qutlass", "flashinfer"])


def values_of(codes: Tensor, scales: Tensor, block: int) -> Tensor:
    values = codes_of(codes.contiguous().view(torch.float4_e2m1fn_x2))
    return values * unswizzled(scales, values.shape[0], values.shape[1] // block).repeat_interleave(block, dim=1)


def product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, alpha: Tensor, block: int) -> Tensor:
    assert a.dtype == b.dtype == torch.uint8
    assert (alpha.dtype, alpha.shape) == (torch.float32, (1,))
    return (values_of(a, scale_a, block) @ values_of(b, scale_b, block).T * float(alpha)).bfloat16()


def quantized(x: Tensor, matrix: Tensor, fmt: Format, scale: float) -> tuple[Tensor, Tensor]:
    """The formulas of QuTLASS's tests: codes, and scales in rows."""
    assert x.dtype == matrix.dtype == torch.bfloat16
    rotated = (x.double().unflatten(-1, (-1, matrix.shape[0])) @ matrix.double()).flatten(-2)
    blocks = rotated.unflatten(-1, (-1, fmt.block_size))
    if fmt == NVFP4:
        scales = ((blocks.abs().amax(-1) + 1e-8) * scale / 6).float().to(torch.float8_e4m3fn)
    else:
        scales = (blocks.std(-1, correction=0) * (2.92247856 / 6) + 1e-8).log2().floor().exp2()
        scales = scales.float().to(torch.float8_e8m0fnu)
    quotients = (blocks * scale / scale_values(scales)[..., None]).flatten(-2).float()
    return fmt.element.encode(quotients), scales


class Package:
    """What both packages offer of what is used, and how often it was called."""

    def __init__(self, flat: bool) -> None:
        self.flat = flat  # whether scales come swizzled, as in newer versions
        self.fused = self.products = 0

    def _scales(self, scales: Tensor) -> Tensor:
        padded = torch.full((-(-scales.shape[0] // 128) * 128, -(-scales.shape[1] // 4) * 4), 0x7F, dtype=torch.uint8)
        padded[: scales.shape[0], : scales.shape[1]] = scales.view(torch.uint8)
        if self.flat:
            outer, inner = torch.arange(padded.shape[0])[:, None], torch.arange(padded.shape[1])[None, :]
            tile = outer // 128 * (padded.shape[1] // 4) + inner // 4
            at = tile * 512 + outer % 32 * 16 + outer % 128 // 32 * 4 + inner % 4
            flat = torch.empty(padded.numel(), dtype=torch.uint8)
            flat[at.flatten()] = padded.flatten()
            padded = flat
        return padded.view(scales.dtype)

    def fusedQuantizeMx(self, a: Tensor, b: Tensor, *, method: str = "quest") -> tuple[Tensor, Tensor]:  # noqa: N802
        assert method == "quest"
        self.fused += 1
        codes, scales = quantized(a, b, MXFP4, 1.0)
        return codes, self._scales(scales)

    def fusedQuantizeNv(  # noqa: N802
        self, a: Tensor, b: Tensor, global_scale: Tensor, *, method: str = "abs_max"
    ) -> tuple[Tensor, Tensor]:
        assert method == "abs_max"
        assert (global_scale.dtype, global_scale.shape) == (torch.float32, (1,))
        self.fused += 1
        codes, scales = quantized(a, b, NVFP4, float(global_scale))
        return codes, self._scales(scales)

    def matmul_nvf4_bf16_tn(self, a: Tensor, b: Tensor, a_sf: Tensor, b_sf: Tensor, alpha: Tensor) -> Tensor:
        self.products += 1
        return product(a, b, a_sf, b_sf, alpha, 16)

    def matmul_mxf4_bf16_tn(self, a: Tensor, b: Tensor, a_sf: Tensor, b_sf: Tensor, alpha: Tensor) -> Tensor:
        self.products += 1
        return product(a, b, a_sf, b_sf, alpha, 32)

    def mm_fp4(
        self, a: Tensor, b: Tensor, a_descale: Tensor, b_descale: Tensor, alpha: Tensor, out_dtype: torch.dtype,
        out: Tensor, block_size: int, use_8x4_sf_layout: bool, backend: str, use_nvfp4: bool,
    ) -> Tensor:  # fmt: skip
        self.products += 1
        assert (out_dtype, use_8x4_sf_layout, use_nvfp4) == (torch.bfloat16, False, block_size == 16)
        kind = torch.float8_e4m3fn if use_nvfp4 else torch.uint8
        assert a_descale.dtype == b_descale.dtype == kind
        read = torch.float8_e4m3fn if use_nvfp4 else torch.float8_e8m0fnu
        scale_a, scale_b = a_descale.view(read), b_descale.T.view(read)
        assert scale_b.is_contiguous()
        return out.copy_(product(a, b.T, scale_a, scale_b, alpha, block_size))


@pytest.fixture(params=[False, True], ids=["scales in rows", "swizzled scales"])
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Package]:
    """Both packages installed, and multiplying on the CPU."""
    stand_in = Package(request.param)
    for name in ("qutlass", "flashinfer"):
        module: Any = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        for function in (f for f in dir(stand_in) if not f.startswith("__")):
            setattr(module, function, getattr(stand_in, function))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(packages.PackageBackend, "left_to_others", ())
    forget()
    yield stand_in
    forget()


def forget() -> None:
    packages._fused_matches.cache_clear()
    for name in ("qutlass", "flashinfer"):
        backends.named(name).support.cache_clear()  # type: ignore[attr-defined]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def close(found: Tensor, expected: Tensor, least: float = 2**-6) -> None:
    assert found.dtype == expected.dtype
    assert float((found.float() - expected.float()).norm() / expected.float().norm()) <= least


@NAMES
@FORMAT
def test_a_linear_is_the_reference(name: str, fmt: Format, package: Package) -> None:
    dense = nn.Linear(256, 48).bfloat16()
    module = FP4Linear.from_linear(dense, Scheme(fmt, activations="fp4"), name)
    assert module.backend.name == name
    reference = FP4Linear.from_linear(dense, Scheme(fmt, activations="fp4"), "reference")
    x = random(2, 65, 256)
    with torch.no_grad():
        close(module(x), reference(x), 2**-8)
        assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))
    assert package.products
    assert not package.fused  # a dynamic global scale, and a rule that means something else in QuTLASS


@FORMAT
@pytest.mark.parametrize("group", [None, 32, 128])
def test_qutlass_rotates_and_quantizes(fmt: Format, group: int | None, package: Package) -> None:
    from fp4.numerics.rotation import gsr

    backend = backends.named("qutlass")
    rule, unit = ("abs_max", torch.tensor(0.003, dtype=torch.float64)) if fmt == NVFP4 else ("quest", None)
    weight, turn = fmt.quantize(random(48, 256)), None if group is None else gsr(group).bfloat16().float()
    arguments = (weight.global_scale, fmt, None, 48, turn, unit, rule)
    x = random(130, 256, seed=2)
    expected = backends.REFERENCE.linear_quantized(x, weight.codes, weight.scales, *arguments)
    packed = backend.pack(weight.codes, weight.scales, fmt)
    found = backend.linear_quantized(x, *packed, *arguments)
    assert package.fused == 2  # once to see that it means the same
    close(found, expected, 0.02)
    assert package.products == 1
    close(backend.linear_quantized(x.half(), *packed, *arguments), expected.half(), 0.02)
    assert package.fused == 2  # its kernels take bfloat16


@FORMAT
def test_a_qutlass_that_quantizes_otherwise_multiplies_alone(
    fmt: Format, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "_fused_quantization", lambda *a: right(*a)._replace(scales=a[0].new_zeros(8)))
    right = packages._fused_quantization
    assert not packages._fused_matches(fmt, CPU)


@NAMES
def test_what_they_refuse(name: str, package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backends.named(name)
    refusals = {
        (Scheme(NVFP4, activations="model"), (64, 128)): "FP4 activations alone",
        (Scheme(NVFP4), (4, 64, 128)): "single matrices",
        (Scheme(NVFP4), (64, 96)): "N x K is 64 x 96; it takes multiples of 16 x 64 in nvfp4",
        (Scheme(MXFP4), (64, 64)): "multiples of 16 x 128 in mxfp4",
    }
    for (scheme, shape), reason in refusals.items():
        assert reason in str(backend.refuses(scheme, CPU, shape))
    assert backend.refuses(Scheme(NVFP4), CPU, (64, 128)) is None
    monkeypatch.setattr(packages.PackageBackend, "left_to_others", ("cpu",))
    assert "it runs on GPUs that multiply FP4, not on cpu" in str(backend.refuses(Scheme(NVFP4), CPU, (64, 128)))


@NAMES
def test_a_wrong_product_is_refused(name: str, package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    for function in ("matmul_nvf4_bf16_tn", "mm_fp4"):
        right = getattr(sys.modules[name], function)
        monkeypatch.setattr(sys.modules[name], function, lambda *a, right=right, **k: right(*a, **k).mul_(1.05))
    assert f"{name}'s product of nvfp4 on cpu is wrong" in str(
        backends.named(name).refuses(Scheme(NVFP4), CPU, (64, 128))
    )


@NAMES
def test_where_they_are_not_installed(name: str) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    assert f"the package {name} is not installed; " in str(backends.named(name).unavailable())
    with pytest.raises(ValueError, match=f"backend '{name}' cannot run nvfp4 .* the package {name} is not installed"):
        backends.select(Scheme(NVFP4), CPU, (64, 128), name)
