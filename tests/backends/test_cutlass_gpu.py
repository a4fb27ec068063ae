"""The CUTLASS backend on a Blackwell GPU against the reference; its quantization kernels on any GPU from 8.0.

Where a GPU is at hand, also once each under its checker (torch's allocator would hide what memcheck looks for):

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck pytest tests/backends/test_cutlass_gpu.py
    compute-sanitizer --tool racecheck pytest tests/backends/test_cutlass_gpu.py -k quantize
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool initcheck pytest tests/backends/test_cutlass_gpu.py
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fp4 import ops
from fp4.backends import REFERENCE
from fp4.backends.cutlass import CutlassBackend
from fp4.numerics import formats, tensors
from fp4.numerics.formats import FORMATS, NVFP4, Format, QuantizedTensor
from fp4.numerics.rotation import hadamard
from fp4.scheme import Scheme

BACKEND = CutlassBackend()
CUDA = torch.device("cuda", 0)


def _reason(needs_matmul: bool) -> str | None:
    reason = BACKEND.unavailable()
    if reason is None:
        reason = BACKEND.refuses(Scheme(NVFP4), CUDA, (64, 64)) if needs_matmul else BACKEND.lacks(NVFP4, CUDA)
    return reason


needs_matmul = pytest.mark.skipif(_reason(True) is not None, reason=str(_reason(True)))
needs_kernels = pytest.mark.skipif(_reason(False) is not None, reason=str(_reason(False)))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CASES = pytest.mark.parametrize(
    ("fmt", "rule"), [pytest.param(f, r, id=f"{f.name}-{r}") for f in FORMATS.values() for r in f.rules]
)
FORMAT = pytest.mark.parametrize("fmt", list(FORMATS.values()), ids=list(FORMATS))


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def to_gpu(weight: QuantizedTensor) -> QuantizedTensor:
    unit = None if weight.global_scale is None else weight.global_scale.to(CUDA)
    return QuantizedTensor(weight.codes.to(CUDA), weight.scales.to(CUDA), unit, weight.format)


def assert_close(result: Tensor, expected: Tensor) -> None:
    """Rows may differ by the output's rounding and by codes whose rotated value lay at a threshold."""
    error = (result.cpu().double() - expected.double()).norm() / expected.double().norm()
    assert error < (3e-3 if result.dtype == torch.bfloat16 else 5e-4), f"relative error {error:.2e}"


@needs_kernels
@CASES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_and_back(fmt: Format, rule: str, dtype: torch.dtype) -> None:
    x = gaussian(3, 70, 736, dtype=dtype) * torch.tensor([1, 30, 1e-3], dtype=dtype)[:, None, None]
    expected = to_gpu(formats.quantize(x, fmt, rule))
    assert torch.equal(BACKEND.largest_magnitude(x.to(CUDA)).cpu(), tensors.largest_magnitude(x))
    codes, scales = ops.operator("cutlass", "quantize")(x.to(CUDA), expected.global_scale, fmt.name, rule)
    assert torch.equal(codes, expected.codes)
    assert torch.equal(scales.view(torch.uint8), expected.scales.view(torch.uint8))
    values = BACKEND.dequantize(expected, dtype)
    on_cpu = formats.dequantize(*formats.quantize(x, fmt, rule), dtype=dtype)
    assert torch.equal(values.cpu(), on_cpu)


@needs_matmul
@FORMAT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, 16, 32, 64, 128])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 4096, 4096), (7, 264, 384), (130, 512, 1024), (2048, 1024, 640)], ids=str
)
def test_linear(fmt: Format, dtype: torch.dtype, size: int, m: int, n: int, k: int) -> None:
    x, bias = gaussian(m, k, dtype=dtype), gaussian(n, seed=2, dtype=dtype)
    weight = formats.quantize(gaussian(n, k, seed=1) * 0.02, fmt)
    rotation = None if size == 0 else hadamard(size).to(dtype).float()
    fixed = torch.tensor(1e-3, dtype=torch.float64) if fmt.needs_global_scale else None
    for unit, some_bias in itertools.product((None, fixed), (None, bias)):
        expected = REFERENCE.linear_quantized(x, *weight, some_bias, n, rotation, unit, "abs_max")
        on_gpu = to_gpu(weight)
        packed = BACKEND.pack(on_gpu.codes, on_gpu.scales, on_gpu.format)
        rest = [t if t is None else t.to(CUDA) for t in (rotation, unit)]
        gpu_bias = None if some_bias is None else some_bias.to(CUDA)
        result = BACKEND.linear_quantized(x.to(CUDA), *packed, on_gpu.global_scale, fmt, gpu_bias, n, *rest, "abs_max")
        assert result.dtype == dtype
        assert_close(result, expected)


@needs_matmul
def test_a_weight_that_the_hardware_cannot_read_is_refused() -> None:
    weight = to_gpu(formats.quantize(gaussian(64, 64), NVFP4))
    codes, scales = BACKEND.pack(weight.codes, weight.scales, NVFP4)
    shifted = torch.empty(codes.numel() + 1, dtype=torch.uint8, device=CUDA)[1:].view_as(codes).copy_(codes)
    x = gaussian(3, 64, dtype=torch.bfloat16).to(CUDA)
    with pytest.raises(RuntimeError, match="does not begin at a multiple of 16 bytes"):
        BACKEND.linear_quantized(x, shifted, scales, weight.global_scale, NVFP4, None, 64, None, None, "abs_max")


@needs_matmul
@FORMAT
@pytest.mark.parametrize("own_scales", [False, True], ids=["one scale", "a scale each"])
def test_experts(fmt: Format, own_scales: bool) -> None:
    counts, n, k = [0, 5, 128, 1, 0, 300, 2], 264, 384
    offsets = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    x, bias = gaussian(sum(counts), k, dtype=torch.bfloat16), gaussian(len(counts), n, seed=3, dtype=torch.bfloat16)
    weight = formats.quantize(gaussian(len(counts), n, k, seed=1) * 0.02, fmt)
    units = None
    if fmt.needs_global_scale:
        units = torch.full((len(counts),) if own_scales else (), 1.1e-3, dtype=torch.float64)
    expected = REFERENCE.grouped_linear_quantized(x, *weight, bias, offsets, n, None, units, "abs_max")
    on_gpu = to_gpu(weight)
    packed = BACKEND.pack(on_gpu.codes, on_gpu.scales, on_gpu.format)
    gpu_units = None if units is None else units.to(CUDA)
    unused = torch.full((5, k), torch.nan, dtype=x.dtype)  # rows that belong to no expert
    rows, wide = torch.cat([x, unused]).to(CUDA), torch.stack([bias, bias], dim=1).to(CUDA)
    result = BACKEND.grouped_linear_quantized(
        rows, *packed, on_gpu.global_scale, fmt, wide[:, 0], offsets.to(CUDA), n, None, gpu_units, "abs_max"
    )
    assert result.shape == (sum(counts) + 5, n)
    assert_close(result[: sum(counts)], expected)


@needs_matmul
def test_runs_on_the_current_stream() -> None:
    weight = to_gpu(formats.quantize(gaussian(4096, 4096, seed=1), NVFP4))
    packed = BACKEND.pack(weight.codes, weight.scales, weight.format)
    dense, x = gaussian(4096, 4096, dtype=torch.bfloat16).to(CUDA), gaussian(8, 4096, dtype=torch.bfloat16).to(CUDA)

    def run() -> Tensor:
        late = x
        for _ in range(20):  # so that whoever does not wait for them reads something else
            late = (late @ dense).clamp_(-3, 3)
        out: Tensor = BACKEND.linear_quantized(
            late, *packed, weight.global_scale, weight.format, None, 4096, None, None, "abs_max"
        )
        return out

    expected = run()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        result = run()
    stream.synchronize()
    assert torch.equal(result, expected)


@needs_kernels
def test_leaves_the_current_gpu_as_it_was() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    x = gaussian(4, 64)
    with torch.cuda.device(0):
        result = BACKEND.quantize(x.to("cuda:1"), NVFP4)
        assert torch.cuda.current_device() == 0
        with pytest.raises(RuntimeError, match="GPU of what it scales"):
            ops.operator("cutlass", "quantize")(
                x.to("cuda:1"), torch.ones((), device="cuda:0").double(), "nvfp4", "mse"
            )
        assert torch.cuda.current_device() == 0
    assert torch.equal(result.codes.cpu(), formats.quantize(x, NVFP4).codes)


@needs_kernels
@FORMAT
def test_rows_of_nan_and_infinity_do_no_harm(fmt: Format) -> None:
    x = gaussian(3, 64)
    x[0, 3], x[1, 40] = torch.nan, torch.inf
    unit = torch.ones((), dtype=torch.float64, device=CUDA) if fmt.needs_global_scale else None
    codes, _ = ops.operator("cutlass", "quantize")(x.to(CUDA), unit, fmt.name, "abs_max")
    one = None if unit is None else unit.cpu()
    assert torch.equal(codes[2].cpu(), formats.quantize(x[2:], fmt, global_scale=one).codes[0])


@needs_matmul
@pytest.mark.parametrize("mode", ["default", "max-autotune"])
def test_compiled(mode: str) -> None:
    weight = to_gpu(formats.quantize(gaussian(512, 512, seed=1), NVFP4))
    packed = BACKEND.pack(weight.codes, weight.scales, weight.format)
    rotation = hadamard(32).float().to(CUDA)

    def run(x: Tensor) -> Tensor:
        out: Tensor = BACKEND.linear_quantized(
            x * 2, *packed, weight.global_scale, weight.format, None, 512, rotation, None, "four_over_six"
        )
        return out + 1

    compiled = torch.compile(run, fullgraph=True, mode=mode)
    for _ in range(3):
        x = gaussian(4, 512, dtype=torch.bfloat16).to(CUDA)
        assert torch.equal(compiled(x), run(x))


@needs_matmul
def test_in_a_cuda_graph() -> None:
    x, weight = (
        gaussian(4, 512, dtype=torch.bfloat16).to(CUDA),
        to_gpu(formats.quantize(gaussian(512, 512, seed=1), NVFP4)),
    )
    packed = BACKEND.pack(weight.codes, weight.scales, weight.format)
    rotation = hadamard(16).float().to(CUDA)

    def run() -> Tensor:
        out: Tensor = BACKEND.linear_quantized(
            x, *packed, weight.global_scale, weight.format, None, 512, rotation, None, "abs_max"
        )
        return out

    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)
