"""Every matmul configuration compiles for every GPU generation, without a GPU: Triton brings its own assembler."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton is not installed, or is set to interpret", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fp4.backends.triton.dense import decode_panels
from fp4.backends.triton.largest_magnitude import _magnitudes, tile_of
from fp4.backends.triton.linear import (
    HOPPER_TILINGS,
    MMA_HOPPER_TILINGS,
    SCALED_TILINGS,
    SMALL_SCALED_TILINGS,
    TILINGS,
    Tiling,
)
from fp4.backends.triton.matmul import add_partial_sums, multiply
from fp4.backends.triton.quantize import CANONICAL, INTERLEAVED, ROTATED, VALUES, _dequantize, _quantize
from fp4.backends.triton.quantize_blocks import launch_of, quantize_blocks
from fp4.backends.triton.scaled import multiply_scaled
from fp4.numerics.formats import MXFP4, NVFP4

CONSTANTS = ("MX", "PARTS", "SHUFFLED", "UNIT_BY_ROW", "BE", "BM", "SLICES", "PANELS", "CHUNKS", "SPLIT")
ALIGNED = ("N", "K", "chunks", "scale_stride", "width")
ANY = Tiling(0, 0, 0, 0, 4, 3)  # the quantization kernels have four warps
# Bytes of shared memory that a program can have.
SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


def compiled(kernel: Any, capability: int, types: dict[str, str], constants: dict[str, Any], tiling: Tiling) -> Any:
    """One specialisation for a GPU that need not be there: its ``asm`` has PTX ("ptx") and machine code ("sass").

    Checks that it fits the GPU, and that nothing is spilled to memory: ``STL`` would be the instruction.
    """
    aligned = [i for i, name in enumerate(kernel.arg_names) if types[name].startswith("*") or name in ALIGNED]
    source = ASTSource(kernel, types, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert result.metadata.shared <= SHARED_MEMORY[capability]
    assert "STL" not in result.asm["sass"]
    return result


def compile_multiply(
    capability: int, dtype: str, mx: bool, tiling: Tiling, grouped: bool = False, fixed: dict[str, int] | None = None
) -> Any:
    types = dict.fromkeys(multiply.arg_names, "i32") | dict.fromkeys(CONSTANTS, "constexpr")
    types |= {"x": f"*{dtype}", "out": f"*{dtype}", "weight": "*u32", "weight_scale": "*u8", "unit": "*fp64"}
    types |= {"x_unit": "constexpr", "bias": "constexpr", "offsets": "*i32" if grouped else "constexpr"}
    constants = {
        "x_unit": None, "bias": None, "MX": mx, "PARTS": {"bf16": 1, "fp16": 2 if mx else 1, "fp32": 3}[dtype],
        "SHUFFLED": capability == 90 and tiling.SLICES == 1, "UNIT_BY_ROW": False, "BE": 64 if grouped else 0,
        "SPLIT": 1, "BM": tiling.BM, "SLICES": tiling.SLICES, "PANELS": tiling.PANELS, "CHUNKS": tiling.CHUNKS,
    }  # fmt: skip
    if not grouped:
        constants["offsets"] = None
    types |= dict.fromkeys(fixed or {}, "constexpr")
    return compiled(multiply, capability, types, constants | (fixed or {}), tiling)


@pytest.mark.parametrize("capability", [80, 89, 100, 120])
@pytest.mark.parametrize("tiling", [TILINGS[1], TILINGS[1 << 30]], ids=lambda tiling: f"BM{tiling.BM}")
def test_few_and_many_rows_compile_everywhere(capability: int, tiling: Tiling) -> None:
    assert "mma" in compile_multiply(capability, "bf16", False, tiling).asm["ptx"]


@pytest.mark.parametrize("tiling", HOPPER_TILINGS.values(), ids=lambda tiling: f"BM{tiling.BM}")
def test_every_tiling_compiles_for_hopper(tiling: Tiling) -> None:
    code = compile_multiply(90, "bf16", False, tiling).asm["sass"]
    assert "LDGSTS.E.BYPASS.128" in code  # copies of 16 bytes a lane to shared memory, while others are multiplied
    assert "LDS.128" in code
    if tiling.SLICES > 1:
        assert "HMMA.16816.F32.BF16" in code
        return
    # Products by groups of four warps, the decoded operand from registers without a detour through shared memory; the
    # loop waits for older ones alone, and only its end for all.
    assert f"HGMMA.64x{tiling.BM}x16.F32.BF16" in code
    loop = code[: code.rindex("HGMMA")]
    assert "STS" not in loop[loop.index("HGMMA") :]
    assert "WARPGROUP.DEPBAR.LE gsb0, 0x0" not in loop


@pytest.mark.parametrize(("dtype", "mx"), [("bf16", False), ("bf16", True), ("fp16", False)])
@pytest.mark.parametrize("rows", [1, 1 << 30])
def test_hopper_without_wgmma(rows: int, dtype: str, mx: bool) -> None:
    """What older compilers get: no asynchronous product, whose registers their ptxas reuses too early."""
    code = compile_multiply(90, dtype, mx, MMA_HOPPER_TILINGS[rows]).asm["sass"]
    assert "HMMA.16816.F32" in code
    assert "GMMA" not in code


@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("mx", [False, True], ids=["nvfp4", "mxfp4"])
def test_decoding_compiles(capability: int, mx: bool) -> None:
    types = dict.fromkeys(decode_panels.arg_names, "i32") | {"MX": "constexpr", "CHUNKS": "constexpr"}
    types |= {"weight": "*u32", "weight_scale": "*u8", "unit": "*fp64", "out": "*bf16"}
    code = compiled(decode_panels, capability, types, {"MX": mx, "CHUNKS": 4}, ANY).asm["sass"]
    assert "STG.E.128" in code  # the eight values of a word at once


@pytest.mark.parametrize(("dtype", "mx"), [("bf16", True), ("fp16", False), ("fp16", True), ("fp32", False)])
@pytest.mark.parametrize("rows", [1, 64])
def test_every_type_compiles(dtype: str, mx: bool, rows: int) -> None:
    assert "mma" in compile_multiply(90, dtype, mx, HOPPER_TILINGS[rows]).asm["ptx"]


def test_experts_compile() -> None:
    assert "mma" in compile_multiply(90, "bf16", False, TILINGS[8], True).asm["ptx"]


def compile_quantize(capability: int, mx: bool, rule: str, mode: int, group: int, dynamic: bool) -> None:
    rows, columns = tile_of(4096, group)
    constants = {
        "MX": mx, "RULE": rule, "MODE": mode, "SHUFFLED": mode in (ROTATED.value, VALUES.value), "H": group,
        "BR": rows, "BC": columns,
    }  # fmt: skip
    codes = mode in (CANONICAL.value, INTERLEAVED.value)
    types = dict.fromkeys(_quantize.arg_names, "i32") | {"x": "*bf16", "codes": "*u32" if codes else "*bf16"}
    types |= {"rotation": "*fp32", "unit": "*fp64", "partial": "*i32", "taken_unit": "*fp64", "scales": "*u8"}
    absent = {"rotation": not group, "unit": mx or dynamic, "partial": not dynamic, "taken_unit": not dynamic}
    constants |= dict.fromkeys([name for name, missing in (absent | {"scales": not codes}).items() if missing])
    types |= dict.fromkeys(constants, "constexpr")
    compiled(_quantize, capability, types, constants, ANY)


@pytest.mark.parametrize("capability", [80, 120])
@pytest.mark.parametrize(
    ("mx", "rule", "mode", "group", "dynamic"),
    [
        (False, "mse", CANONICAL.value, 0, False),
        (False, "four_over_six", INTERLEAVED.value, 16, True),
        (True, "quest", VALUES.value, 128, False),
        (False, "", ROTATED.value, 32, False),
    ],
)
def test_quantization_compiles(capability: int, mx: bool, rule: str, mode: int, group: int, dynamic: bool) -> None:
    compile_quantize(capability, mx, rule, mode, group, dynamic)


def compile_blocks(capability: int, mx: bool, group: int, dynamic: bool) -> tuple[Any, int]:
    """quantize_blocks, as blocks.run launches it, and how many elements of a tile a thread has."""
    columns, lines, warps = launch_of(MXFP4 if mx else NVFP4, group, capability == 90)
    constants = {"MX": mx, "H": group, "INTERLEAVE": True, "FP8": capability >= 89, "LINES": lines}
    types = dict.fromkeys(quantize_blocks.arg_names, "i32") | {"x": "*bf16", "codes": "*u32", "scales": "*u8"}
    types |= {"rotation": "*fp32", "unit": "*fp64", "partial": "*i32", "taken_unit": "*fp64"}
    absent = {"rotation": not group, "unit": mx or dynamic, "partial": not dynamic, "taken_unit": not dynamic}
    constants |= dict.fromkeys(name for name, missing in absent.items() if missing)
    types |= dict.fromkeys(constants, "constexpr")
    tiling = Tiling(0, 0, 0, 0, warps, 2)
    return compiled(quantize_blocks, capability, types, constants, tiling), lines * columns // (32 * warps)


def fast_loop(code: str) -> int:
    """Instructions of the smaller of the outermost loops, the other being the one for unusual scales and rotations."""
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    count = 0
    for line in code.splitlines():
        if line.startswith("LBB"):
            labels[line.strip().rstrip(":")] = count
        elif "\t" in line:
            count += 1
            target = line.split("BRA")[-1].strip(" `();").split("(")[-1].strip("`") if "BRA" in line else ""
            if target in labels:
                loops.append((labels[target], count))
    outer = [a for a in loops if not any(b != a and b[0] <= a[0] and a[1] <= b[1] for b in loops)]
    return min(end - start for start, end in outer if end - start > 200)


@pytest.mark.parametrize("capability", [80, 120])
@pytest.mark.parametrize(("mx", "group"), [(False, 0), (True, 0), (False, 16), (False, 128), (True, 32)])
def test_quantizing_blocks_compiles(capability: int, mx: bool, group: int) -> None:
    compile_blocks(capability, mx, group, not mx)


@pytest.mark.parametrize(
    ("mx", "group", "most"),
    [
        (False, 0, 18),
        (False, 16, 20),
        (False, 64, 20),
        (False, 128, 18),
        (True, 0, 15),
        (True, 32, 15),
        (True, 128, 15),
    ],
)
def test_quantizing_blocks_takes_few_instructions(mx: bool, group: int, most: int) -> None:
    """An element's share of a turn of the loop; 23 would keep an H200 busy for the time that its memory takes."""
    result, elements = compile_blocks(90, mx, group, False)
    assert fast_loop(result.asm["sass"]) / elements <= most
    if group:
        assert "HGMMA" in result.asm["sass"]


def test_no_kernel_is_compiled_anew_for_a_number_of_rows() -> None:
    """A kernel for a row, one for numbers that 16 divides and one for the rest would be three of each."""
    kernels = {multiply: "rows", multiply_scaled: "rows", _quantize: "rows", quantize_blocks: "blocks"}
    for kernel, name in (kernels | {_magnitudes: "rows", _dequantize: "rows"}).items():
        (parameter,) = (p for p in kernel.params if p.name == name)
        assert parameter.do_not_specialize, kernel


def test_the_other_kernels_compile() -> None:
    types = dict.fromkeys(_dequantize.arg_names, "i32") | dict.fromkeys(("MX", "BR", "BC"), "constexpr")
    types |= {"codes": "*u8", "scales": "*u8", "unit": "*fp64", "out": "*bf16"}
    compiled(_dequantize, 80, types, {"MX": False, "BR": 8, "BC": 256}, ANY)
    types = dict.fromkeys(_magnitudes.arg_names, "i32") | dict.fromkeys(("H", "BR", "BC"), "constexpr")
    types |= {"offsets": "*i32"}
    compiled(
        _magnitudes,
        80,
        types | {"x": "*bf16", "rotation": "*fp32", "partial": "*i32"},
        {"H": 64, "BR": 8, "BC": 256},
        ANY,
    )


def test_arguments_of_one_compile() -> None:
    """Triton makes an integer argument of 1 a constant, which has fewer methods."""
    types = dict.fromkeys(add_partial_sums.arg_names, "constexpr") | {"partial": "*fp32", "out": "*bf16"}
    compiled(add_partial_sums, 80, types, {"count": 1, "SPLIT": 4, "BLOCK": 1024}, ANY)
    tiling = TILINGS[1]
    ones = dict.fromkeys(("rows", "N", "chunks", "experts"), 1)
    for grouped in (False, True):
        compile_multiply(80, "bf16", False, tiling, grouped, ones)


def compile_scaled(capability: int, mx: bool, tiling: Tiling) -> Any:
    types = dict.fromkeys(multiply_scaled.arg_names, "i32") | dict.fromkeys(
        ("MX", "UNIT_BY_ROW", "BE", "BM", "PANELS", "CHUNKS", "SPLIT", "bias", "offsets"), "constexpr"
    )
    types |= dict.fromkeys(("x", "x_scale", "weight", "weight_scale"), "*u8")
    types |= {"out": "*bf16", "unit": "*fp64", "x_unit": "*fp64"}
    constants = {
        "bias": None, "offsets": None, "MX": mx, "UNIT_BY_ROW": False, "BE": 0, "BM": tiling.BM,
        "PANELS": tiling.PANELS, "CHUNKS": tiling.CHUNKS, "SPLIT": 1,
    }  # fmt: skip
    return compiled(multiply_scaled, capability, types, constants, tiling)


@pytest.mark.parametrize("mx", [False, True], ids=["nvfp4", "mxfp4"])
@pytest.mark.parametrize("tiling", SCALED_TILINGS.values(), ids=lambda tiling: f"BM{tiling.BM}")
def test_blackwell_multiplies_fp4(tiling: Tiling, mx: bool) -> None:
    kind = "mxf4.block_scale.scale_vec::2X" if mx else "mxf4nvf4.block_scale.scale_vec::4X"
    result = compile_scaled(100, mx, tiling)
    assert f"tcgen05.mma.cta_group::1.kind::{kind}" in result.asm["ptx"]
    assert "UTCOMMA" in result.asm["sass"]


@pytest.mark.parametrize("mx", [False, True], ids=["nvfp4", "mxfp4"])
@pytest.mark.parametrize("tiling", SMALL_SCALED_TILINGS.values(), ids=lambda tiling: f"BM{tiling.BM}")
def test_consumer_blackwell_multiplies_fp4(tiling: Tiling, mx: bool) -> None:
    kind = f"kind::mxf4nvf4.block_scale.scale_vec::{2 if mx else 4}X.f32.e2m1.e2m1"
    result = compile_scaled(120, mx, tiling)
    assert kind in result.asm["ptx"]
    assert "OMMA.SF.16864.F32.E2M1.E2M1" in result.asm["sass"]
