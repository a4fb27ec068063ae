"""FP8 in blocks of 128 x 128 and MXFP8: what they round to, what a layer computes in them, and who runs them."""

from __future__ import annotations

import math

import pytest
import torch
from naive_sources import E4M3_VALUES, e4m3, fp8_blocks, mxfp8
from torch import Tensor, nn

from fp4 import backends
from fp4.backends import BACKENDS
from fp4.config import FPQuantConfig
from fp4.nn import FP4Linear
from fp4.numerics.formats import FP8_BLOCK, MXFP8, dequantize, quantize
from fp4.scheme import SCHEMES, Scheme

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = (FP8_BLOCK, MXFP8)
# E4M3's finite values in order, with the byte of each; of the two zeros the positive one.
_FINITE = sorted((value, byte) for byte, value in enumerate(E4M3_VALUES.tolist()) if byte != 0x80 and value == value)
_VALUES, _BYTES = (torch.tensor(each) for each in zip(*_FINITE, strict=True))


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator).exp2()).to(dtype)


def nearest(x: Tensor) -> Tensor:
    """The nearest E4M3 value to each number, ties to the even code, saturating."""
    x = x.double().clamp(-448, 448)
    above = torch.searchsorted(_VALUES.double(), x).clamp(max=len(_VALUES) - 1)
    below = (above - 1).clamp(min=0)
    up, down = _VALUES.double()[above] - x, x - _VALUES.double()[below]
    lower = (down < up) | ((down == up) & (_BYTES[below] % 2 == 0))
    return torch.where(lower, _VALUES.double()[below], _VALUES.double()[above])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(128, 128), (200, 300), (2, 130, 64), (1, 1)])
def test_a_block_of_128_by_128_has_one_scale(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = random(*shape, dtype=dtype)
    codes, scales, global_scale, fmt = quantize(x, FP8_BLOCK)
    n, k = shape[-2:]
    assert (scales.shape, scales.dtype) == ((*shape[:-2], -(-n // 128), -(-k // 128)), torch.float32)
    assert (codes.shape, global_scale, fmt) == (x.shape, None, FP8_BLOCK)
    for lead in range(math.prod(shape[:-2])):
        matrix, own, found = (t.reshape(-1, *t.shape[-2:])[lead] for t in (x, scales, codes))
        for i in range(0, n, 128):
            for j in range(0, k, 128):
                block, scale = matrix[i : i + 128, j : j + 128].float(), own[i // 128, j // 128]
                assert scale == block.abs().max() / 448
                assert torch.equal(e4m3(found[i : i + 128, j : j + 128]), nearest(block / scale))
        assert torch.equal(dequantize(found, own, None, fmt), fp8_blocks(found, own).float())


def test_a_large_matrix_is_quantized_in_tiles_of_whole_blocks() -> None:
    x = random(1100, 2050)
    codes, scales, _, _ = quantize(x, FP8_BLOCK)
    for start in range(0, 1100, 128):
        part = quantize(x[start : start + 128], FP8_BLOCK)
        assert torch.equal(codes[start : start + 128].view(torch.uint8), part.codes.view(torch.uint8))
        assert torch.equal(scales[start // 128], part.scales[0])


def test_zeros_stay_zeros_and_nan_is_not_hidden() -> None:
    for fmt in FORMATS:
        assert torch.equal(dequantize(*quantize(torch.zeros(3, 64), fmt)), torch.zeros(3, 64))
        x = torch.ones(130, 160)
        x[0, 0] = torch.nan
        values = dequantize(*quantize(x, fmt))
        assert values[0, 0].isnan()
        assert (values[129, 130:] == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", MXFP8.rules)
def test_scales_of_mxfp8_are_powers_of_two_by_the_rule(rule: str, dtype: torch.dtype) -> None:
    x = random(40, 96, dtype=dtype)
    x[0, :32], x[1, :32], x[2, :32] = 0, 448, 449
    x[3, :32] = 447 if dtype == torch.float32 else 446
    codes, scales, _, _ = quantize(x, MXFP8, rule)
    assert (scales.shape, scales.dtype) == ((40, 3), torch.float8_e8m0fnu)
    for row in range(40):
        for number in range(3):
            block = x[row, 32 * number : 32 * number + 32].float()
            amax, scale = float(block.abs().max()), float(scales[row, number])
            if amax == 0:
                assert scale == 2.0**-127
                continue
            floor = math.frexp(amax)[1] - 1 - 8
            exponent = {
                "abs_max": floor,
                "even": floor + (amax >= 1.75 * 2.0 ** (floor + 8)),
                "ceil": next(e for e in range(floor - 1, floor + 3) if amax <= 448 * 2.0**e),
            }[rule]
            assert scale == 2.0**exponent
            found = codes[row, 32 * number : 32 * number + 32]
            assert torch.equal(e4m3(found), nearest(block.double() / scale))
    assert torch.equal(dequantize(codes, scales, None, MXFP8), mxfp8(codes, scales).float())


def test_the_largest_float_does_not_overflow() -> None:
    x = torch.full((1, 32), torch.finfo(torch.float32).max)
    for rule in MXFP8.rules:
        assert dequantize(*quantize(x, MXFP8, rule)).isfinite().all()


def test_activations_take_a_scale_for_each_128_columns_of_a_token() -> None:
    x = random(2, 5, 300, dtype=torch.bfloat16)
    found = FP8_BLOCK.fake_quantize(x)
    for start in (0, 128, 256):
        group = x[..., start : start + 128].float()
        scale = group.abs().amax(-1, keepdim=True) / 448
        assert torch.equal(found[..., start : start + 128], (nearest(group / scale).float() * scale))
    with pytest.raises(ValueError, match="fp8_block has no global scale"):
        FP8_BLOCK.fake_quantize(x, "abs_max", torch.ones(()))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("activations", ["auto", "model", "fp8"])
def test_a_layer_multiplies_what_it_holds(fmt: object, activations: str) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(320, 200)
    scheme = Scheme(fmt, activations=activations, activation_rule=fmt.rules[-1])  # type: ignore
    layer = FP4Linear.from_linear(dense, scheme)
    assert layer.backend is backends.REFERENCE
    x = random(3, 7, 320)
    read = x.double()
    if activations == "fp8" and fmt == MXFP8:
        read = mxfp8(*quantize(x.flatten(0, 1), MXFP8, "ceil")[:2]).view(3, 7, 320)
    elif activations == "fp8":
        groups = [x[..., start : start + 128] for start in (0, 128, 256)]
        scales = [group.abs().amax(-1, keepdim=True) / 448 for group in groups]
        read = torch.cat([nearest(g / s) * s for g, s in zip(groups, scales, strict=True)], -1)
    codes, scales, _, _ = layer.canonical()
    values = mxfp8(codes, scales) if fmt == MXFP8 else fp8_blocks(codes, scales)
    torch.testing.assert_close(layer(x), (read @ values.T + dense.bias).float(), atol=1e-5, rtol=1e-5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_other_backends_say_that_they_have_no_kernels(fmt: object) -> None:
    scheme = Scheme(fmt, activations="model")  # type: ignore[arg-type]
    for name in BACKENDS:
        if name != "reference":
            with pytest.raises(ValueError, match=f"backend '{name}' cannot run {fmt.name} .*: it has no kernels for"):  # type: ignore
                backends.select(scheme, torch.device("cpu"), (128, 128), name)
    assert backends.select(scheme, torch.device("cpu"), (128, 128))[0] is backends.REFERENCE


@pytest.mark.parametrize("name", ["fp8_block", "mxfp8"])
def test_a_configuration_names_it(name: str) -> None:
    config = FPQuantConfig(scheme=name)
    scheme, backend = config.scheme_for("layer") or (None, None)
    assert scheme is not None
    assert (scheme.format, scheme.activations, backend) == (SCHEMES[name].scheme.format, "auto", "auto")
    assert (scheme.weight_rule, scheme.rotation) == (SCHEMES[name].scheme.weight_rule, "identity")
    assert FPQuantConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    with pytest.raises(ValueError, match="FP8 weights are not rotated"):
        FPQuantConfig(scheme=name, transform_init="hadamard")
