"""The GPU benchmarks without a GPU: what they build is right, and their tables judge rightly."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_generate  # noqa: E402  (of the folder above)
import gpu_linear  # noqa: E402
from gpu import Contender  # noqa: E402

CPU = torch.device("cpu")
LIMITS = {"copy_gbs": 4000.0, "bf16_tflops": 800.0}


def fake_timer(contenders: Mapping[str, Contender]) -> dict[str, float]:
    """Runs every contender with two of its weights, and says that bf16 takes 4 s and all others 1 s."""
    for contender in contenders.values():
        first, second = (contender.operation(i) for i in range(2))
        if isinstance(first, torch.Tensor):
            assert torch.equal(first, second)
    return {name: 4.0 if name == "bf16" else 1.0 for name in contenders}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["gpu_linear", "gpu_generate"])
def test_without_a_gpu_it_ends_with_one_sentence(script: str) -> None:
    command = [sys.executable, str(BENCHMARKS / f"{script}.py")]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.startswith("nothing to measure: ")
    assert ended.stderr.count("\n") == 1


def test_shapes_are_those_of_the_models() -> None:
    def parameters(model: str) -> int:
        return sum(layer.count * layer.n * layer.k for layer in gpu_linear.MODELS[model])

    assert parameters("Llama-3.1-8B") * 32 == 6_979_321_856
    assert parameters("Llama-3.1-70B") * 80 == 68_451_041_280
    assert parameters("Qwen3-32B") * 64 == 31_205_621_760


def test_every_kernel_is_checked_and_timed() -> None:
    layer = gpu_linear.Layer("gate, up", 48, 64, 2)
    cases = gpu_linear.measure_layer(layer, (1, 3), CPU, True, fake_timer)
    assert [case["m"] for case in cases] == [1, 3]
    for case in cases:
        kinds = {" ".join(name.split()[:2]) for name in case["seconds"]}
        assert {"bf16", "nvfp4 w4a16", "mxfp4 w4a16"} <= kinds
        assert case["bytes"]["bf16"] == 2 * 48 * 64
        assert case["bytes"][gpu_linear.fp4_name(case, "nvfp4")] >= 48 * 64 * 9 // 16
    quantization = [{"name": "nvfp4, no rotation", "seconds": 1.0, "bytes": 10}]
    sections = gpu_linear.sections_of({"tiny": cases}, quantization, LIMITS)
    assert "4.00 (>= 2.8: pass)" in sections["Targets"]
    assert "a copy moves 4000 GB/s" in sections["Targets"]
    assert "48 x 64" in sections["tiny"]


def test_a_wrong_result_is_not_timed() -> None:
    right = torch.randn(4, 4)
    gpu_linear.check("nvfp4 w4a16 x", right, right)
    for wrong in (right * 1.1, right * float("nan")):
        with pytest.raises(SystemExit, match="nvfp4 w4a16 x is wrong"):
            gpu_linear.check("nvfp4 w4a16 x", wrong, right)


def case(name: str, m: int, seconds: dict[str, float], count: int = 1) -> dict[str, Any]:
    nbytes = dict.fromkeys(seconds, 4000)
    return {"name": name, "n": 8, "k": 16, "count": count, "m": m, "seconds": seconds, "bytes": nbytes}


def test_targets_are_judged_by_whole_blocks_and_name_the_worst_layer() -> None:
    names = ("nvfp4 w4a16 triton", "mxfp4 w4a16 triton")
    fast, slow = dict.fromkeys(names, 1e-9), dict.fromkeys(names, 2e-9)
    cases = [
        case("q", 1, {"bf16": 3e-9, **fast}, 3),
        case("k", 1, {"bf16": 3e-9, **slow}),
        case("q", 512, {"bf16": 0.95e-9, **fast}),
        case("q", 1024, {"bf16": 0.8e-9, **fast}),
    ]
    lines = gpu_linear.judged({"m": cases}, [], 4000.0)
    of = {line[0]: line[2:] for line in lines if line[0].startswith("nvfp4")}
    # 4 layers of 4000 bytes in 5e-9 s are 3200 GB/s; 12e-9 s of bf16 are 2.4 times that.
    assert of["nvfp4 weight-only, M = 1, of copy bandwidth"] == ["0.80 (>= 0.8: pass)", "0.50 (k)"]
    assert of["nvfp4 weight-only, M = 1, x cuBLAS bf16"] == ["2.40 (>= 2.8: 14% short)", "1.50 (k, M = 1)"]
    assert of["nvfp4 weight-only, M >= 512, x cuBLAS bf16"] == ["0.80 (>= 0.9: 11% short)", "0.80 (q, M = 1024)"]
    assert "nvfp4 weight-only, M = 16, x cuBLAS bf16" not in of
    quantization = [
        {"name": "nvfp4, Hadamard 16", "seconds": 1.0, "bytes": 3.6e12},
        {"name": "nvfp4, Hadamard 16, global scale found first", "seconds": 1.0, "bytes": 2e12},
    ]
    cells = [line[2] for line in gpu_linear.judged({}, quantization, 4000.0)]
    assert cells == ["0.90 (>= 0.8: pass)", "0.50"]


def test_fp4_activations_are_summed_over_the_block() -> None:
    cases = [case(name, 16, {"bf16": 4e-9, "nvfp4 w4a4 cutlass": 1e-9}, 2) for name in ("q", "o")]
    flops = 4 * 2 * 16 * 8 * 16
    row = ["m", "16", "nvfp4 w4a4 cutlass", f"{flops / 16e-9 / 1e12:.1f}", f"{flops / 4e-9 / 1e12:.1f}", "4.00"]
    assert gpu_linear.w4a4_rows({"m": cases}) == [row]


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton's interpreter (make pytest-triton)",
)
def test_both_ways_to_decode_are_timed() -> None:
    products = []

    def time(contenders: Mapping[str, Contender]) -> dict[str, float]:
        products.append([contender.operation(0) for contender in contenders.values()])
        return {"in tiles": 2e-6, "once": 1e-6}

    lines = gpu_linear.crossover(gpu_linear.Layer("q", 48, 64, 1), CPU, time, (3,))
    assert lines == [["q 48 x 64", "3", "2.0", "1.0", "once"]]
    torch.testing.assert_close(*products[0], atol=0.1, rtol=0.02)


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton's interpreter (make pytest-triton)",
)
def test_quantization_is_timed() -> None:
    cases = gpu_linear.measure_quantization(
        (2, 64), CPU, lambda c: {n: float(bool(o.operation(1))) for n, o in c.items()}, (16,)
    )
    assert [case["name"] for case in cases if case["name"].startswith("mxfp4")] == [
        "mxfp4, no rotation",
        "mxfp4, Hadamard 16",
    ]
    assert cases[0]["bytes"] == 2 * 64 * 2 + 64 + 8
    assert len(cases) == 6


def test_a_tiny_model_decodes() -> None:
    config = gpu_generate.llama_8b(1)
    config.update({"vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4})
    config.update({"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64})
    result = gpu_generate.measure(config, ["nvfp4"], CPU, 1, 3)
    assert set(result["seconds"]) == {"bf16", "fp4 nvfp4"}
    projections = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64
    rest = 2 * (200 * 64 + 3 * 64)
    assert result["bytes"]["bf16"] == projections * 2 + rest
    assert projections * 9 // 16 + rest <= result["bytes"]["fp4 nvfp4"] < projections + rest
    case = {"bytes": {"bf16": 10, "fp4 nvfp4": 4}, "seconds": {"bf16": 0.01, "fp4 nvfp4": 0.003}}
    lines = gpu_generate.results_table(case, 1.0).splitlines()
    assert "3.33 (>= 2.5: pass)" in lines[-1]
    assert "333.3" in lines[-1]
