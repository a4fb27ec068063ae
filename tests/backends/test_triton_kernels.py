"""The Triton kernels against ``fp4.numerics.formats`` and float64 products on the CPU.

They run on a CUDA GPU where there is one, and on the CPU by Triton's interpreter where TRITON_INTERPRET=1 says so
(``make pytest-triton`` does, and provides Triton).
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from blocks import quantized_activation
from products import DTYPES
from torch import Tensor
from triton_backend import (
    BACKEND,
    DEVICE,
    FORMAT,
    INTERPRETED,
    RULES,
    assert_product,
    packed,
    random_weight,
    runs_here,
)

from fp4.backends import BACKENDS
from fp4.nn.linear import FP4Linear
from fp4.numerics import elements, formats, rotation, tensors
from fp4.numerics.formats import MXFP4, NVFP4, Format, QuantizedTensor
from fp4.scheme import Scheme

pytestmark = runs_here
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def run(name: str, *arguments: object) -> Any:
    """``fp4::triton_name`` on the device under test, from and to the CPU."""
    moved = [a.to(DEVICE) if isinstance(a, Tensor) else a for a in arguments]
    result = getattr(torch.ops.fp4, f"triton_{name}")(*moved)
    return tuple(r.cpu() for r in result) if isinstance(result, tuple) else result.cpu()


def check_bits(x: Tensor, fmt: Format, rule: str, global_scale: Tensor | None = None) -> None:
    expected = formats.quantize(x, fmt, rule, global_scale)
    codes, scales = run("quantize", x, expected.global_scale, fmt.name, rule)
    assert torch.equal(scales.view(torch.uint8), expected.scales.view(torch.uint8))
    assert torch.equal(codes, expected.codes)
    values = run("dequantize", codes, scales, expected.global_scale, fmt.name, x.dtype)
    assert torch.equal(values, formats.dequantize(*expected, dtype=x.dtype))


@pytest.mark.parametrize(("fmt", "rule"), RULES, ids=[f"{fmt.name}-{rule}" for fmt, rule in RULES])
@DTYPE
def test_quantize_is_equal_to_the_bit(fmt: Format, rule: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 96, generator=generator) * 10 ** torch.randn(9, 1, generator=generator)
    check_bits(x.to(dtype), fmt, rule)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).to(dtype)
    check_bits(torch.cat([ties, -ties]).repeat(4).reshape(2, 32), fmt, rule, torch.tensor(1.0, dtype=torch.float64))
    rows = torch.stack([torch.zeros(32), -torch.zeros(32), torch.full((32,), torch.finfo(dtype).smallest_normal)])
    check_bits(rows.to(dtype), fmt, rule)
    check_bits(torch.randn(3, 5, 64).to(dtype), fmt, rule)


@FORMAT
def test_views_from_the_middle(fmt: Format) -> None:
    whole = torch.randn(4 * 96 + 1).bfloat16().to(DEVICE)
    expected = formats.quantize(whole[1:].view(4, 96).cpu(), fmt, "abs_max")
    unit = None if expected.global_scale is None else expected.global_scale.to(DEVICE)
    codes, scales = torch.ops.fp4.triton_quantize(whole[1:].view(4, 96), unit, fmt.name, "abs_max")
    assert torch.equal(codes.cpu(), expected.codes)
    assert torch.equal(scales.cpu().view(torch.uint8), expected.scales.view(torch.uint8))


@pytest.mark.skipif(not INTERPRETED, reason="a GPU divides this way in every test")
@FORMAT
def test_division_as_gpus_do_it(fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quotient from a reciprocal, which the interpreter leaves out because it rounds multiply-adds twice."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from fp4.backends.triton import codec

    calls = 0

    def fused(self: Any, x: Any, y: Any, z: Any) -> Any:
        # Exact products; sums are rounded to float64 first, which shows in float32 once in 2**29 times.
        nonlocal calls
        calls += 1
        total = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return TensorHandle(total.astype(np.float32), z.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", fused)
    monkeypatch.setattr(codec, "INTERPRETED", tl.constexpr(False))
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(8, 64, generator=generator)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(8)
    for unit in (1.0, 0.7123, 3.1e-30, 1.7e30, None):
        scale = None if unit is None else torch.tensor(unit, dtype=torch.float64)
        near = blocks * (1 if unit is None else unit)
        near[0] = 0
        # Quotients at the thresholds and a step of float32 beside them, for the scale that 6 times its own value has.
        for row, step in ((1, 0), (2, 1), (3, -1)):
            exact = ties * (1.5 * (1 if unit is None else torch.tensor(unit, dtype=torch.float32)))
            near[row] = (exact.view(torch.int32) + step).view(torch.float32)
        for rule in ("abs_max", "mse"):
            check_bits(near, fmt, rule, scale)
    assert calls


@pytest.mark.parametrize(
    ("fmt", "group", "unit"),
    [
        (NVFP4, 0, None),
        (NVFP4, 0, 3e-34),
        (NVFP4, 16, None),
        (NVFP4, 32, 3e-34),
        (NVFP4, 64, 0.0117),
        (NVFP4, 128, 0.0117),
        *((MXFP4, group, None) for group in (0, 16, 64, 128)),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_rotated_blocks(fmt: Format, group: int, unit: float | None) -> None:
    """Rotated and quantized in one pass: to the bit by matrices under which sums are exact."""
    from fp4.backends.triton.layout import interleave
    from fp4.backends.triton.quantize import INTERLEAVED, quantize_activation

    generator = torch.Generator().manual_seed(group)
    x = torch.randint(-99, 100, (19, 256), generator=generator).bfloat16() * (1e-30 if unit == 3e-34 else 1)
    scale = None if unit is None else torch.tensor(unit, dtype=torch.float64)
    cases: list[tuple[Tensor | None, bool]] = [(None, True)]
    if group:
        anything = torch.randint(-8, 9, (group, group), generator=generator) / 16
        cases = [(rotation.hadamard(group).bfloat16().float(), group in (16, 64)), (anything, False)]
    for matrix, is_exact in cases:
        turned = x.float() if matrix is None else rotation.rotate(x.double(), matrix).float()
        expected = formats.quantize(turned, fmt, "abs_max", scale)
        arguments = [t if t is None else t.to(DEVICE) for t in (matrix, scale)]
        codes, scales, taken = quantize_activation(x.to(DEVICE), fmt, *arguments, "abs_max", INTERLEAVED.value)
        assert scales is not None
        wrong = [(scales.cpu() != expected.scales.view(torch.uint8)), (codes.cpu() != interleave(expected.codes))]
        # Elsewhere a value in its last bit may decide about a code.
        assert all(where.float().mean() <= (0 if is_exact else 2e-3) for where in wrong)
        if is_exact and taken is not None:
            assert torch.equal(taken.cpu().reshape(()), expected.global_scale)


@DTYPE
def test_largest_magnitude(dtype: torch.dtype) -> None:
    for shape in [(1, 1), (3, 7), (2, 40, 64), (0, 16), (2, 0, 16)]:
        x = torch.randn(shape).to(dtype)
        assert torch.equal(run("largest_magnitude", x), tensors.largest_magnitude(x))
    bad = torch.randn(4, 32).to(dtype)
    bad[3, 1] = float("nan")
    assert run("largest_magnitude", bad).isnan()


@FORMAT
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("own_scales", [False, True])
def test_activations_for_other_backends(fmt: Format, group: int | None, own_scales: bool) -> None:
    """Canonical codes and scales in one pass, those of the reference to the bit: no rotated sum is rounded here."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-8, 9, (9, 96), generator=generator).bfloat16()
    turn = None if group is None else rotation.identity(group).flip(0).float()
    offsets = torch.tensor([0, 2, 7], dtype=torch.int32)
    scale = torch.rand(9, dtype=torch.float64, generator=generator) if own_scales and fmt == NVFP4 else None
    x[7:] *= 100  # rows of no expert
    expected = BACKENDS["reference"].quantize_activation(x, fmt, turn, scale, "mse", offsets)
    moved = [t if t is None else t.to(DEVICE) for t in (x, turn, scale, offsets)]
    found = BACKEND.quantize_activation(moved[0], fmt, moved[1], moved[2], "mse", moved[3])  # type: ignore[arg-type]
    assert found.format == fmt
    assert torch.equal(found.codes.cpu()[:7], expected.codes[:7])
    assert torch.equal(found.scales.cpu().view(torch.uint8)[:7], expected.scales.view(torch.uint8)[:7])
    assert (found.global_scale is None) == (expected.global_scale is None)
    if expected.global_scale is not None:
        assert torch.equal(found.global_scale.cpu(), expected.global_scale)  # type: ignore[union-attr]


@FORMAT
def test_nan_is_never_hidden(fmt: Format) -> None:
    x = torch.randn(2, 64)
    x[1, 3] = float("nan")
    _, scales = run("quantize", x, torch.tensor(1.0, dtype=torch.float64), fmt.name, "abs_max")
    assert scales.float()[1, 0].isnan()
    assert scales.float()[0].isfinite().all()


@FORMAT
@pytest.mark.parametrize("shape", [(1, 32), (16, 64), (37, 96), (3, 5, 64), (2, 2, 17, 32), (33, 320)], ids=str)
def test_pack_is_exact(fmt: Format, shape: tuple[int, ...]) -> None:
    weight = random_weight(fmt, *shape)
    codes, scales, _, _ = packed(weight)
    back, back_scales = BACKEND.unpack(codes, scales, fmt, shape[-2])
    assert torch.equal(back, weight.codes)
    assert torch.equal(back_scales.view(torch.uint8), weight.scales.view(torch.uint8))


@FORMAT
@DTYPE
@pytest.mark.parametrize("m", [1, 3, 8, 13, 30])
def test_linear(fmt: Format, dtype: torch.dtype, m: int) -> None:
    n, k = 37, 5 * 64
    weight, bias = random_weight(fmt, n, k), torch.randn(n)
    x = torch.randn(m, k).to(dtype)
    result = run("linear", x, *packed(weight), bias, n)
    assert result.dtype == dtype
    assert_product(result, x, formats.dequantize(*weight), bias)


@FORMAT
@pytest.mark.parametrize("m", [50, 70])
def test_linear_of_many_rows(fmt: Format, m: int) -> None:
    weight, x = random_weight(fmt, 130, 96), torch.randn(m, 96).bfloat16()
    assert_product(run("linear", x, *packed(weight), None, 130), x, formats.dequantize(*weight))


@FORMAT
@DTYPE
@pytest.mark.skipif(not INTERPRETED, reason="which order x has is the GPU's choice")
def test_shuffled_activations(fmt: Format, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Hopper's wide products take, of K that is no multiple of the shuffle's 32 where the format allows it."""
    from fp4.backends.triton import linear

    monkeypatch.setattr(linear, "shuffles", lambda device, tiling: True)
    n, k = 21, 112 if fmt == NVFP4 else 96
    weight, x, rotate = random_weight(fmt, n, k), torch.randn(35, k).to(dtype), rotation.hadamard(16).float()
    values = formats.dequantize(*weight)
    assert_product(run("linear", x, *packed(weight), None, n), x, values)
    turned = rotation.rotate(x, rotate).to(dtype)
    torch.testing.assert_close(
        run("linear", x, *packed(weight), None, n, rotate).float(), turned.float() @ values.T, atol=0.02, rtol=0.02
    )
    result = run("linear_quantized", x, *packed(weight), None, n, None, None, "abs_max")
    assert_product(result, quantized_activation(x, fmt, None, None, "abs_max"), values)


@pytest.mark.parametrize("shape", [(1, 1, 16), (2, 3, 16), (1, 17, 48), (5, 1, 144)], ids=str)
def test_odd_shapes(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    weight, x = random_weight(NVFP4, n, k), torch.randn(m, k)
    assert_product(run("linear", x, *packed(weight), None, n), x, formats.dequantize(*weight))
    assert run("linear", x[:0], *packed(weight), None, n).shape == (0, n)
    assert run("linear", x[0], *packed(weight), None, n).shape == (n,)


def test_partial_sums_are_added() -> None:
    """One row panel and a long K: several programs share it."""
    weight, x = random_weight(NVFP4, 5, 8192), torch.randn(1, 8192)
    assert_product(run("linear", x, *packed(weight), torch.ones(5), 5), x, formats.dequantize(*weight), torch.ones(5))


@FORMAT
def test_every_code_and_scale(fmt: Format) -> None:
    """One-hot activations read each weight back: codes and scales must come out exact."""
    block, top = fmt.block_size, 127 if fmt == NVFP4 else 253
    codes = torch.arange(16, dtype=torch.uint8).repeat(top, block // 16)
    scales = torch.arange(top, dtype=torch.uint8)[:, None].view(fmt.scale_dtype)
    unit = torch.tensor(1.0, dtype=torch.float64) if fmt.needs_global_scale else None
    weight = QuantizedTensor(elements.pack_codes(codes), scales, unit, fmt)
    result = run("linear", torch.eye(block), *packed(weight), None, top)
    assert torch.equal(result, formats.dequantize(*weight).T)


@FORMAT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_nan_scale_of_a_weight_is_never_hidden(fmt: Format, dtype: torch.dtype) -> None:
    codes, scales, unit, _ = random_weight(fmt, 20, 64)
    scales.view(torch.uint8)[3, 1] = fmt.scale_nan
    result = run("linear", torch.ones(2, 64, dtype=dtype), *packed(QuantizedTensor(codes, scales, unit, fmt)), None, 20)
    assert not bool(result[:, 3].isfinite().any())
    assert bool(result[:, [i for i in range(20) if i != 3]].isfinite().all())


@FORMAT
@pytest.mark.parametrize(("n", "k"), [(16, 128), (37, 96), (20, 1056)])
def test_a_weight_decoded_once_is_dequantized_to_the_bit(fmt: Format, n: int, k: int) -> None:
    from fp4.backends.triton.dense import decode

    weight = random_weight(fmt, n, k)
    weight.scales.view(torch.uint8)[2, 1] = fmt.scale_nan
    codes, scales, unit, name = (t.to(DEVICE) if isinstance(t, Tensor) else t for t in packed(weight))
    for global_scale, dtype in ((unit, torch.bfloat16), (None, torch.float32)):
        found = decode(codes, scales, global_scale, name, k, dtype).cpu()  # type: ignore[arg-type]
        own = None if global_scale is None else weight.global_scale
        expected = fmt.dequantize(weight.codes, weight.scales, own, dtype)
        assert bool(found[2].isnan().any())
        assert torch.equal(found[:n].isnan(), expected.isnan())
        assert torch.equal(found[:n].nan_to_num(7.0), expected.nan_to_num(7.0))
        assert not bool(found[n:].any())


@FORMAT
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("panels", [1, 100])
def test_many_rows_decode_the_weight_once(
    fmt: Format, rotated: bool, panels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fp4.backends.triton import dense, linear

    n, k = 37, 96
    monkeypatch.setattr(linear, "DENSE_FROM_ELSEWHERE", 40)
    monkeypatch.setattr(linear, "DENSE_FROM", {})
    monkeypatch.setattr(linear, "DENSE_FROM_WITHOUT_WGMMA", 40)
    monkeypatch.setattr(dense, "PANEL_ELEMENTS", panels * 16 * k)
    decoded = []
    right = dense.decode
    monkeypatch.setattr(dense, "decode", lambda *a: decoded.append(right(*a)) or decoded[-1])
    weight, bias = random_weight(fmt, n, k), torch.randn(n)
    turn = rotation.hadamard(16).float() if rotated else None
    for m, times in ((39, 0), (40, 3 if panels == 1 else 1)):
        decoded.clear()
        x = torch.randn(m, k).bfloat16()
        result = run("linear", x, *packed(weight), bias.bfloat16(), n, turn)
        assert len(decoded) == times
        seen = x if turn is None else rotation.rotate(x, turn).bfloat16()
        expected = seen.float() @ fmt.dequantize(*weight[:3], torch.bfloat16).float().T + bias.bfloat16().float()
        torch.testing.assert_close(result.float(), expected, atol=0.05, rtol=2**-7)
    assert not linear.decodes_once(torch.zeros(64, k))  # float32 keeps its exact products


@pytest.mark.parametrize(("version", "wgmma"), [((3, 6), False), ((3, 8), False), ((3, 9), True), ((4, 0), True)])
def test_hopper_multiplies_by_what_the_compiler_gets_right(
    version: tuple[int, int], wgmma: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fp4.backends.triton import linear

    device = torch.device("cuda")
    monkeypatch.setattr(linear, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(linear, "_TRITON", version)
    for rows in (1, 32, 33, 64, 512, 5000):
        tiling = linear.tiling_for(rows, 1, device)
        assert linear.shuffles(device, tiling) == (wgmma and rows > 32)
        assert (tiling.SLICES == 1) == (wgmma and rows > 32)
    assert (64 if wgmma else 32) == linear.tiling_for(5000, 2, device).BM
    monkeypatch.setattr(linear, "_capability", lambda device: (8, 0))
    assert not linear.uses_wgmma(device)
    assert linear.tiling_for(5000, 1, device).SLICES == 1


@FORMAT
@DTYPE
@pytest.mark.parametrize("group", [None, 16, 64, 8])
def test_linear_quantized(fmt: Format, dtype: torch.dtype, group: int | None) -> None:
    n, k = 21, 192
    weight, x = random_weight(fmt, n, k), torch.randn(3, k).to(dtype)
    rotate = None if group is None else rotation.hadamard(group).float()
    for rule in ("abs_max", "four_over_six") if fmt == NVFP4 else ("abs_max", "quest"):
        for unit in (None, torch.tensor(0.003, dtype=torch.float64)):
            result = run("linear_quantized", x, *packed(weight), None, n, rotate, unit, rule)
            seen = quantized_activation(x, fmt, rotate, unit, rule)
            if rotate is None:
                assert_product(result, seen, formats.dequantize(*weight))
            else:  # rotated values differ in their last bits, which may move one to the neighbouring code
                expected = seen @ formats.dequantize(*weight).T
                error = (result.float() - expected).norm() / expected.norm()
                assert error < 0.02


def test_weight_only_rotation() -> None:
    weight, x, rotate = random_weight(NVFP4, 20, 64), torch.randn(3, 64), rotation.gsr(32).float()
    result = run("linear", x, *packed(weight), None, 20, rotate)
    torch.testing.assert_close(result, rotation.rotate(x, rotate) @ formats.dequantize(*weight).T)


@FORMAT
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 2], [20, 1, 0, 0, 17]], ids=str)
def test_grouped(fmt: Format, counts: list[int]) -> None:
    experts, n, k, total = len(counts), 21, 96, sum(counts)
    weight, bias = random_weight(fmt, experts, n, k), torch.randn(experts, n)
    # Rows beyond the last expert's belong to nobody, and no global scale sees them.
    x = torch.randn(total + 2, k).bfloat16()
    x[total:] = 1e30
    x[total:] = torch.nan
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    values = formats.dequantize(*weight)
    units = torch.rand(experts, dtype=torch.float64) * 0.01 + 1e-3
    result = run("grouped_linear", x, *packed(weight), bias, offsets, n)
    shared = run("grouped_linear_quantized", x, *packed(weight), bias, offsets, n, None, None, "abs_max")
    own = run("grouped_linear_quantized", x, *packed(weight), bias, offsets, n, None, units, "abs_max")
    seen = quantized_activation(x[:total], fmt, None, None, "abs_max")
    for e, (start, end) in enumerate(itertools.pairwise(offsets)):
        if start < end:
            rows = slice(start, end)
            assert_product(result[rows], x[rows], values[e], bias[e])
            assert_product(shared[rows], seen[rows], values[e], bias[e])
            mine = quantized_activation(x[rows], fmt, None, units[e], "abs_max")
            assert_product(own[rows], mine, values[e], bias[e])


@FORMAT
def test_adversarial_activations(fmt: Format) -> None:
    n, k = 33, 128
    weight = random_weight(fmt, n, k)
    outlier, small = torch.randn(k), torch.full((k,), 1e-3)
    outlier[k // 3], small[::7] = 1e30, 1e20
    for x in (torch.zeros(k), -torch.zeros(k), outlier, small, -torch.rand(k)):
        assert_product(run("linear", x[None], *packed(weight), None, n), x[None], formats.dequantize(*weight))
    x = torch.randn(3, k)
    x[1, 7] = float("inf")
    result = run("linear", x, *packed(weight), None, n)
    assert result[[0, 2]].isfinite().all()
    assert not result[1].isfinite().all()


@FORMAT
@pytest.mark.parametrize(("m", "n", "k"), [(1, 40, 96), (19, 130, 320), (70, 16, 64)])
@pytest.mark.skipif(not INTERPRETED, reason="addresses around tl.dot_scaled are checked by the interpreter")
def test_native_fp4_product(fmt: Format, m: int, n: int, k: int) -> None:
    """What Blackwell runs, but for the instruction itself, which the interpreter computes in float32."""
    from fp4.backends.triton.linear import scaled_product
    from fp4.backends.triton.quantize import INTERLEAVED, quantize_activation

    weight, x, bias = random_weight(fmt, n, k), torch.randn(m, k), torch.randn(n)
    codes, scales, unit = quantize_activation(x, fmt, None, None, "abs_max", INTERLEAVED.value)
    result = scaled_product(codes, scales, *packed(weight), bias, None, n, unit, torch.float32)
    seen = quantized_activation(x, fmt, None, None, "abs_max")
    assert_product(result, seen, formats.dequantize(*weight), bias)
    experts = random_weight(fmt, 3, n, k)
    offsets = torch.tensor([0, m // 2, m // 2, m], dtype=torch.int32)
    result = scaled_product(codes, scales, *packed(experts), None, offsets, n, unit, torch.float32)
    values = formats.dequantize(*experts)
    assert_product(result[: m // 2], seen[: m // 2], values[0])
    assert_product(result[m // 2 :], seen[m // 2 :], values[2])


def test_module_compiles_without_graph_break() -> None:
    torch.manual_seed(0)
    dense = torch.nn.Linear(64, 40, device=DEVICE)
    layer = FP4Linear.from_linear(dense, Scheme(NVFP4, activations="model"), "triton")
    assert layer.backend.name == "triton"
    x = torch.randn(3, 64, device=DEVICE)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(compiled, layer(x))
        torch.testing.assert_close(compiled, x @ layer.dequantize().T + layer.bias)


def test_a_weight_of_another_shape_is_named() -> None:
    weight = random_weight(NVFP4, 40, 64)
    with pytest.raises(ValueError, match="not the triton layout of 60 x 64"):
        run("linear", torch.zeros(2, 64), *packed(weight), None, 60)
