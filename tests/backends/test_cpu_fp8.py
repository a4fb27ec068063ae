"""The compiled CPU kernels for FP8 weights against float64 arithmetic on what ``formats.dequantize`` says they mean."""

from __future__ import annotations

import itertools
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from products import DTYPES, assert_product, rotated
from torch import Tensor

from fp4.backends import cpu
from fp4.numerics import formats, rotation
from fp4.numerics.formats import FP8, QuantizedTensor

BACKEND = cpu.CpuBackend()
pytestmark = pytest.mark.skipif(BACKEND.unavailable() is not None, reason=str(BACKEND.unavailable()))

ops = torch.ops.fp4


def random_weight(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> QuantizedTensor:
    """Every code but NaN, under scales of a wide range."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 254, shape, generator=generator)
    codes += codes >= 127  # 0x7F and 0xFF are NaN
    scales = torch.randn((*shape[:-1], 1), generator=generator).mul(2).exp2() / 448
    return QuantizedTensor(codes.to(torch.uint8).view(torch.float8_e4m3fn), scales.to(dtype), None, FP8)


def packed(weight: QuantizedTensor) -> tuple[Tensor, Tensor, None, str]:
    return *BACKEND.pack(weight.codes, weight.scales, weight.format), None, weight.format.name


# K need not be a multiple of anything; 256 and 257 cross the border of a chunk.
shapes = st.tuples(st.integers(0, 40), st.integers(1, 70), st.one_of(st.integers(1, 70), st.sampled_from([256, 257])))
dtypes = st.sampled_from(DTYPES)


@settings(max_examples=80, deadline=None)
@given(shapes, dtypes, dtypes, st.booleans(), st.integers(0, 1000))
def test_linear(
    shape: tuple[int, int, int], dtype: torch.dtype, scale_dtype: torch.dtype, has_bias: bool, seed: int
) -> None:
    m, n, k = shape
    torch.manual_seed(seed)
    weight = random_weight(n, k, dtype=scale_dtype, seed=seed)
    x = (torch.randn(m, k) * 0.1).to(dtype)
    bias = torch.randn(n).to(dtype) if has_bias else None
    out = ops.cpu_linear(x, *packed(weight), bias, n)
    assert out.dtype == dtype
    assert_product(out, x, formats.dequantize(*weight), bias)


@settings(max_examples=30, deadline=None)
@given(shapes, dtypes, st.sampled_from([1, 4, 16, 64]), st.integers(0, 1000))
def test_linear_rotates(shape: tuple[int, int, int], dtype: torch.dtype, h: int, seed: int) -> None:
    m, n, k = shape[0], shape[1], -(-shape[2] // h) * h
    torch.manual_seed(seed)
    weight, rotate = random_weight(n, k, seed=seed), torch.linalg.qr(torch.randn(h, h))[0]
    x = (torch.randn(m, k) * 0.1).to(dtype)
    seen, uncertainty = rotated(x, rotate)
    assert_product(
        ops.cpu_linear(x, *packed(weight), None, n, rotate), seen, formats.dequantize(*weight), None, uncertainty
    )


@settings(max_examples=60, deadline=None)
@given(shapes, dtypes, st.booleans(), st.booleans(), st.integers(0, 1000))
def test_activations_are_quantized(
    shape: tuple[int, int, int], dtype: torch.dtype, static: bool, rotates: bool, seed: int
) -> None:
    m, n, k = shape[0], shape[1], -(-shape[2] // 16) * 16
    torch.manual_seed(seed)
    weight = random_weight(n, k, seed=seed)
    scale = torch.tensor(0.003, dtype=torch.float64) if static else None
    rotate = rotation.hadamard(16).float() if rotates else None
    x = (torch.randn(m, k) * 0.1).to(dtype)
    out = ops.cpu_linear_quantized(x, *packed(weight), None, n, rotate, scale, "abs_max")
    seen = FP8.fake_quantize(x if rotate is None else rotation.rotate(x, rotate), global_scale=scale)
    assert_product(out, seen, formats.dequantize(*weight), None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, 2.0**-3, 0.0123])
def test_activations_are_quantized_to_the_bit(dtype: torch.dtype, scale: float | None) -> None:
    """An identity for a weight shows what became of x: numbers on, between and beyond the grid of E4M3."""
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (grid[1:] + grid[:-1]) / 2
    rows = torch.stack([torch.cat([grid, middle, -grid, -middle, torch.tensor([1e4, -1e4, 1e-9, 0.0])])] * 3)
    x = (rows * torch.tensor([[1.0], [0.0], [0.37]])).to(dtype)
    k = x.shape[1]
    codes = torch.eye(k).to(torch.float8_e4m3fn)
    identity = QuantizedTensor(codes, torch.ones(k, 1), None, FP8)
    static = None if scale is None else torch.tensor(scale, dtype=torch.float64)
    for m in (1, 3):
        out = ops.cpu_linear_quantized(x[:m], *packed(identity), None, k, None, static, "abs_max")
        assert torch.equal(out, FP8.fake_quantize(x[:m], global_scale=static).to(dtype))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.integers(0, 3),
    st.integers(1, 70),
    st.booleans(),
    st.booleans(),
)
def test_grouped(counts: list[int], beyond: int, k: int, quantizes: bool, has_bias: bool) -> None:
    """Rows ``beyond`` the experts' belong to none and are left alone."""
    experts, n = len(counts), 21
    torch.manual_seed(sum(counts))
    weight = random_weight(experts, n, k)
    x, bias = torch.randn(sum(counts) + beyond, k), torch.randn(experts, n) if has_bias else None
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    if quantizes:
        out = ops.cpu_grouped_linear_quantized(x, *packed(weight), bias, offsets, n, None, None, "abs_max")
        x = FP8.fake_quantize(x)
    else:
        out = ops.cpu_grouped_linear(x, *packed(weight), bias, offsets, n)
    values = formats.dequantize(*weight)
    for e, (start, end) in enumerate(itertools.pairwise(offsets)):
        rows = slice(start, end)
        assert_product(out[rows], x[rows], values[e], None if bias is None else bias[e])


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 256])
def test_every_code(m: int) -> None:
    """One-hot activations read each weight back, times one: all must come out exact, NaN included."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256).expand(20, 256).contiguous()
    scales = torch.arange(20).sub(10).exp2()[:, None].float()
    weight = QuantizedTensor(codes.view(torch.float8_e4m3fn), scales, None, FP8)
    values = formats.dequantize(*weight)
    numbers = codes[0] & 0x7F != 0x7F
    finite = QuantizedTensor(weight.codes[:, numbers].contiguous(), scales, None, FP8)
    x = torch.eye(254)[-m:]
    assert torch.equal(ops.cpu_linear(x, *packed(finite), None, 20), values[:, numbers][:, -m:].T)
    assert ops.cpu_linear(torch.ones(m, 256), *packed(weight), None, 20).isnan().all()


@pytest.mark.parametrize("shape", [(1, 32), (16, 64), (37, 95), (3, 5, 7), (2, 2, 17, 32)])
def test_pack_is_exact_and_padding_is_dropped(shape: tuple[int, ...]) -> None:
    weight = random_weight(*shape)
    codes, scales, _, _ = packed(weight)
    assert (codes.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.bfloat16)
    back, back_scales = BACKEND.unpack(codes, scales, FP8, shape[-2])
    assert torch.equal(back.view(torch.uint8), weight.codes.view(torch.uint8))
    assert torch.equal(back_scales, weight.scales)
    if shape[-2] % 16 == 0:
        assert codes.numel() == weight.codes.numel()


@pytest.mark.parametrize("m", [1, 7, 200])
def test_results_do_not_depend_on_the_number_of_threads(m: int) -> None:
    weight = random_weight(530, 1055)
    x, before, results = torch.randn(m, 1055), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.cpu_linear(x, *packed(weight), None, 530))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: a.update(x=torch.zeros(2, 65)),
            r"not the cpu layout of 40 x 65 in FP8: .* \[3, 65",
        ),
        (lambda a: a.update(x=torch.zeros(2, 64).double()), "x must be float32"),
        (lambda a: a.update(n=60), "not the cpu layout of 60 x 64"),
        (lambda a: a.update(unit=torch.ones((), dtype=torch.float64)), "FP8 weights have no global scale"),
        (lambda a: a.update(bias=torch.zeros(41)), r"bias \[41\]"),
        (lambda a: a.update(scales=torch.zeros(3, 16, dtype=torch.float64)), "weight_scale must be"),
        (lambda a: a.update(x=torch.zeros(2, 0)), "must have columns"),
    ],
)
def test_bad_arguments_are_named(change, message: str) -> None:  # type: ignore[no-untyped-def]
    codes, scales, unit, _ = packed(random_weight(40, 64))
    a = {"x": torch.zeros(2, 64), "codes": codes, "scales": scales, "unit": unit, "bias": None, "n": 40}
    change(a)
    with pytest.raises(RuntimeError, match=message):
        ops.cpu_linear(a["x"], a["codes"], a["scales"], a["unit"], "fp8", a["bias"], a["n"])


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="one instruction set only")
def test_the_portable_kernels_pass_too() -> None:
    """The same tests in a process that was told to use no vector instructions."""
    if os.environ.get("FP4_CPU_ISA"):
        pytest.skip("this is that process")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command,
        env={**os.environ, "FP4_CPU_ISA": "scalar"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
