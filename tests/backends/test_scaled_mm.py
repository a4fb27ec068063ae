"""torch's own FP4 products as a backend, against a stand-in that computes in float64 from the documented layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from scaled_mm import StandIn, codes_of, scale_values, unswizzled
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fp4 import backends
from fp4.backends import scaled_products as products
from fp4.backends.scaled_mm import ScaledMMBackend
from fp4.nn import FP4Linear
from fp4.numerics.formats import FORMATS, FP8, MXFP4, NVFP4, Format
from fp4.numerics.rotation import hadamard
from fp4.scheme import Scheme

BACKEND = backends.named("scaled_mm")
CUDA = torch.device("cuda")
FORMAT = pytest.mark.parametrize("fmt", list(FORMATS.values()), ids=list(FORMATS))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture
def torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The stand-in in place of torch's functions, on the CPU."""
    stand_in = StandIn()
    for name in ("scaled_mm", "scaled_grouped_mm"):
        monkeypatch.setattr(torch.nn.functional, name, getattr(stand_in, name))
    monkeypatch.setattr(ScaledMMBackend, "left_to_others", ())
    products.support.cache_clear()
    yield stand_in
    products.support.cache_clear()


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype, biased: bool = False) -> None:
    """Equal but for the last bit, or for one more where a bias was added after the first rounding."""
    assert found.dtype == expected.dtype
    step = {torch.float32: 2**-18, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    scale = expected.float().abs().clamp(min=float(expected.float().abs().mean()))
    assert float(((found.float() - expected.float()).abs() / scale).max()) <= step * (1 + biased)


# --- what is handed over ---------------------------------------------------------------------------------------------


@FORMAT
@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 32), (129, 48, 320), (33, 272, 96)])
def test_the_operands_hold_the_reference_bits(fmt: Format, m: int, n: int, k: int, torch_multiplies: StandIn) -> None:
    """Read back by the documented layout: codes, block scales and global scales of the reference."""
    weight, x = fmt.quantize(random(n, k)), random(m, k, seed=1)
    packed = BACKEND.pack(weight.codes, weight.scales, fmt)
    products.support(fmt.name, False, torch.device("cpu"))
    torch_multiplies.calls.clear()
    BACKEND.linear_quantized(x, *packed, weight.global_scale, fmt, None, n, None, None, "abs_max")
    (call,) = torch_multiplies.calls
    for operand, scales, expected in (
        (call["a"], call["scale_a"], fmt.quantize(x)),
        (call["b"].t(), call["scale_b"], weight),
    ):
        assert torch.equal(operand.contiguous().view(torch.uint8), expected.codes)
        assert torch.equal(codes_of(operand), fmt.element.decode(expected.codes).double())
        read = unswizzled(scales[0], *expected.scales.shape)
        assert torch.equal(read, scale_values(expected.scales))
        assert [float(s) for s in scales[1:]] == (
            [] if expected.global_scale is None else [float(expected.global_scale.float())]
        )


@FORMAT
def test_torch_itself_accepts_the_call(fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without values torch checks what it can without a GPU: dtypes, shapes, recipes and swizzles."""
    weight, x = fmt.quantize(random(48, 96)), fmt.quantize(random(7, 96))
    native, results = torch.nn.functional.scaled_mm, []

    def without_values(*args: Any, **options: Any) -> Tensor:
        def bare(value: Any) -> Any:
            return (
                [bare(v) for v in value]
                if isinstance(value, list)
                else value.to("meta")
                if isinstance(value, Tensor)
                else value
            )

        results.append(native(*map(bare, args), **{key: bare(value) for key, value in options.items()}))
        return torch.zeros(results[-1].shape, dtype=results[-1].dtype)

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", without_values)
    products.multiply(x, weight.codes, products.lay_out_scales(weight.scales), weight.global_scale, torch.bfloat16)
    assert [(r.shape, r.dtype) for r in results] == [((7, 48), torch.bfloat16)]


@FORMAT
def test_unpack_inverts_pack(fmt: Format) -> None:
    weight = fmt.wide(fmt.block_size * 2).quantize(random(3, 48, 192))
    packed = BACKEND.pack(weight.codes, weight.scales, weight.format)
    codes, scales = BACKEND.unpack(*packed, weight.format, 48)
    assert torch.equal(codes, weight.codes)
    assert torch.equal(scales.view(torch.uint8), weight.scales.view(torch.uint8))
    assert all(
        torch.equal(own.view(torch.uint8), theirs.view(torch.uint8))
        for own, theirs in zip(packed, backends.named("cutlass").pack(*weight[:2], weight.format), strict=True)
    )


def test_fp8_weights_keep_their_layout() -> None:
    weight = FP8.quantize(random(48, 64))
    assert BACKEND.pack(weight.codes, weight.scales, FP8) == (weight.codes, weight.scales)
    assert BACKEND.keeps(FP8)
    assert not BACKEND.keeps(NVFP4)


# --- the product -----------------------------------------------------------------------------------------------------


@DTYPES
@FORMAT
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
def test_a_linear_is_the_reference(
    fmt: Format, dtype: torch.dtype, bias: bool, rotated: bool, torch_multiplies: StandIn
) -> None:
    dense = nn.Linear(128, 48, bias=bias).to(dtype)
    scheme = Scheme(fmt, activations="fp4", rotation="hadamard" if rotated else "identity", group_size=32)
    module = FP4Linear.from_linear(dense, scheme, "scaled_mm")
    assert module.backend.name == "scaled_mm"
    reference = FP4Linear.from_linear(dense, scheme, "reference")
    x = random(2, 65, 128, dtype=dtype)
    with torch.no_grad():
        found, expected = module(x), reference(x)
    assert found.shape == (2, 65, 48)
    # MXFP4's result is bfloat16 in torch.
    close(
        found, expected, dtype if fmt == NVFP4 else max(dtype, torch.bfloat16, key=lambda d: torch.finfo(d).eps), bias
    )


def test_a_static_scale_and_an_mxfp4_weight_with_a_global_scale(torch_multiplies: StandIn) -> None:
    for fmt, scale in ((NVFP4, 0.004), (MXFP4, 0.25)):
        weight = fmt.quantize(random(32, 64), "abs_max", torch.tensor(0.5, dtype=torch.float64))
        arguments = (weight.global_scale, fmt, None, 32, None, torch.tensor(scale, dtype=torch.float64), "abs_max")
        x = random(9, 64, seed=2)
        expected = backends.REFERENCE.linear_quantized(x, weight.codes, weight.scales, *arguments)
        packed = BACKEND.pack(weight.codes, weight.scales, fmt)
        close(BACKEND.linear_quantized(x, *packed, *arguments), expected, torch.bfloat16)


def test_no_rows(torch_multiplies: StandIn) -> None:
    weight = NVFP4.quantize(random(32, 64))
    packed = BACKEND.pack(weight.codes, weight.scales, NVFP4)
    x = random(0, 64)
    assert BACKEND.linear_quantized(x, *packed, weight.global_scale, NVFP4, None, 32, None, None, "abs_max").shape == (
        0,
        32,
    )


@FORMAT
def test_builds_that_take_plain_scales(fmt: Format, torch_multiplies: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch for ROCm does, by whole blocks of 32 rows."""
    monkeypatch.setattr(products, "PLAIN_SCALES", True)
    monkeypatch.setattr(products, "WHOLE_ROWS", 32)
    torch_multiplies.plain, torch_multiplies.rows = True, 32
    weight, x = fmt.quantize(random(32, 64)), random(5, 64, seed=1)
    packed = BACKEND.pack(weight.codes, weight.scales, fmt)
    assert torch.equal(BACKEND.unpack(*packed, fmt, 32)[1].view(torch.uint8), weight.scales.view(torch.uint8))
    arguments = (weight.global_scale, fmt, None, 32, None, None, "abs_max")
    expected = backends.REFERENCE.linear_quantized(x, weight.codes, weight.scales, *arguments)
    close(BACKEND.linear_quantized(x, *packed, *arguments), expected, torch.bfloat16)


class NoCopyToTheHost(TorchDispatchMode):
    """Fails where the host would wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("own_scales", [False, True])
@pytest.mark.parametrize("fmt", [NVFP4, MXFP4, FP8], ids=lambda fmt: fmt.name)
def test_experts(fmt: Format, own_scales: bool, torch_multiplies: StandIn) -> None:
    """Rows of no expert, an expert without rows, and a first expert with more rows than a tile of scales has."""
    offsets = torch.tensor([0, 131, 131, 140], dtype=torch.int32)
    weight, x, bias = fmt.quantize(random(3, 48, 64)), random(143, 64, seed=1), random(3, 48, seed=2)
    scale = torch.tensor([0.004, 0.01, 0.008], dtype=torch.float64) if own_scales and fmt == NVFP4 else None
    arguments = (weight.global_scale, fmt, bias, offsets, 48, None, scale, "abs_max")
    expected = backends.REFERENCE.grouped_linear_quantized(x, weight.codes, weight.scales, *arguments)
    packed = BACKEND.pack(weight.codes, weight.scales, fmt)
    assert products.support(fmt.name, True, x.device).reason is None
    with NoCopyToTheHost():
        found = BACKEND.grouped_linear_quantized(x, *packed, *arguments)
    close(found[:140], expected[:140], torch.bfloat16, biased=True)


def test_fp8_experts_where_torch_has_no_grouped_product() -> None:
    """One by one, as on compute capabilities 8.9 and 12.0; the CPU of this test has none either."""
    products.support.cache_clear()
    offsets = torch.tensor([0, 16, 16, 32], dtype=torch.int32)
    weight, x = FP8.quantize(random(3, 48, 64)), random(32, 64, seed=1)
    assert products.support("fp8", True, x.device).reason is not None
    arguments = (None, FP8, None, offsets, 48, None, None, "abs_max")
    expected = backends.REFERENCE.grouped_linear_quantized(x, weight.codes, weight.scales, *arguments)
    found = BACKEND.grouped_linear_quantized(x, weight.codes, weight.scales, *arguments)
    close(found, expected, torch.bfloat16)


@FORMAT
def test_compiled_without_graph_breaks(fmt: Format, torch_multiplies: StandIn) -> None:
    module = FP4Linear.from_linear(nn.Linear(64, 48).bfloat16(), Scheme(fmt, activations="fp4"), "scaled_mm")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for rows in (3, 5):
            x = random(rows, 64)
            assert torch.equal(compiled(x), module(x))


# --- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [NVFP4, MXFP4, FP8], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("shape", [(4096, 4096), (8, 4096, 4096)])
def test_torch_comes_first_where_it_multiplies(
    fmt: Format, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "support", lambda *_: products.Support(None))
    chosen, quantizes = backends.select(Scheme(fmt), CUDA, shape)
    assert (chosen.name, quantizes) == ("scaled_mm", True)
    assert backends.for_device(CUDA, fmt).name != "scaled_mm"  # it quantizes nothing
    assert backends.select(Scheme(fmt), torch.device("cpu"), shape)[0].name != "scaled_mm"


def test_the_order_of_auto() -> None:
    assert tuple(backends.BACKENDS) == (
        "scaled_mm", "qutlass", "flashinfer", "cutlass", "cpu", "triton", "reference"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("scheme", "shape", "reason"),
    [
        (Scheme(NVFP4, activations="model"), (64, 64), "nvfp4 activations alone, and this scheme's are unquantized"),
        (Scheme(NVFP4, activations="fp8"), (64, 64), "nvfp4 activations alone, and this scheme's are FP8"),
        (Scheme(NVFP4), (40, 64), "N is 40; torch's scaled_mm takes multiples of 16 in nvfp4"),
        (Scheme(NVFP4), (64, 48), "K is 48; torch's scaled_mm takes multiples of 32 in nvfp4"),
        (Scheme(FP8), (64, 72), "K is 72; torch's scaled_mm takes multiples of 16 in fp8"),
    ],
)
def test_what_it_refuses(scheme: Scheme, shape: tuple[int, ...], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "support", lambda *_: products.Support(None))
    with pytest.raises(ValueError, match=reason):
        backends.select(scheme, CUDA, shape, "scaled_mm")


def test_a_device_without_the_product_is_refused_with_torchs_own_words() -> None:
    """This torch has no CUDA, or no GPU; and its CPU has no FP4."""
    products.support.cache_clear()
    with pytest.raises(ValueError, match=r"torch's scaled_mm does not multiply nvfp4 on meta: "):
        backends.select(Scheme(NVFP4), torch.device("meta"), (64, 64), "scaled_mm")
    reason = products.support("nvfp4", False, torch.device("cpu")).reason
    assert reason is not None
    assert reason.startswith("torch's scaled_mm does not multiply nvfp4 on cpu: ")
    assert "\n" not in reason


def test_experts_are_left_to_others_where_only_matrices_are_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = products.Support("torch's scaled_grouped_mm does not multiply")
    monkeypatch.setattr(
        products, "support", lambda family, grouped, device: missing if grouped else products.Support(None)
    )
    assert BACKEND.refuses(Scheme(NVFP4), CUDA, (4, 64, 64)) == missing.reason
    assert BACKEND.refuses(Scheme(NVFP4), CUDA, (64, 64)) is None
    assert BACKEND.refuses(Scheme(FP8), CUDA, (4, 64, 64)) is None  # one by one


@pytest.mark.parametrize("grouped", [False, True])
@FORMAT
def test_a_wrong_product_is_refused(
    fmt: Format, grouped: bool, torch_multiplies: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "scaled_grouped_mm" if grouped else "scaled_mm"
    right = getattr(torch_multiplies, name)
    assert products.support(fmt.name, grouped, torch.device("cpu")).reason is None

    def swapped(a: Tensor, b: Tensor, scale_a: list[Tensor], **options: Any) -> Tensor:
        """Scales of two rows of the tile exchanged."""
        bits = scale_a[0].view(torch.uint8).clone()
        bits.view(-1, 512)[:, :4], bits.view(-1, 512)[:, 16:20] = (
            bits.view(-1, 512)[:, 16:20].clone(),
            bits.view(-1, 512)[:, :4].clone(),
        )
        return right(a, b, [bits.view(scale_a[0].dtype), *scale_a[1:]], **options)

    monkeypatch.setattr(torch.nn.functional, name, swapped)
    products.support.cache_clear()
    reason = products.support(fmt.name, grouped, torch.device("cpu")).reason
    assert reason is not None
    assert "is wrong; report the GPU" in reason


def test_results_in_dtypes_that_torch_lacks(torch_multiplies: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build whose NVFP4 product gives bfloat16 alone still serves other models."""
    right = torch_multiplies.scaled_mm

    def bfloat16_only(*args: Any, output_dtype: torch.dtype, **options: Any) -> Tensor:
        if output_dtype != torch.bfloat16:
            raise NotImplementedError("no such result")
        return right(*args, output_dtype=output_dtype, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", bfloat16_only)
    assert products.support("nvfp4", False, torch.device("cpu")) == (None, {torch.bfloat16})
    module = FP4Linear.from_linear(nn.Linear(64, 48).half(), Scheme(NVFP4, activations="fp4"), "scaled_mm")
    with torch.no_grad():
        assert module(random(3, 64, dtype=torch.float16)).dtype == torch.float16


def test_an_old_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.functional, "scaled_mm")
    assert "has no torch.nn.functional.scaled_mm, which came with 2.10; install" in str(BACKEND.unavailable())
    assert backends.select(Scheme(NVFP4), torch.device("cpu"), (64, 64))[0].name in ("cpu", "reference")


def test_rotations_of_any_size(torch_multiplies: StandIn) -> None:
    weight, rotation = NVFP4.quantize(random(16, 64)), hadamard(8)
    arguments = (weight.global_scale, NVFP4, None, 16, rotation, None, "abs_max")
    packed = BACKEND.pack(weight.codes, weight.scales, NVFP4)
    x = random(4, 64, seed=3)
    expected = backends.REFERENCE.linear_quantized(x, weight.codes, weight.scales, *arguments)
    close(BACKEND.linear_quantized(x, *packed, *arguments), expected, torch.bfloat16)
