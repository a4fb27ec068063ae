"""The compiled CPU kernels against float64 arithmetic on what ``formats.dequantize`` says the packed weights mean."""

from __future__ import annotations

import itertools
import math
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from blocks import quantized_activation
from hypothesis import given, settings
from hypothesis import strategies as st
from products import DTYPES, assert_product, rotated
from torch import Tensor

from fp4.backends import cpu
from fp4.numerics import elements, formats, rotation
from fp4.numerics.formats import FORMATS, MXFP4, NVFP4, Format, QuantizedTensor

BACKEND = cpu.CpuBackend()
pytestmark = pytest.mark.skipif(BACKEND.unavailable() is not None, reason=str(BACKEND.unavailable()))

ops = torch.ops.fp4
ACTIVATION_RULES = {"nvfp4": ("abs_max", "four_over_six"), "mxfp4": ("abs_max", "even", "ceil", "below_six", "quest")}


def packed(weight: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor | None, str]:
    return *BACKEND.pack(weight.codes, weight.scales, weight.format), weight.global_scale, weight.format.name


def random_weight(fmt: Format, *shape: int, seed: int = 0) -> QuantizedTensor:
    """Every code and a wide range of scales, rather than what quantizing a Gaussian would give."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8, generator=generator)
    # E4M3 from subnormal to 448, or from 2^-3, as those of trained weights: kernels tell the two apart.
    low, high = (32 * (seed // 2 % 2), 127) if fmt == NVFP4 else (100, 140)
    scales = torch.randint(low, high, (*shape[:-1], shape[-1] // fmt.block_size), generator=generator)
    unit = torch.rand(shape[:-2], dtype=torch.float64, generator=generator) * 0.01 + 1e-4
    has_unit = fmt.needs_global_scale or seed % 2 == 1  # MXFP4 may have one
    return QuantizedTensor(codes, scales.to(torch.uint8).view(fmt.scale_dtype), unit if has_unit else None, fmt)


shapes = st.tuples(st.integers(0, 40), st.integers(1, 70), st.integers(1, 40))
formats_ = st.sampled_from(list(FORMATS.values()))
dtypes = st.sampled_from(DTYPES)


@settings(max_examples=60, deadline=None)
@given(shapes, formats_, dtypes, st.booleans(), st.integers(0, 1000))
def test_linear(shape: tuple[int, int, int], fmt: Format, dtype: torch.dtype, has_bias: bool, seed: int) -> None:
    m, n, k = shape[0], shape[1], shape[2] * fmt.block_size
    torch.manual_seed(seed)
    weight = random_weight(fmt, n, k, seed=seed)
    x = (torch.randn(m, k) * 0.1).to(dtype)
    bias = torch.randn(n).to(dtype) if has_bias else None
    out = ops.cpu_linear(x, *packed(weight), bias, n)
    assert out.dtype == dtype
    assert_product(out, x, formats.dequantize(*weight), bias)


@settings(max_examples=60, deadline=None)
@given(shapes, formats_, dtypes, st.sampled_from([1, 4, 16, 32, 64, 128, 256]), st.integers(0, 1000))
def test_linear_rotates(shape: tuple[int, int, int], fmt: Format, dtype: torch.dtype, h: int, seed: int) -> None:
    block = max(fmt.block_size, h)
    m, n, k = shape[0], shape[1], -(-shape[2] * fmt.block_size // block) * block
    torch.manual_seed(seed)
    weight = random_weight(fmt, n, k, seed=seed)
    rotate = torch.linalg.qr(torch.randn(h, h))[0] if seed % 2 else rotation.hadamard(h).to(dtype).float()
    x = (torch.randn(m, k) * 0.1).to(dtype)
    out = ops.cpu_linear(x, *packed(weight), None, n, rotate)
    seen, uncertainty = rotated(x, rotate)
    assert_product(out, seen, formats.dequantize(*weight), None, uncertainty)


@settings(max_examples=60, deadline=None)
@given(shapes, formats_, dtypes, st.data())
def test_linear_quantized(shape: tuple[int, int, int], fmt: Format, dtype: torch.dtype, data: st.DataObject) -> None:
    m, n, k = shape[0], shape[1], shape[2] * fmt.block_size
    rule = data.draw(st.sampled_from(ACTIVATION_RULES[fmt.name]))
    rotate = rotation.hadamard(fmt.block_size).float() if data.draw(st.booleans()) else None
    unit = torch.tensor(0.003, dtype=torch.float64) if data.draw(st.booleans()) else None
    torch.manual_seed(k)
    weight = random_weight(fmt, n, k, seed=m)
    x = (torch.randn(m, k) * 0.1).to(dtype)
    out = ops.cpu_linear_quantized(x, *packed(weight), None, n, rotate, unit, rule)
    seen = quantized_activation(x, fmt, rotate, unit, rule)
    assert out.dtype == dtype
    assert_product(out, seen, formats.dequantize(*weight), None)


@settings(max_examples=30, deadline=None)
@given(formats_, st.lists(st.integers(0, 9), min_size=1, max_size=6), st.sampled_from([0, 0, 3]), st.data())
def test_grouped(fmt: Format, counts: list[int], beyond: int, data: st.DataObject) -> None:
    w4a4, has_bias, rotates, own_units = (data.draw(st.booleans()) for _ in range(4))
    experts, n, k = len(counts), 21, 3 * fmt.block_size
    torch.manual_seed(sum(counts))
    weight = random_weight(fmt, experts, n, k)
    x = torch.randn(sum(counts) + beyond, k)
    x[sum(counts) :] = math.nan  # rows beyond the last expert's are nobody's
    bias = torch.randn(experts, n) if has_bias else None
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    rotate = rotation.hadamard(16).float() if rotates else None
    uncertainty = torch.zeros(x.shape, dtype=torch.float64)
    if w4a4:
        rule = ACTIVATION_RULES[fmt.name][-1]
        units = torch.rand(experts, dtype=torch.float64) * 0.01 + 1e-4 if own_units else None
        after = bias, offsets, n, rotate, units, rule
        results = [ops.cpu_grouped_linear_quantized(x, *packed(weight), *after)]
        if sum(counts):
            results.append(ops.reference_grouped_linear_quantized(x, *weight[:3], fmt.name, *after))
            of_row = None if units is None else units.repeat_interleave(torch.tensor(counts))
            x = quantized_activation(x[: sum(counts)], fmt, rotate, of_row, rule)
    else:
        results = [ops.cpu_grouped_linear(x, *packed(weight), bias, offsets, n, rotate)]
        if rotate is not None:
            x, uncertainty = rotated(x, rotate)
    values = formats.dequantize(*weight)
    for out in results:
        assert out.shape == (sum(counts) + beyond, n)
        for e, (start, end) in enumerate(itertools.pairwise(offsets)):
            rows = slice(start, end)
            assert_product(out[rows], x[rows], values[e], None if bias is None else bias[e], uncertainty[rows])


def adversarial(k: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    outlier = torch.randn(k)
    outlier[k // 3] = 1e30
    dominated = torch.full((k,), 1e-3)
    dominated[::7] = 1e20
    few_small = torch.randn(k)
    few_small[[5, k // 2]] = torch.tensor([1e-5, -1e-9])
    return {
        "few small": few_small,
        "wide range": torch.randn(k) * torch.randn(k).mul(3).exp(),
        "zeros": torch.zeros(k),
        "minus zeros": -torch.zeros(k),
        "subnormal": torch.randn(k) * 1e-40,
        "one outlier": outlier,
        "outliers over small": dominated,
        "all negative": -torch.rand(k),
        "ties": torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(k // 8),
        "alternating": torch.tensor([1.0, -1.0]).repeat(k // 2),
    }


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("kind", adversarial(64))
@pytest.mark.parametrize("m", [1, 2, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_adversarial_activations(fmt: Format, kind: str, m: int, dtype: torch.dtype) -> None:
    n, k = 33, 320
    weight = random_weight(fmt, n, k)
    # An outlier must not leak into rows whose weight there is zero, nor one row into another.
    weight.codes[::2, k // 6] = 0
    weight.codes[5] = 0
    x = adversarial(k)[kind].repeat(m, 1).to(dtype)
    values = formats.dequantize(*weight)
    assert_product(ops.cpu_linear(x, *packed(weight), None, n), x, values, None)
    for rule in ACTIVATION_RULES[fmt.name]:
        seen = quantized_activation(x, fmt, None, None, rule)
        out = ops.cpu_linear_quantized(x, *packed(weight), None, n, None, None, rule)
        assert_product(out, seen, values, None)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_non_finite_activations_finish(fmt: Format, bad: float, dtype: torch.dtype) -> None:
    weight = random_weight(fmt, 20, 128)
    x = torch.randn(5, 128, dtype=dtype)
    x[2, 7] = bad
    out = ops.cpu_linear(x, *packed(weight), None, 20)
    assert out[[0, 1, 3, 4]].isfinite().all()
    assert not out[2].isfinite().all()
    ops.cpu_linear_quantized(x, *packed(weight), None, 20, None, None, "abs_max")


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_every_code_and_scale(fmt: Format) -> None:
    """One-hot activations read each weight back, times one: codes and scales must come out exact."""
    block, top = fmt.block_size, 127 if fmt == NVFP4 else 253  # beyond, MXFP4 values overflow float32
    codes = torch.arange(16, dtype=torch.uint8).repeat(top, block // 16)
    scales = torch.arange(top, dtype=torch.uint8)[:, None].view(fmt.scale_dtype)
    unit = torch.tensor(1.0, dtype=torch.float64) if fmt.needs_global_scale else None
    weight = QuantizedTensor(elements.pack_codes(codes), scales, unit, fmt)
    values = formats.dequantize(*weight)
    for m in (1, 2, block):
        x = torch.eye(block)[:m]
        out = ops.cpu_linear(x, *packed(weight), None, top)
        assert torch.equal(out, values[:, :m].T)
        # No value has more bits than a bfloat16 holds, nor is one below its normal numbers but MXFP4's very smallest.
        rounded = ops.cpu_linear(x.bfloat16(), *packed(weight), None, top)
        assert torch.equal(rounded, values[:, :m].T.bfloat16())


@pytest.mark.parametrize("smallest", [2.0**-9, 2.0**-4, 9 * 2.0**-7, 2.0**-3, 448.0])
def test_one_small_scale_among_large_ones(smallest: float) -> None:
    """Scales that are whole numbers of 2^-6 are multiplied as such; one that is not sends its chunk another way."""
    n, k = 33, 2080
    weight = random_weight(NVFP4, n, k)
    weight.scales.view(torch.uint8).clamp_(min=0x68)  # from 64
    weight.scales[5, 70] = smallest
    weight.codes[5] = 0
    weight.codes[5, 70 * 8 : 71 * 8] = torch.arange(8, dtype=torch.uint8) * 0x21
    x = torch.randn(4, k).bfloat16()
    seen = quantized_activation(x, NVFP4, None, None, "abs_max")
    out = ops.cpu_linear_quantized(x, *packed(weight), None, n, None, None, "abs_max")
    assert_product(out, seen, formats.dequantize(*weight), None)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("m", [8, 9, 23, 24, 145, 290])
def test_residuals_of_many_rows(fmt: Format, m: int) -> None:
    """More than 2048 columns, one exponent a column: most of what bfloat16 holds is left over by words of its block."""
    n, k = 37, 4096 + fmt.block_size
    weight = random_weight(fmt, n, k)
    x = (torch.randn(m, k) * torch.randint(-20, 1, (k,)).exp2()).bfloat16()
    assert_product(ops.cpu_linear(x, *packed(weight), None, n), x, formats.dequantize(*weight), None)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("shape", [(1, 32), (16, 64), (37, 96), (3, 5, 64), (2, 2, 17, 32), (2048, 8192)])
def test_pack_is_exact_and_padding_is_dropped(fmt: Format, shape: tuple[int, ...]) -> None:
    weight = random_weight(fmt, *shape)
    codes, scales, _, _ = packed(weight)
    assert codes.dtype == torch.uint8
    assert scales.dtype == fmt.scale_dtype
    back, back_scales = BACKEND.unpack(codes, scales, fmt, shape[-2])
    assert torch.equal(back, weight.codes)
    assert torch.equal(back_scales.view(torch.uint8), weight.scales.view(torch.uint8))
    if shape[-2] % 16 == 0:
        assert codes.numel() == weight.codes.numel()


def test_leading_axes_and_strides() -> None:
    weight = random_weight(NVFP4, 24, 64)
    x = torch.randn(2, 3, 5, 128)[..., ::2]
    out = ops.cpu_linear(x, *packed(weight), None, 24)
    flat = ops.cpu_linear(x.reshape(-1, 64), *packed(weight), None, 24)
    assert torch.equal(out.reshape(-1, 24), flat)
    alone = ops.cpu_linear(x[0, 0, 0], *packed(weight), None, 24)
    assert alone.shape == (24,)
    assert_product(alone[None], x[0, 0, :1], formats.dequantize(*weight), None)
    assert ops.cpu_linear(x[:, :0], *packed(weight), None, 24).shape == (2, 0, 5, 24)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("m", [1, 7, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(fmt: Format, m: int, dtype: torch.dtype) -> None:
    n, k = 530, 1056
    weight = random_weight(fmt, n, k)
    x = torch.randn(m, k, dtype=dtype)
    rotate = rotation.hadamard(32).float()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(
                (
                    ops.cpu_linear(x, *packed(weight), None, n),
                    ops.cpu_linear_quantized(x, *packed(weight), None, n, rotate, None, "abs_max"),
                )
            )
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0])
        assert torch.equal(result[1], results[0][1])


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_compiles_without_graph_break(fmt: Format) -> None:
    weight = random_weight(fmt, 40, 64)
    arguments = packed(weight)

    def both(x: Tensor) -> Tensor:
        a = ops.cpu_linear(torch.relu(x), *arguments, None, 40)
        return a + ops.cpu_linear_quantized(x, *arguments, None, 40, None, None, "abs_max")

    x = torch.randn(3, 64)
    torch.testing.assert_close(torch.compile(both, fullgraph=True, backend="aot_eager")(x), both(x))


def test_the_interpreter_runs_on_while_a_kernel_works() -> None:
    weight = random_weight(MXFP4, 4096, 4096)
    arguments, x = packed(weight), torch.randn(512, 4096)
    started, finished = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        ops.cpu_linear(x, *arguments, None, 4096)
        finished.set()

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    ticks = 0
    while not finished.is_set():
        ticks += 1
        time.sleep(0.001)
    thread.join()
    assert ticks >= 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(x=torch.zeros(2, 50)), "multiple of 16"),
        (lambda a: a.update(x=torch.zeros(2, 64).double()), "x must be float32"),
        (lambda a: a.update(x=torch.zeros(2, 96)), r"not the cpu layout of 40 x 96"),
        (lambda a: a.update(n=60), r"not the cpu layout of 60 x 64"),
        (lambda a: a.update(unit=None), "needs a global scale"),
        (lambda a: a.update(unit=torch.ones(())), "must be float64"),
        (lambda a: a.update(unit=torch.ones(2).double()), "got 2 global scales"),
        (lambda a: a.update(bias=torch.zeros(41)), r"bias \[41\]"),
        (lambda a: a.update(codes=torch.zeros(3, 4, 128)), "weight must be uint8"),
        (lambda a: a.update(scales=torch.zeros(3, 4, 16)), "weight_scale of nvfp4 must be float8_e4m3fn"),
        (lambda a: a.update(format="mxfp4"), "weight_scale of mxfp4 must be float8_e8m0fnu"),
        (lambda a: a.update(format="fp8", unit=None), "weight of fp8 must be float8_e4m3fn"),
        (lambda a: a.update(format="int4"), "format is int4; expected nvfp4 or mxfp4"),
    ],
)
def test_bad_arguments_are_named(change, message: str) -> None:  # type: ignore[no-untyped-def]
    codes, scales, unit, _ = packed(random_weight(NVFP4, 40, 64))
    a = {"x": torch.zeros(2, 64), "codes": codes, "scales": scales, "unit": unit, "bias": None, "n": 40}
    a["format"] = "nvfp4"
    change(a)
    with pytest.raises(RuntimeError, match=message):
        ops.cpu_linear(a["x"], a["codes"], a["scales"], a["unit"], a["format"], a["bias"], a["n"])


@pytest.mark.slow
@pytest.mark.skipif("FP4_CPU_ISA" in os.environ, reason="this run is already restricted to one instruction set")
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_narrower_instruction_sets(isa: str) -> None:
    """The tests above ran with the widest set of this CPU; here they run again, in a new process, with another."""
    widths = ["scalar", "avx2", "avx512"]
    widest = cpu.isa()
    if isa == widest:
        pytest.skip(f"{isa} is what the other tests ran with")
    if widths.index(isa) > widths.index(str(widest)):
        pytest.skip(f"this CPU ({platform.processor() or platform.machine()}) has no {isa}: its widest set is {widest}")
    skip = "narrower or interpreter or compiles"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", f"not ({skip})", __file__]
    environment = os.environ | {"FP4_CPU_ISA": isa}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stdout[-4000:]
