"""Every matmul configuration compiles for every GPU generation, without a GPU: Triton brings its own assembler."""

from __future__ import annotations

import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton is not installed, or is set to interpret", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fp4.backends.triton.linear import SCALED_TILINGS, SMALL_SCALED_TILINGS, TILINGS, Tiling
from fp4.backends.triton.matmul import multiply
from fp4.backends.triton.scaled import multiply_scaled

CONSTANTS = ("MX", "PARTS", "UNIT_BY_ROW", "BE", "BM", "SLICES", "PANELS", "CHUNKS", "SPLIT")


def compile_multiply(capability: int, dtype: str, mx: bool, tiling: Tiling, grouped: bool) -> str:
    """PTX of one specialisation; raises where Triton or its assembler refuses it."""
    types = dict.fromkeys(multiply.arg_names, "i32") | dict.fromkeys(CONSTANTS, "constexpr")
    types |= {"x": f"*{dtype}", "out": f"*{dtype}", "weight": "*u32", "weight_scale": "*u8", "unit": "*fp64"}
    types |= {"x_unit": "constexpr", "bias": "constexpr", "offsets": "*i32" if grouped else "constexpr"}
    constants = {
        "x_unit": None, "bias": None, "MX": mx, "PARTS": {"bf16": 1, "fp16": 2 if mx else 1, "fp32": 3}[dtype],
        "UNIT_BY_ROW": False, "BE": 64 if grouped else 0, "SPLIT": 1, "BM": tiling.BM, "SLICES": tiling.SLICES,
        "PANELS": tiling.PANELS, "CHUNKS": tiling.CHUNKS,
    }  # fmt: skip
    if not grouped:
        constants["offsets"] = None
    aligned = [multiply.arg_names.index(n) for n in ("x", "weight", "weight_scale", "out", "N", "K", "chunks")]
    source = ASTSource(multiply, types, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return str(compiled.asm["ptx"])


@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_one_row_compiles_everywhere(capability: int) -> None:
    assert "mma.sync" in compile_multiply(capability, "bf16", False, TILINGS[1], False)


@pytest.mark.parametrize("tiling", TILINGS.values(), ids=lambda tiling: f"BM{tiling.BM}")
def test_every_tiling_compiles_for_hopper(tiling: Tiling) -> None:
    assert "mma" in compile_multiply(90, "bf16", False, tiling, False)


@pytest.mark.parametrize(("dtype", "mx"), [("bf16", True), ("fp16", False), ("fp16", True), ("fp32", False)])
def test_every_type_compiles(dtype: str, mx: bool) -> None:
    assert "mma" in compile_multiply(90, dtype, mx, TILINGS[1], False)


def test_experts_compile() -> None:
    assert "mma" in compile_multiply(90, "bf16", False, TILINGS[8], True)


def compile_scaled(capability: int, mx: bool, tiling: Tiling) -> tuple[str, str]:
    """PTX and machine code of the product with FP4 activations."""
    types = dict.fromkeys(multiply_scaled.arg_names, "i32") | dict.fromkeys(
        ("MX", "UNIT_BY_ROW", "BE", "BM", "PANELS", "CHUNKS", "SPLIT", "bias", "offsets"), "constexpr"
    )
    types |= dict.fromkeys(("x", "x_scale", "weight", "weight_scale"), "*u8")
    types |= {"out": "*bf16", "unit": "*fp64", "x_unit": "*fp64"}
    constants = {
        "bias": None, "offsets": None, "MX": mx, "UNIT_BY_ROW": False, "BE": 0, "BM": tiling.BM,
        "PANELS": tiling.PANELS, "CHUNKS": tiling.CHUNKS, "SPLIT": 1,
    }  # fmt: skip
    names = ("x", "x_scale", "weight", "weight_scale", "out", "N", "K", "scale_stride")
    aligned = [multiply_scaled.arg_names.index(n) for n in names]
    source = ASTSource(multiply_scaled, types, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return str(compiled.asm["ptx"]), str(compiled.asm["sass"])


@pytest.mark.parametrize("mx", [False, True], ids=["nvfp4", "mxfp4"])
@pytest.mark.parametrize("tiling", SCALED_TILINGS.values(), ids=lambda tiling: f"BM{tiling.BM}")
def test_blackwell_multiplies_fp4(tiling: Tiling, mx: bool) -> None:
    kind = "mxf4.block_scale.scale_vec::2X" if mx else "mxf4nvf4.block_scale.scale_vec::4X"
    ptx, machine_code = compile_scaled(100, mx, tiling)
    assert f"tcgen05.mma.cta_group::1.kind::{kind}" in ptx
    assert "UTCOMMA" in machine_code
    assert "STL" not in machine_code  # nothing is spilled


@pytest.mark.parametrize("mx", [False, True], ids=["nvfp4", "mxfp4"])
@pytest.mark.parametrize("tiling", SMALL_SCALED_TILINGS.values(), ids=lambda tiling: f"BM{tiling.BM}")
def test_consumer_blackwell_multiplies_fp4(tiling: Tiling, mx: bool) -> None:
    kind = f"kind::mxf4nvf4.block_scale.scale_vec::{2 if mx else 4}X.f32.e2m1.e2m1"
    ptx, machine_code = compile_scaled(120, mx, tiling)
    assert kind in ptx
    assert "OMMA.SF.16864.F32.E2M1.E2M1" in machine_code
    assert "STL" not in machine_code
