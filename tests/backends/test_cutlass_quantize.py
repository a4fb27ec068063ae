"""The CUDA quantization kernels, run on the host thread by thread (csrc/cuda/host), equal the reference to the bit."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fp4.backends.block_scaled import swizzle
from fp4.numerics import elements, formats, tensors
from fp4.numerics.formats import FORMATS, MXFP4, NVFP4, Format
from fp4.numerics.rotation import hadamard, rotate

CSRC = Path(__file__).parents[2] / "csrc" / "cuda"
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile the kernels with")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RULE_NAMES = ("abs_max", "mse", "four_over_six", "even", "ceil", "below_six", "quest")  # blocks.h
CASES = pytest.mark.parametrize(
    ("fmt", "rule"), [pytest.param(f, r, id=f"{f.name}-{r}") for f in FORMATS.values() for r in f.rules]
)
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("cuda") / "check.so"
    sources = ["-x", "c++", str(CSRC / "quantize.cu"), str(CSRC / "host" / "check.cpp")]
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-shared", "-fPIC", f"-I{CSRC / 'host'}", f"-I{CSRC}"]
    subprocess.run(["g++", *flags, *sources, "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    for name in ("quantize", "dequantize", "largest_magnitude"):
        getattr(loaded, f"check_{name}").restype = ctypes.c_char_p
    counts = ("codes", "divider", "mantissas", "swizzled_offset", "swizzled_bytes", "expert_scale_row")
    for name in (*counts, "grouped_scale_rows"):
        getattr(loaded, f"check_{name}").restype = ctypes.c_int64
    return loaded


def at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def long(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


def run_quantize(
    kernels: ctypes.CDLL,
    x: Tensor,
    fmt: Format,
    rule: str,
    global_scale: Tensor | None = None,
    rotation: Tensor | None = None,
    swizzled: bool = False,
    offsets: Tensor | None = None,
    weight_scale: Tensor | None = None,
    alphas: int = 0,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """codes, scales, alpha and bias of float32; a global scale taken from x where NVFP4 is given none."""
    rows, k = x.numel() // x.shape[-1], x.shape[-1]
    columns = k // fmt.block_size
    codes = torch.full((*x.shape[:-1], k // 2), 0xEE, dtype=torch.uint8)
    if swizzled:
        experts = 1 if offsets is None else offsets.numel() - 1
        scale_rows = kernels.check_grouped_scale_rows(long(experts), long(rows)) if offsets is not None else rows
        scales = torch.full((kernels.check_swizzled_bytes(long(scale_rows), long(columns)),), 0xEE, dtype=torch.uint8)
    else:
        scales = torch.full((*x.shape[:-1], columns), 0xEE, dtype=torch.uint8)
    alpha = torch.empty(alphas)
    wide_bias = None if bias is None else torch.empty(bias.shape)
    maxima = torch.empty(512) if global_scale is None else None
    rows_per_scale = rows if global_scale is None else max(1, rows // global_scale.numel())
    error = kernels.check_quantize(
        at(x), DTYPES.index(x.dtype), long(rows), long(k), list(FORMATS).index(fmt.name), RULE_NAMES.index(rule),
        at(rotation), 0 if rotation is None else rotation.shape[0],
        at(global_scale), long(rows_per_scale), int(offsets is not None and rows_per_scale < rows), at(maxima),
        at(codes), at(scales), int(swizzled), at(offsets), 0 if offsets is None else offsets.numel() - 1,
        at(weight_scale), at(alpha), alphas,
        at(bias), 0 if bias is None else DTYPES.index(bias.dtype), at(wide_bias),
        long(0 if bias is None else bias.numel()), 2,
    )  # fmt: skip
    assert error is None, error
    return codes, scales, alpha, wide_bias


def check(kernels: ctypes.CDLL, x: Tensor, fmt: Format, rule: str, global_scale: Tensor | None = None) -> None:
    expected = formats.quantize(x, fmt, rule, global_scale)
    codes, scales, *_ = run_quantize(kernels, x, fmt, rule, expected.global_scale)
    assert torch.equal(scales, expected.scales.view(torch.uint8))
    assert torch.equal(codes, expected.codes)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Every bit pattern alike, so all exponents and subnormals; NaN and infinity become 0."""
    info = torch.iinfo(BITS[dtype])
    bits = torch.randint(info.min, info.max, shape, generator=torch.Generator().manual_seed(seed), dtype=BITS[dtype])
    return bits.view(dtype).nan_to_num(0, 0, 0)


def test_codes_of_all_floats_between_the_first_and_the_last_threshold(kernels: ctypes.CDLL) -> None:
    thresholds = torch.tensor(elements.E2M1_THRESHOLDS)
    first, last = torch.tensor([0.125, 8.0]).view(torch.int32).tolist()
    assert kernels.check_codes(first, last, at(thresholds)) == 0
    # Outside of that range codes are 0 and 7.
    for start in range(0, 0x7F800000, 0x10001):
        if not first <= start < last:
            assert kernels.check_codes(start, start + 1, at(thresholds)) == 0
            if start > 0x100000:
                break
    assert kernels.check_codes(0, 0x10000, at(thresholds)) == 0
    assert kernels.check_codes(0x7F000000, 0x7F800001, at(thresholds)) == 0


def test_quotients_by_reciprocal_give_the_codes_of_divisions(kernels: ctypes.CDLL) -> None:
    generator = torch.Generator().manual_seed(0)
    mantissas = torch.randint(0, 1 << 23, (40000,), generator=generator, dtype=torch.int32)
    exponents = torch.randint(0, 250, (40000,), generator=generator, dtype=torch.int32)
    scales = ((exponents << 23) | mantissas).view(torch.float32)
    # A float just above or below a power of two is the hard case of a reciprocal.
    edges = torch.cat([(exponents << 23) | 0x7FFFFF, (exponents << 23) | 1, exponents << 23]).view(torch.float32)
    thresholds = torch.tensor(elements.E2M1_THRESHOLDS)
    for some in (scales, edges[edges > 0]):
        assert kernels.check_divider(at(some), long(some.numel()), at(thresholds), 3) == 0


@pytest.mark.parametrize("off", [-2, -1, 0, 1, 2])
def test_quotients_of_every_mantissa(kernels: ctypes.CDLL, off: int) -> None:
    """Whatever of two units in the last place a GPU's approximate reciprocal is off by; exponents shift all alike.

    Every 64th here; with a stride of 1, which takes minutes, it is a proof, and was run.
    """
    thresholds = torch.tensor(elements.E2M1_THRESHOLDS)
    for start, stride in ((off + 2, 64), ((1 << 23) - 64, 1), (0, 1 << 22), (1, 1 << 22)):  # the hard case is all ones
        assert kernels.check_mantissas(start, stride, off, at(thresholds)) == 0


def test_narrow(kernels: ctypes.CDLL) -> None:
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
    values = torch.cat([(patterns << 16) + d for d in (-1, 0, 1, 0x7FFF, 0x8000, 0x8001)]).view(torch.float32)
    halves = patterns.to(torch.int16).view(torch.float16).float()
    values = torch.cat([values, halves, torch.nextafter(halves, torch.tensor(0.0)), halves * (1 + 2**-11)])
    bfloat16, float16 = (torch.empty(values.numel(), dtype=torch.int16) for _ in range(2))
    kernels.check_narrow(at(values), long(values.numel()), at(bfloat16), at(float16))
    for bits, dtype in ((bfloat16, torch.bfloat16), (float16, torch.float16)):
        mine, expected = bits.view(dtype), values.to(dtype)
        assert torch.equal(mine.isnan(), expected.isnan())
        assert torch.equal(mine.view(torch.int16)[~mine.isnan()], expected.view(torch.int16)[~mine.isnan()])


@CASES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random(kernels: ctypes.CDLL, fmt: Format, rule: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 1120, generator=generator)
    check(kernels, x.to(dtype), fmt, rule)
    check(kernels, (x * 10 ** torch.randn(5, 1, generator=generator)).to(dtype), fmt, rule)


@CASES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_exponent_under_every_global_scale(
    kernels: ctypes.CDLL, fmt: Format, rule: str, dtype: torch.dtype
) -> None:
    x = random_bits((16, 256), dtype, seed=1)
    for global_scale in (None, 1e-3, 1 / 3, 1e-42, 1e-45, 1e30, 3e38):
        unit = None if global_scale is None else torch.tensor(global_scale, dtype=torch.float64)
        check(kernels, x, fmt, rule, unit)


@CASES
def test_degenerate_blocks(kernels: ctypes.CDLL, fmt: Format, rule: str) -> None:
    top, tiny = torch.finfo(torch.bfloat16).max, torch.finfo(torch.bfloat16).smallest_normal
    outlier = torch.full((96,), 1e-3)
    outlier[37] = top
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(12)
    x = torch.stack(
        [torch.zeros(96), -torch.zeros(96), torch.full((96,), -top), torch.full((96,), tiny), outlier, ties]
    )
    for row in x.bfloat16():
        check(kernels, row[None], fmt, rule)


def test_a_global_scale_for_each_expert(kernels: ctypes.CDLL) -> None:
    x = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(4)) * torch.tensor([1, 30, 1e-4])[:, None, None]
    for fmt in (NVFP4, MXFP4):
        check(kernels, x, fmt, "abs_max", torch.tensor([1e-3, 3e-2, 1e-7], dtype=torch.float64))


@pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=lambda fmt: fmt.name)
def test_nan_shows_in_the_scale(kernels: ctypes.CDLL, fmt: Format) -> None:
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(5))
    x[0, 3], x[1, 40] = torch.nan, torch.inf
    unit = torch.tensor(1e-3, dtype=torch.float64)
    codes, scales, *_ = run_quantize(kernels, x, fmt, "abs_max", unit)
    assert torch.equal(scales, formats.quantize(x, fmt, "abs_max", unit).scales.view(torch.uint8))
    assert not codes[0, : fmt.block_size // 2].any()


@CASES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_rotated(kernels: ctypes.CDLL, fmt: Format, rule: str, dtype: torch.dtype, size: int) -> None:
    """Under values whose sums are exact in any order, so that bits can be compared."""
    generator = torch.Generator().manual_seed(size)
    rotation = torch.randint(-3, 4, (size, size), generator=generator) / 8
    x = (torch.randint(-50, 50, (19, 256), generator=generator) / 4).to(dtype)
    expected = formats.quantize(rotate(x, rotation), fmt, rule)
    unit = torch.tensor(7e-4, dtype=torch.float64) if fmt.needs_global_scale else None
    fixed = formats.quantize(rotate(x, rotation), fmt, rule, unit)
    for target, global_scale in ((expected, None), (fixed, unit)):
        codes, scales, *_ = run_quantize(kernels, x, fmt, rule, global_scale, rotation)
        assert torch.equal(scales, target.scales.view(torch.uint8))
        assert torch.equal(codes, target.codes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotation_that_the_dtype_does_not_hold(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Is applied in float32 all the same."""
    generator = torch.Generator().manual_seed(1)
    rotation = torch.randint(-(1 << 14), 1 << 14, (32, 32), generator=generator) / 2**14
    x = torch.randint(-8, 8, (5, 64), generator=generator).to(dtype)
    expected = formats.quantize(rotate(x, rotation), MXFP4, "abs_max")
    codes, scales, *_ = run_quantize(kernels, x, MXFP4, "abs_max", None, rotation)
    assert torch.equal(scales, expected.scales.view(torch.uint8))
    assert torch.equal(codes, expected.codes)


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_hadamard_rotation_of_gaussians(kernels: ctypes.CDLL, size: int) -> None:
    """Sums in another order may round a value that lies at a threshold to the neighbouring code, and no more."""
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(2)).bfloat16()
    rotation = hadamard(size).bfloat16().float()
    expected = formats.quantize(rotate(x, rotation), NVFP4)
    codes, scales, *_ = run_quantize(kernels, x, NVFP4, "abs_max", expected.global_scale, rotation)
    assert (scales != expected.scales.view(torch.uint8)).float().mean() < 1e-3
    assert (codes != expected.codes).float().mean() < 1e-3


@CASES
@pytest.mark.parametrize(("rows", "k"), [(1, 32), (3, 96), (130, 160), (257, 64)], ids=str)
@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
def test_swizzled_scales_are_what_pack_gives(
    kernels: ctypes.CDLL, fmt: Format, rule: str, rows: int, k: int, rotated: bool
) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randint(-90, 90, (rows, k), generator=generator).bfloat16()
    rotation = torch.randint(-3, 4, (32, 32), generator=generator) / 8 if rotated else None
    expected = formats.quantize(x if rotation is None else rotate(x, rotation), fmt, rule)
    codes, scales, *_ = run_quantize(kernels, x, fmt, rule, None, rotation, swizzled=True)
    assert torch.equal(codes, expected.codes)
    target = swizzle(expected.scales.view(torch.uint8))
    assert scales.numel() == target.numel()
    # Rows beyond the last are never read for a result; columns beyond the last must be zero.
    is_row = swizzle(
        torch.ones_like(expected.scales.view(torch.uint8)[:, :1]).expand(rows, -(-k // fmt.block_size // 4) * 4)
    )
    assert torch.equal(scales[is_row.flatten() == 1], target.flatten()[is_row.flatten() == 1])


@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize("own_scales", [False, True], ids=["one scale", "a scale each"])
def test_swizzled_scales_of_experts(kernels: ctypes.CDLL, rotated: bool, own_scales: bool) -> None:
    """Each expert's scales begin at a tile of their own; rows after the last expert's are left out."""
    counts, columns, unused = [0, 5, 0, 128, 1, 129, 300, 0], 6, 3
    ends = torch.tensor(counts).cumsum(0).tolist()
    offsets = torch.tensor([0, *ends], dtype=torch.int32)
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-90, 90, (ends[-1] + unused, 96), generator=generator).bfloat16()
    rotation = torch.randint(-3, 4, (32, 32), generator=generator) / 8 if rotated else None
    units = (
        torch.rand(len(counts), dtype=torch.float64, generator=generator)
        if own_scales
        else torch.tensor([0.2]).double()
    )
    weight_scale = torch.rand(len(counts), dtype=torch.float64, generator=generator)
    codes, scales, alpha, _ = run_quantize(
        kernels, x, NVFP4, "abs_max", units, rotation, True, offsets, weight_scale, len(counts)
    )
    assert torch.equal(alpha, (weight_scale * units).float())
    assert (codes[ends[-1] :] == 0xEE).all()
    dense = x if rotation is None else rotate(x, rotation)
    last = 0
    for expert, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        expected = formats.quantize(dense[start:end], NVFP4, "abs_max", units[expert if own_scales else 0])
        assert torch.equal(codes[start:end], expected.codes)
        first = kernels.check_expert_scale_row(long(expert), long(start))
        assert first % 128 == 0
        assert first >= last
        last = first + -(-(end - start) // 128) * 128
        for row, j in itertools.product(range(end - start), range(columns)):
            where = kernels.check_swizzled_offset(long(first + row), long(j), long(columns))
            assert scales[where] == expected.scales.view(torch.uint8)[row, j]
    assert last <= kernels.check_grouped_scale_rows(long(len(counts)), long(ends[-1]))


@pytest.mark.parametrize("size", [0, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("used", [0, 5, 37, 40])
def test_rows_that_no_expert_has_are_not_looked_at(
    kernels: ctypes.CDLL, size: int, dtype: torch.dtype, used: int
) -> None:
    """Not even by the global scale that is taken from the others."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randint(-90, 90, (40, 64), generator=generator).to(dtype)
    x[used:] = torch.nan
    offsets = torch.tensor([0, used // 2, used], dtype=torch.int32)
    rotation = torch.randint(-3, 4, (size, size), generator=generator) / 8 if size else None
    codes, _, alpha, _ = run_quantize(kernels, x, NVFP4, "abs_max", None, rotation, True, offsets, alphas=2)
    expected = formats.quantize(x[:used] if rotation is None else rotate(x[:used], rotation), NVFP4)
    assert expected.global_scale is not None
    assert alpha.tolist() == [expected.global_scale.float().item()] * 2
    assert torch.equal(codes[:used], expected.codes)
    assert (codes[used:] == 0xEE).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_the_matmul_needs_besides(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(6)).bfloat16()
    weight_scale = torch.tensor([1e-3, 0.1, 3e-5], dtype=torch.float64)
    bias = torch.randn(3, 40).to(dtype)
    own = formats.quantize(x, NVFP4)
    *_, alpha, wide = run_quantize(kernels, x, NVFP4, "abs_max", weight_scale=weight_scale, alphas=3, bias=bias)
    assert own.global_scale is not None
    assert torch.equal(alpha, (weight_scale * own.global_scale).float())
    assert wide is not None
    assert torch.equal(wide, bias.float())
    *_, alpha, _ = run_quantize(kernels, x, MXFP4, "abs_max", alphas=2)
    assert alpha.tolist() == [1, 1]


@pytest.mark.parametrize("output", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("scale", [None, [0.37], [1e-40], [0.3, 1e-3]], ids=str)
def test_dequantize(kernels: ctypes.CDLL, fmt: Format, output: torch.dtype, scale: list[float] | None) -> None:
    generator = torch.Generator().manual_seed(6)
    codes = torch.randint(0, 256, (2, 9, 48), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 256, (2, 9, 96 // fmt.block_size), generator=generator, dtype=torch.uint8)
    unit = None if scale is None else torch.tensor(scale, dtype=torch.float64)
    expected = fmt.dequantize(codes, scales.view(fmt.scale_dtype), unit, output)
    values = torch.empty(2, 9, 96, dtype=output)
    blocks = scales.numel()
    per_scale = blocks if unit is None else blocks // unit.numel()
    error = kernels.check_dequantize(
        at(codes), at(scales), at(unit), long(blocks), long(per_scale), list(FORMATS).index(fmt.name),
        DTYPES.index(output), at(values),
    )  # fmt: skip
    assert error is None
    same = (values.view(BITS[output]) == expected.view(BITS[output])) | (values.isnan() & expected.isnan())
    assert same.all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 7), (3, 40, 64), (2, 70, 333)], ids=str)
def test_largest_magnitude(kernels: ctypes.CDLL, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    def largest(x: Tensor) -> Tensor:
        out: Any = torch.full((shape[0],), -1.0)
        kernels.check_largest_magnitude(at(x), DTYPES.index(dtype), long(shape[0]), long(shape[1] * shape[2]), at(out))
        return out

    x = random_bits(shape, dtype, seed=2)
    assert torch.equal(largest(x), tensors.largest_magnitude(x))
    x[..., -1, 0] = torch.nan
    assert largest(x).isnan().all()
