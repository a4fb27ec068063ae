"""Formats as objects: equal by value, wide variants like any other, and a new one is one class and one row."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import blocks_of, f32, naive_scale, nearest_e2m1
from torch import Tensor

from fp4.backends import BACKENDS, REFERENCE
from fp4.nn.linear import FP4Linear
from fp4.numerics.block_scales import E8M0_NAN, E8M0_SCALE_BYTES, floor_log2
from fp4.numerics.elements import E4M3, encode_e8m0, unpack_codes
from fp4.numerics.formats import (
    FP8,
    MXFP4,
    NVFP4,
    WEIGHT_FORMATS,
    BlockFormat,
    Format,
    QuantizedTensor,
    format_named,
    quantize,
)
from fp4.rounding import round_to_nearest
from fp4.scheme import Scheme

WIDE: list[Format] = [MXFP4.wide(64), NVFP4.wide(32), NVFP4.wide(64)]
COPIES: list[Callable[[Any], Any]] = [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))]


@pytest.mark.parametrize("copied", COPIES, ids=["copy", "deepcopy", "pickle"])
def test_copies_are_equal_by_value(copied: Callable[[Any], Any]) -> None:
    for fmt in (NVFP4, MXFP4, FP8, *WIDE):
        again = copied(fmt)
        assert (again, hash(again), again.name, again.block_size) == (fmt, hash(fmt), fmt.name, fmt.block_size)
        assert {fmt: "found"}[again] == "found"
    scheme = Scheme(NVFP4.wide(32), activations="fp8")
    assert copied(scheme) == scheme


def test_formats_differ_by_family_and_by_block() -> None:
    everything = [NVFP4, MXFP4, FP8, *WIDE]
    assert len(set(everything)) == len({fmt.name for fmt in everything}) == 6
    assert NVFP4.wide(32) != MXFP4
    assert NVFP4.wide(16) == NVFP4 == NVFP4.wide(64).base


def test_names_find_formats() -> None:
    assert [fmt.name for fmt in WIDE] == ["mxfp4_64", "nvfp4_32", "nvfp4_64"]
    for fmt in (NVFP4, MXFP4, FP8, *WIDE):
        assert format_named(fmt.name) == fmt
    for name in ("int4", "nvfp4_", "nvfp4_x", "_32", ""):
        with pytest.raises(ValueError, match="is unknown; expected one of nvfp4, mxfp4, fp8, fp8_block, mxfp8"):
            format_named(name)
    for name in ("nvfp4_24", "nvfp4_8", "mxfp4_16", "fp8_32"):
        with pytest.raises(ValueError, match=r"in blocks of \d+ was asked for; expected a multiple of"):
            format_named(name)


@pytest.mark.parametrize(
    ("fmt", "rule"),
    [(fmt, rule) for fmt in WIDE for rule in fmt.rules if rule not in ("mse", "four_over_six")],
    ids=str,
)
def test_a_wide_variant_rounds_as_its_family_does_with_more_elements_a_scale(fmt: Format, rule: str) -> None:
    x = blocks_of(fmt, seed=4, count=24)[8:]
    codes, scales, global_scale, found_format = quantize(x, fmt, rule)
    assert found_format == fmt
    assert (scales.dtype, scales.shape, codes.shape) == (fmt.scale_dtype, (16, 1), (16, fmt.block_size // 2))
    unit = 1.0 if global_scale is None else f32(float(x.abs().max()) / (6 * 448))
    assert global_scale is None or global_scale == unit
    rows = zip(x.tolist(), unpack_codes(codes).tolist(), scales.float().flatten().tolist(), strict=True)
    for row, found, scale in rows:
        assert scale == naive_scale(row, fmt, rule, unit)
        quotients = [f32(value / f32(scale * unit)) for value in row]
        assert found == [nearest_e2m1(q) | (math.copysign(1, q) < 0) << 3 for q in quotients]


@pytest.mark.parametrize("fmt", WIDE, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("backend", [name for name, b in BACKENDS.items() if not b.unavailable()])
def test_wide_weights_run_on_every_backend_and_come_back(fmt: Format, backend: str) -> None:
    scheme = Scheme(fmt, activations="model")
    reason = BACKENDS[backend].refuses(scheme, torch.device("cpu"), (24, 192))
    if fmt.family not in BACKENDS[backend].formats or reason:
        pytest.skip(f"{backend} does not run {fmt.name} here: {reason or 'it has no kernels'}")
    torch.manual_seed(0)
    dense = torch.nn.Linear(192, 24)
    module = FP4Linear.from_linear(dense, scheme, backend)
    expected = round_to_nearest(dense.weight.detach(), Scheme(fmt))
    found = module.canonical()
    assert found.format == fmt
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales.view(torch.uint8), expected.scales.view(torch.uint8))
    assert module.state_dict()["packed_scales"].shape == (24, 192 // fmt.block_size)
    values = fmt.dequantize(*expected[:3])
    assert torch.equal(module.dequantize(), values)
    x = torch.randn(5, 192, requires_grad=True)
    out = module(x)
    torch.testing.assert_close(out, x @ values.T + dense.bias, atol=1e-4, rtol=1e-4)
    out.sum().backward()
    torch.testing.assert_close(x.grad, values.sum(0).expand(5, -1), atol=1e-4, rtol=1e-4)


# --- formats that fp4 does not have ----------------------------------------------------------------------------------


class ToyMX8(BlockFormat):
    """E4M3 elements in blocks of 32 under powers of two (OCP MX v1.0)."""

    family = "toy_mx8"
    element = E4M3
    own_block_size = 32
    scale_dtype = torch.float8_e8m0fnu
    scale_bytes, scale_nan = E8M0_SCALE_BYTES, E8M0_NAN
    rules = ("abs_max",)
    feeds_errors = False

    def block_scales(self, blocks: Tensor, rule: str, global_scale: Tensor | None) -> Tensor:
        return encode_e8m0(floor_log2(blocks.abs().amax(-1)) - 8)  # 8 is E4M3's largest exponent


class ToyBlocks(Format):
    """E4M3 elements in blocks of 128 x 128 under float32 scales, as DeepSeek's checkpoints have them."""

    family = "toy_blocks"
    element = E4M3
    own_block_size = 128
    block_rows = 128
    scale_dtype = torch.float32
    rules = ("abs_max",)
    takes_global_scale = False
    feeds_errors = False

    @property
    def bits_per_weight(self) -> float:
        return 8 + 32 / 128**2

    def _quantize(self, x: Tensor, rule: str, global_scale: Tensor | None) -> QuantizedTensor:
        padded = torch.nn.functional.pad(x.float(), (0, 0, 0, -x.shape[-2] % 128))
        scales = padded.unflatten(-1, (-1, 128)).unflatten(-3, (-1, 128)).abs().amax((-1, -3)) / self.element.largest
        effective = scales.repeat_interleave(128, -2).repeat_interleave(128, -1)[..., : x.shape[-2], :]
        return QuantizedTensor(self.element.encode(x.float() / effective), scales, None, self)

    def spread(self, values: Tensor, effective: Tensor) -> Tensor:
        return values * effective.repeat_interleave(128, -2).repeat_interleave(128, -1)[..., : values.shape[-2], :]

    def fake_quantize(self, x: Tensor, rule: str = "abs_max", global_scale: Tensor | None = None) -> Tensor:
        groups = x.float().unflatten(-1, (-1, 128))
        scale = groups.abs().amax(-1, keepdim=True) / self.element.largest
        return (self.element.decode(self.element.encode(groups / scale)) * scale).flatten(-2)


@pytest.mark.parametrize("fmt", [ToyMX8(), ToyBlocks()], ids=lambda fmt: fmt.name)
def test_a_new_format_is_one_class_and_one_row(fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WEIGHT_FORMATS, fmt.name, fmt)
    monkeypatch.setattr(type(REFERENCE), "formats", (*REFERENCE.formats, fmt.name))
    monkeypatch.setattr(type(REFERENCE), "converts", (*REFERENCE.converts, fmt.name))
    torch.manual_seed(0)
    n, k = 200, 256
    dense = torch.nn.Linear(k, n, dtype=torch.bfloat16)
    assert pickle.loads(pickle.dumps(fmt)) == fmt
    x = torch.randn(3, 5, k).bfloat16()
    for activations in ("model", "auto", "fp8", "fp4"):
        module = FP4Linear.from_linear(dense, Scheme(fmt, activations=activations))  # type: ignore[arg-type]
        assert module.backend is REFERENCE
        assert module.codes.dtype == torch.float8_e4m3fn
        assert module.scales.shape == fmt.scale_shape((n, k))
        values = module.dequantize()
        assert ((values - dense.weight.float()).abs() <= dense.weight.abs().max() * 2**-3).all()
        read = {"model": x.float(), "auto": x.float(), "fp8": fmt.fake_quantize(x), "fp4": fmt.fake_quantize(x)}
        expected = (read[activations] @ values.T + dense.bias.float()).bfloat16()
        torch.testing.assert_close(module(x), expected)
        again = copy.deepcopy(module)
        again.load_state_dict(module.state_dict())
        assert again.canonical().format == fmt
        assert torch.equal(again.dequantize(), values)
        tracked = x.clone().requires_grad_()
        module(tracked).float().sum().backward()
        torch.testing.assert_close(tracked.grad, values.sum(0).bfloat16().expand_as(x), atol=0.02, rtol=0.02)


def test_a_layer_holds_weights_of_its_own_format_only() -> None:
    layer = FP4Linear(64, 8, False, Scheme(NVFP4))
    with pytest.raises(ValueError, match="the weight is in nvfp4_32; this layer holds nvfp4"):
        layer.parameters_of(quantize(torch.randn(8, 64), NVFP4.wide(32)))
