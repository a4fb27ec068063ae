"""The CPU kernels of quantize and dequantize equal fp4.numerics.formats to the bit, on every instruction-set path."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp4 import backends, ops
from fp4.backends import cpu
from fp4.numerics import formats, tensors
from fp4.numerics.formats import FORMATS, MXFP4, NVFP4, Format

pytestmark = pytest.mark.skipif(cpu.isa() is None, reason="the CPU kernels are not built")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RULES = [(fmt, rule) for fmt in FORMATS.values() for rule in fmt.rules]
CASES = pytest.mark.parametrize(("fmt", "rule"), RULES, ids=[f"{fmt.name}-{rule}" for fmt, rule in RULES])
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Every bit pattern alike, so all exponents and subnormals; NaN and infinity become 0."""
    info = torch.iinfo(BITS[dtype])
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(info.min, info.max, shape, generator=generator, dtype=BITS[dtype])
    return bits.view(dtype).nan_to_num(0, 0, 0)


def check(x: Tensor, fmt: Format, rule: str, global_scale: Tensor | None = None) -> None:
    """Quantize and dequantize ``x`` by both and compare bits."""
    expected = formats.quantize(x, fmt, rule, global_scale)
    codes, scales = ops.operator("cpu", "quantize")(x, expected.global_scale, fmt.name, rule)
    assert scales.dtype == fmt.scale_dtype
    assert torch.equal(scales.view(torch.uint8), expected.scales.view(torch.uint8))
    assert torch.equal(codes, expected.codes)
    values = formats.dequantize(*expected, dtype=x.dtype)
    mine = ops.operator("cpu", "dequantize")(codes, scales, expected.global_scale, fmt.name, x.dtype)
    same = (mine.view(BITS[x.dtype]) == values.view(BITS[x.dtype])) | (mine.isnan() & values.isnan())
    assert same.all()


def global_scales(*values: float) -> list[Tensor | None]:
    return [None, *(torch.tensor(value, dtype=torch.float64) for value in values)]


@CASES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random(fmt: Format, rule: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 736, generator=generator)
    check(x.to(dtype), fmt, rule)
    check((x * 10 ** torch.randn(48, 1, generator=generator)).to(dtype), fmt, rule)


@CASES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_exponent_under_every_global_scale(fmt: Format, rule: str, dtype: torch.dtype) -> None:
    x = random_bits((64, 256), dtype, seed=1)
    for global_scale in global_scales(1e-3, 1 / 3, 1e-42, 1e-45, 1e30, 3e38):
        check(x, fmt, rule, global_scale)


@pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_16_bit_patterns_under_all_scales(fmt: Format, dtype: torch.dtype) -> None:
    """Each magnitude of a 16-bit type (of float32: those patterns and their neighbours) under many effective scales."""
    patterns = torch.arange(0x7C00 if dtype == torch.float16 else 0x7F80, dtype=torch.int32)
    if dtype == torch.float32:
        x = torch.stack([(patterns << 16) + d for d in (-1, 0, 1)])[:, 1:].flatten().view(torch.float32)
    else:
        x = patterns.to(torch.int16).view(dtype)
    x = x[: x.numel() // 32 * 32].reshape(1, -1)
    for step in range(8):
        check(x, fmt, "abs_max", torch.tensor(2.0 ** -(step * 9) * (1 + step / 7), dtype=torch.float64))


@CASES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_and_their_neighbours(fmt: Format, rule: str, dtype: torch.dtype) -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    for scale in (1.0, 2.0**-3, 1.125, 448.0, 0.1, 1 / 3):
        at = (ties * scale).to(dtype)
        bits = at.view(BITS[dtype])
        near = torch.cat([at, (bits - 1).view(dtype), (bits + 1).view(dtype)])
        blocks = torch.cat([near, -near]).repeat(4)
        x = blocks[torch.randperm(192, generator=torch.Generator().manual_seed(2))].reshape(2, 96)
        for global_scale in global_scales(1.0, scale / 448):
            check(x, fmt, rule, global_scale)


@CASES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_degenerate_blocks(fmt: Format, rule: str, dtype: torch.dtype) -> None:
    top, tiny = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    outlier = torch.full((96,), 1e-3)
    outlier[37] = top
    rows = (
        torch.zeros(96), -torch.zeros(96), torch.full((96,), -2.7), torch.full((96,), top), torch.full((96,), -top),
        torch.full((96,), tiny), torch.linspace(-tiny, tiny, 96), -torch.rand(96), outlier,
    )  # fmt: skip
    x = torch.stack(rows).to(dtype)
    check(x, fmt, rule)
    for row in x:
        check(row[None], fmt, rule)


@CASES
@pytest.mark.parametrize("shape", [(1, 32), (3, 96), (7, 32), (2, 3, 5, 64), (5, 32 * 33)], ids=str)
def test_shapes(fmt: Format, rule: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    check(x, fmt, rule, torch.tensor(1e-3, dtype=torch.float64) if fmt.needs_global_scale else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (700, 333), (3, 40, 64), (0, 16), (2, 0, 16)], ids=str)
def test_largest_magnitude(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = random_bits(shape, dtype, seed=2)
    largest = ops.operator("cpu", "largest_magnitude")
    assert torch.equal(largest(x), tensors.largest_magnitude(x))
    if x.numel():
        x[..., -1, 0] = float("nan")
        assert largest(x).isnan().all()


def test_no_rows() -> None:
    codes, scales = ops.operator("cpu", "quantize")(torch.zeros(2, 0, 64), None, "mxfp4", "abs_max")
    assert (codes.shape, scales.shape) == ((2, 0, 32), (2, 0, 2))
    assert ops.operator("cpu", "dequantize")(codes, scales, None, "mxfp4", torch.float32).shape == (2, 0, 64)


def test_one_block_of_nvfp4() -> None:
    check(torch.randn(1, 16), NVFP4, "abs_max")
    check(torch.randn(5, 48).bfloat16(), NVFP4, "four_over_six")


@CASES
def test_a_global_scale_for_each_expert(fmt: Format, rule: str) -> None:
    magnitudes = torch.tensor([1.0, 30.0, 1e-4])[:, None, None]
    x = magnitudes * torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(4))
    check(x, fmt, rule, torch.tensor([1e-3, 3e-2, 1e-7], dtype=torch.float64))


def test_views_are_read_through_their_strides() -> None:
    x = torch.randn(96, 40, generator=torch.Generator().manual_seed(5))
    check(x.t()[:, 32:64], MXFP4, "abs_max")


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 9),
    blocks=st.integers(1, 11),
    dtype=st.sampled_from(DTYPES),
    case=st.sampled_from(RULES),
    exponent=st.one_of(st.none(), st.integers(-140, 120)),
)
def test_any_bits(
    seed: int, rows: int, blocks: int, dtype: torch.dtype, case: tuple[Format, str], exponent: int | None
) -> None:
    fmt, rule = case
    global_scale = None if exponent is None else torch.tensor(1.37 * 2.0**exponent, dtype=torch.float64)
    check(random_bits((rows, blocks * fmt.block_size), dtype, seed), fmt, rule, global_scale)


@pytest.mark.parametrize("output", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=lambda fmt: fmt.name)
def test_dequantize_any_codes_and_scales(fmt: Format, output: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    codes = torch.randint(0, 256, (64, 64), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 256, (64, 128 // fmt.block_size), generator=generator, dtype=torch.uint8)
    scales = scales.view(fmt.scale_dtype)
    for global_scale in global_scales(0.37, 1e-40, 1e35)[0 if fmt == MXFP4 else 1 :]:
        expected = fmt.dequantize(codes, scales, global_scale, output)
        values = ops.operator("cpu", "dequantize")(codes, scales, global_scale, fmt.name, output)
        same = (values.view(BITS[output]) == expected.view(BITS[output])) | (values.isnan() & expected.isnan())
        assert same.all()


@CASES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_shows_in_the_scale_and_infinity_does_not_crash(fmt: Format, rule: str, dtype: torch.dtype) -> None:
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(10))
    x[0, 3], x[1, 40], x[2, 70] = torch.nan, torch.inf, -torch.inf
    global_scale = torch.tensor(1e-3, dtype=torch.float64) if fmt.needs_global_scale else None
    codes, scales = ops.operator("cpu", "quantize")(x.to(dtype), global_scale, fmt.name, rule)
    assert torch.isnan(scales.float())[0].tolist() == [True] + [False] * (scales.shape[1] - 1)
    clean = formats.quantize(x[3:].to(dtype), fmt, rule, global_scale)
    assert torch.equal(codes[3:], clean.codes)
    assert torch.equal(scales[3:].view(torch.uint8), clean.scales.view(torch.uint8))


def test_threads_do_not_change_a_bit() -> None:
    x = torch.randn(67, 8192, generator=torch.Generator().manual_seed(7))
    unit, threads = torch.tensor(2e-3, dtype=torch.float64), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.operator("cpu", "quantize")(x, unit, "nvfp4", "abs_max"))
    finally:
        torch.set_num_threads(threads)
    for codes, scales in results[1:]:
        assert torch.equal(codes, results[0][0])
        assert torch.equal(scales.view(torch.uint8), results[0][1].view(torch.uint8))


def test_large_outputs_bypass_the_cache() -> None:
    """At this size codes are written with streaming stores, a path of its own."""
    check(torch.randn(2050, 2080, generator=torch.Generator().manual_seed(8)).bfloat16(), NVFP4, "abs_max")
    check(torch.randn(2050, 2080, generator=torch.Generator().manual_seed(9)).bfloat16(), MXFP4, "even")


def test_compiles_without_a_graph_break() -> None:
    def there_and_back(x: Tensor) -> Tensor:
        codes, scales = ops.operator("cpu", "quantize")(x, None, "mxfp4", "abs_max")
        values: Tensor = ops.operator("cpu", "dequantize")(codes, scales, None, "mxfp4", torch.float32)
        return values

    x = torch.randn(4, 64)
    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), there_and_back(x))


@pytest.mark.parametrize(
    ("x", "global_scale", "fmt", "rule", "message"),
    [
        (torch.zeros(2, 24), torch.ones((), dtype=torch.float64), "nvfp4", "abs_max", "multiple of 16"),
        (torch.zeros(2, 32), None, "nvfp4", "abs_max", "needs a global scale"),
        (torch.zeros(2, 32), torch.ones(()), "nvfp4", "abs_max", "float64"),
        (torch.zeros(2, 32), torch.ones(3, dtype=torch.float64), "nvfp4", "abs_max", "3 global scales for 1"),
        (torch.zeros(2, 32), None, "mxfp4", "four_over_six", "four_over_six is not defined"),
        (torch.zeros(2, 32), None, "int4", "abs_max", "format is int4"),
        (torch.zeros(2, 32, dtype=torch.float64), None, "mxfp4", "abs_max", "x must be float32"),
    ],
)
def test_bad_input_is_named(x: Tensor, global_scale: Tensor | None, fmt: str, rule: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.operator("cpu", "quantize")(x, global_scale, fmt, rule)


def test_dequantize_refuses_scales_of_another_shape() -> None:
    scales = torch.zeros(2, 3, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    with pytest.raises(RuntimeError, match="do not match"):
        ops.operator("cpu", "dequantize")(torch.zeros(2, 32, dtype=torch.uint8), scales, None, "mxfp4", torch.float32)


@pytest.mark.slow
@pytest.mark.skipif("FP4_CPU_ISA" in os.environ, reason="already runs under a chosen instruction set")
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_under_each_instruction_set(isa: str) -> None:
    """This file again, in a process that is told to use ``isa``."""
    order = ("scalar", "avx2", "avx512")
    widest = cpu.isa()
    assert widest is not None
    if order.index(isa) > order.index(widest):
        pytest.skip(f"this CPU has no {isa}; its widest instruction set is {widest}")
    if isa == widest:
        pytest.skip(f"{isa} is what the rest of this file ran with")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    done = subprocess.run(command, env={**os.environ, "FP4_CPU_ISA": isa}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_an_unknown_instruction_set_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP4_CPU_ISA", "avx1024")
    message = "FP4_CPU_ISA is 'avx1024'; expected one of scalar, avx2, avx512"
    with pytest.raises(ValueError, match=message):
        cpu.isa()
    with pytest.raises(ValueError, match=message):
        backends.for_device(torch.device("cpu"))
