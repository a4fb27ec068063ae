"""The Triton backend on a CUDA GPU: sizes, graphs, compilation and devices that the interpreter cannot show.

With ``test_triton_kernels.py`` beside it, which runs there as well, these are all kernels against the reference. For
memory errors run both under the checker, without the caching allocator, which would hide accesses beyond a tensor:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \\
        pytest -x tests/backends/test_triton_kernels.py tests/backends/test_triton_gpu.py \\
        -k "not (graph or compile or huge)"
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import quantized_activation
from torch import Tensor, nn
from triton_backend import BACKEND, FORMAT, RULES, assert_product, packed, random_weight

from fp4.backends import BACKENDS
from fp4.nn.linear import FP4Linear
from fp4.numerics import formats, rotation
from fp4.numerics.formats import MXFP4, NVFP4, Format, QuantizedTensor
from fp4.scheme import Scheme

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None
    or os.environ.get("TRITON_INTERPRET") == "1"
    or not torch.cuda.is_available()
    or torch.cuda.get_device_capability() < (8, 0),
    reason="needs Triton and a CUDA GPU of compute capability 8.0",
)

ROWS = (1, 2, 3, 4, 8, 16, 32, 33, 64, 65, 512, 513, 1025)


def on_gpu(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.cuda() if isinstance(a, Tensor) else a for a in arguments)


def operands_of(weight: QuantizedTensor) -> tuple[Any, ...]:
    """The weight as the backend's methods take it."""
    return *packed(weight)[:3], weight.format


@pytest.mark.parametrize(("fmt", "rule"), RULES, ids=[f"{fmt.name}-{rule}" for fmt, rule in RULES])
def test_large_tensors_are_quantized_to_the_bit(fmt: Format, rule: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(517, 1056, generator=generator) * 10 ** torch.randn(517, 1, generator=generator)
    for dtype in (torch.bfloat16, torch.float32):
        expected = formats.quantize(x.to(dtype), fmt, rule)
        codes, scales, unit, _ = BACKEND.quantize(x.to(dtype).cuda(), fmt, rule)
        assert torch.equal(codes.cpu(), expected.codes)
        assert torch.equal(scales.cpu().view(torch.uint8), expected.scales.view(torch.uint8))
        if unit is not None:
            assert torch.equal(unit.cpu(), expected.global_scale)
        values = BACKEND.dequantize(QuantizedTensor(codes, scales, unit, fmt), dtype)
        assert torch.equal(values.cpu(), formats.dequantize(*expected, dtype=dtype))


@FORMAT
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_tiling(fmt: Format, m: int, dtype: torch.dtype) -> None:
    n, k = 1000, 4096 + 32
    weight = random_weight(fmt, n, k)
    values, bias = formats.dequantize(*weight).cuda(), torch.randn(n, device="cuda")
    operands = on_gpu(operands_of(weight))
    x = torch.randn(m, k, device="cuda").to(dtype)
    assert_product(BACKEND.linear(x, *operands, bias, n, None), x, values, bias)
    result = BACKEND.linear_quantized(x, *operands, bias, n, None, None, "abs_max")
    assert_product(result, quantized_activation(x, fmt, None, None, "abs_max"), values, bias)
    assert torch.equal(result, BACKEND.linear_quantized(x, *operands, bias, n, None, None, "abs_max"))


@FORMAT
@pytest.mark.parametrize("group", [16, 32, 64, 128])
def test_rotations(fmt: Format, group: int) -> None:
    weight, x = random_weight(fmt, 256, 1024), torch.randn(40, 1024, device="cuda").bfloat16()
    matrix, values = rotation.hadamard(group).float().cuda(), formats.dequantize(*weight).cuda()
    result = BACKEND.linear_quantized(x, *on_gpu(operands_of(weight)), None, 256, matrix, None, "abs_max")
    expected = quantized_activation(x, fmt, matrix, None, "abs_max") @ values.T
    assert (result.float() - expected).norm() < 0.02 * expected.norm()
    plain = BACKEND.linear(x, *on_gpu(operands_of(weight)), None, 256, matrix)
    assert_product(plain, rotation.rotate(x, matrix).to(x.dtype), values)


@FORMAT
@pytest.mark.parametrize("counts", [[0, 1, 700, 3, 0, 90], [5] * 64, [2000, 0]], ids=["mixed", "many", "one"])
def test_experts_of_any_size(fmt: Format, counts: list[int]) -> None:
    experts, n, k = len(counts), 200, 512
    weight = random_weight(fmt, experts, n, k)
    values, operands = formats.dequantize(*weight).cuda(), on_gpu(operands_of(weight))
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    x = torch.randn(sum(counts), k, device="cuda").bfloat16()
    plain = BACKEND.grouped_linear(x, *operands, None, offsets.cuda(), n, None)
    w4a4 = BACKEND.grouped_linear_quantized(x, *operands, None, offsets.cuda(), n, None, None, "abs_max")
    seen = quantized_activation(x, fmt, None, None, "abs_max")
    for e in range(experts):
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        assert_product(plain[rows], x[rows], values[e])
        assert_product(w4a4[rows], seen[rows], values[e])


def test_huge_activations() -> None:
    """More elements than 32 bits count."""
    rows, k, n = 70_000, 32_768, 16
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GB of free GPU memory")
    weight = random_weight(NVFP4, n, k)
    x = torch.zeros(rows, k, dtype=torch.bfloat16, device="cuda")
    x[-3:] = torch.randn(3, k, device="cuda").bfloat16()
    result = BACKEND.linear(x, *on_gpu(operands_of(weight)), None, n, None)
    assert_product(result[-3:], x[-3:], formats.dequantize(*weight).cuda())
    assert not result[:-3].any()
    codes, scales, _, _ = BACKEND.quantize(x, MXFP4)
    expected = formats.quantize(x[-3:].cpu(), MXFP4)
    assert torch.equal(codes[-3:].cpu(), expected.codes)
    assert torch.equal(scales[-3:].cpu().view(torch.uint8), expected.scales.view(torch.uint8))


def calls(fmt: Format) -> dict[str, Callable[[Tensor], Tensor]]:
    """Every product with a weight, as functions of x ``[24, 512]``."""
    n, experts, matrix = 96, 4, rotation.hadamard(32).float().cuda()
    one, many = (
        on_gpu(operands_of(random_weight(fmt, n, 512))),
        on_gpu(operands_of(random_weight(fmt, experts, n, 512))),
    )
    offsets = torch.tensor([0, 3, 3, 20, 24], dtype=torch.int32, device="cuda")
    return {
        "linear": lambda x: BACKEND.linear(x, *one, None, n, matrix),
        "w4a4": lambda x: BACKEND.linear_quantized(x, *one, None, n, matrix, None, "abs_max"),
        "grouped": lambda x: BACKEND.grouped_linear(x, *many, None, offsets, n, None),
        "grouped w4a4": lambda x: BACKEND.grouped_linear_quantized(x, *many, None, offsets, n, None, None, "abs_max"),
    }


@FORMAT
@pytest.mark.parametrize("name", ["linear", "w4a4", "grouped", "grouped w4a4"])
def test_cuda_graph(fmt: Format, name: str) -> None:
    call = calls(fmt)[name]
    x = torch.randn(24, 512, device="cuda").bfloat16()
    call(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(x)
    for seed in range(3):
        fresh = torch.randn(24, 512, generator=torch.Generator().manual_seed(seed)).bfloat16()
        x.copy_(fresh)
        graph.replay()
        assert torch.equal(captured, call(fresh.cuda()))


@FORMAT
@pytest.mark.parametrize("name", ["linear", "w4a4", "grouped", "grouped w4a4"])
def test_nothing_waits_for_the_gpu(fmt: Format, name: str) -> None:
    call = calls(fmt)[name]
    x = torch.randn(24, 512, device="cuda").bfloat16()
    call(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("activations", ["model", "fp4"])
def test_compiled_model(mode: str, activations: str) -> None:
    torch.manual_seed(0)
    scheme = Scheme(NVFP4, activations=activations)
    layers = [
        FP4Linear.from_linear(nn.Linear(*shape, device="cuda", dtype=torch.bfloat16), scheme, "triton")
        for shape in ((128, 256), (256, 128))
    ]
    model = nn.Sequential(layers[0], nn.SiLU(), layers[1])
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    with torch.inference_mode():
        for _ in range(4):  # CUDA graphs are recorded in the second call and replayed from the third on
            x = torch.randn(1, 128, device="cuda").bfloat16()
            torch.compiler.cudagraph_mark_step_begin()
            result = compiled(x).clone()
            torch.testing.assert_close(result, model(x), atol=0.02, rtol=0.02)


def test_other_devices() -> None:
    weight = random_weight(NVFP4, 40, 64)
    with pytest.raises(ValueError, match="activations are on cuda:0 and the weight is on cpu"):
        BACKEND.linear(torch.zeros(2, 64, device="cuda:0"), *operands_of(weight), None, 40, None)
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs for the rest")
    x = torch.randn(2, 64)
    second = tuple(a.to("cuda:1") if isinstance(a, Tensor) else a for a in operands_of(weight))
    result = BACKEND.linear(x.to("cuda:1"), *second, None, 40, None)  # while cuda:0 is current
    assert_product(result.cpu(), x, formats.dequantize(*weight))


def test_it_is_what_runs_here() -> None:
    """Weight-only layers choose it by themselves."""
    layer = FP4Linear.from_linear(nn.Linear(64, 64, device="cuda"), Scheme(NVFP4, activations="model"))
    assert layer.backend is BACKENDS["triton"]
