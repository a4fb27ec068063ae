"""Every operator refuses a wrong call with a sentence: when a graph is traced, and before a Python backend computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fp4  # noqa: F401  (registers the operators)
from fp4 import ops
from fp4.backends import BACKENDS
from fp4.numerics.formats import FP8, MXFP4, NVFP4, Format

N, K, T, E = 24, 64, 5, 3
Arguments = dict[str, Any]
Change = Callable[[Arguments], object]


def weight_of(fmt: Format, *lead: int) -> Arguments:
    torch.manual_seed(0)
    codes, scales, global_scale, _ = fmt.quantize(torch.randn(*lead, N, K))
    return {"weight": codes, "weight_scale": scales, "global_scale": global_scale, "format": fmt.name}


def quantized(fmt: Format) -> Arguments:
    codes, scales, global_scale, _ = fmt.quantize(torch.randn(2, N, K))
    return {"codes": codes, "scales": scales, "global_scale": global_scale, "format": fmt.name}


OFFSETS = torch.tensor([0, 2, 2, 4], dtype=torch.int32)
ACTIVATION = {"rotation": None, "input_global_scale": None, "rule": "abs_max"}
GRADIENT = {"in_features": K, "rotation": None}


def arguments_of(name: str, fmt: Format = NVFP4) -> Arguments:
    """A right call."""
    x, plain = torch.randn(T, K), {"bias": torch.randn(N), "out_features": N}
    grouped = {"bias": torch.randn(E, N), "offsets": OFFSETS.clone(), "out_features": N}
    calls: dict[str, Callable[[], Arguments]] = {
        "linear": lambda: {"x": x, **weight_of(fmt), **plain, "rotation": torch.eye(16)},
        "linear_quantized": lambda: {"x": x, **weight_of(fmt), **plain, **ACTIVATION},
        "grouped_linear": lambda: {"x": x, **weight_of(fmt, E), **grouped, "rotation": None},
        "grouped_linear_quantized": lambda: {"x": x, **weight_of(fmt, E), **grouped, **ACTIVATION},
        "input_gradient": lambda: {"gradient": torch.randn(T, N), **weight_of(fmt), **GRADIENT},
        "grouped_input_gradient": lambda: {
            "gradient": torch.randn(T, N), **weight_of(fmt, E), "offsets": OFFSETS.clone(), **GRADIENT
        },
        "largest_magnitude": lambda: {"x": torch.randn(2, N, K)},
        "quantize": lambda: {
            "x": torch.randn(2, N, K),
            "global_scale": torch.ones(2).double() if fmt.needs_global_scale else None,
            "format": fmt.name,
            "rule": "abs_max",
        },
        "dequantize": lambda: {**quantized(fmt), "dtype": torch.bfloat16},
    }  # fmt: skip
    return calls[name]()


NAMES = (
    "linear", "linear_quantized", "grouped_linear", "grouped_linear_quantized", "input_gradient",
    "grouped_input_gradient", "largest_magnitude", "quantize", "dequantize",
)  # fmt: skip


def described(results: Any) -> list[tuple[torch.Size, torch.dtype]]:
    return [(t.shape, t.dtype) for t in (results if isinstance(results, tuple) else (results,))]


def traced(backend: str, name: str, arguments: Arguments) -> Any:
    """The call on tensors without values, as a graph is traced."""
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fakes = {key: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for key, v in arguments.items()}
        return ops.operator(backend, name)(**fakes)


@pytest.mark.parametrize("fmt", [NVFP4, MXFP4, FP8, NVFP4.wide(32), MXFP4.wide(64)], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("name", NAMES)
def test_the_fake_gives_what_the_reference_computes(name: str, fmt: Format) -> None:
    arguments = arguments_of(name, fmt)
    assert described(traced("reference", name, arguments)) == described(ops.operator("reference", name)(**arguments))


LINEARS = ("linear", "linear_quantized", "grouped_linear", "grouped_linear_quantized")
GROUPED = ("grouped_linear", "grouped_linear_quantized", "grouped_input_gradient")
QUANTIZED = ("linear_quantized", "grouped_linear_quantized")
GRADIENTS = ("input_gradient", "grouped_input_gradient")
WEIGHTED = (*LINEARS, *GRADIENTS)
FLOATS = "expected float32, bfloat16 or float16"


def change(key: str, value: Any) -> Change:
    return lambda arguments: arguments.update({key: value(arguments[key]) if callable(value) else value})


# (operators, what is wrong, what is said)
WRONG: list[tuple[tuple[str, ...], Change, str]] = [
    (LINEARS, change("x", torch.Tensor.int), f"x is torch.int32; {FLOATS}"),
    (LINEARS, change("x", torch.Tensor.double), f"x is torch.float64; {FLOATS}"),
    (LINEARS, change("x", lambda x: x[:, :50]), r"the last axis has 50 elements; nvfp4 needs a multiple of 16"),
    (LINEARS[:2], change("x", torch.tensor(1.0)), r"x has shape \(\); expected \[\.\.\., K\]"),
    (("grouped_linear", "grouped_linear_quantized"), change("x", lambda x: x[None]), r"expected \[T, K\], sorted by"),
    (WEIGHTED, change("weight", torch.Tensor.float), "weight is torch.float32; nvfp4 weights are torch.uint8"),
    (WEIGHTED, change("format", "mxfp4"), "weight_scale is torch.float8_e4m3fn; mxfp4 expects torch.float8_e8m0fnu"),
    (WEIGHTED, change("format", "int4"), "format 'int4' is unknown; expected one of nvfp4, mxfp4, fp8"),
    (WEIGHTED, change("global_scale", None), "nvfp4 needs a global scale, but there is none"),
    (WEIGHTED, change("global_scale", torch.Tensor.float), "global_scale is torch.float32; expected float64"),
    (WEIGHTED, change("global_scale", torch.ones(7).double()), r"global_scale has shape \(7,\); expected [13] el"),
    (LINEARS, change("bias", torch.ones(N + 1)), rf"bias has shape \({N + 1},\); expected"),
    (LINEARS, change("bias", torch.Tensor.int), f"bias is torch.int32; {FLOATS}"),
    (WEIGHTED, change("rotation", torch.eye(24)), r"rotation has shape \(24, 24\); expected a square that divides 64"),
    (WEIGHTED, change("rotation", torch.ones(16, 32)), r"rotation has shape \(16, 32\); expected a square"),
    (GROUPED, change("offsets", torch.Tensor.long), r"offsets are torch.int64 \(4,\); expected int32 \(4,\)"),
    (GROUPED, change("offsets", lambda o: o[1:]), r"offsets are torch.int32 \(3,\); expected int32 \(4,\)"),
    (QUANTIZED, change("rule", "ceil"), "scale rule 'ceil' is not defined for nvfp4; use one of abs_max, mse"),
    (QUANTIZED, change("input_global_scale", torch.ones(2).double()), r"input_global_scale has shape \(2,\)"),
    (GRADIENTS, change("gradient", torch.Tensor.int), f"gradient is torch.int32; {FLOATS}"),
    (GRADIENTS, change("in_features", 50), "the last axis has 50 elements"),
    (("largest_magnitude",), change("x", torch.Tensor.bool), f"x is torch.bool; {FLOATS}"),
    (("largest_magnitude",), change("x", torch.ones(3)), r"x has shape \(3,\); expected \[\.\.\., N, K\]"),
    (("quantize",), change("x", torch.Tensor.int), f"x is torch.int32; {FLOATS}"),
    (("quantize",), change("x", lambda x: x[..., :40]), "the last axis has 40 elements; nvfp4 needs a multiple of 16"),
    (("quantize",), change("rule", "best"), "scale rule 'best' is not defined for nvfp4"),
    (("quantize",), change("global_scale", None), "nvfp4 needs a global scale"),
    (("quantize",), change("global_scale", torch.ones(3).double()), r"global_scale has shape \(3,\); expected 2"),
    (("dequantize",), change("codes", torch.Tensor.int), "codes are torch.int32; nvfp4 codes are torch.uint8"),
    (("dequantize",), change("format", "mxfp4"), "scales are torch.float8_e4m3fn; mxfp4 expects torch.float8_e8m0fnu"),
    (("dequantize",), change("format", "nvfp4_32"), r"do not belong together: expected scales of shape \(2, 24, 2\)"),
    (("dequantize",), change("scales", lambda s: s[:1]), r"do not belong together: expected .*\(2, 24, 4\)"),
    (("dequantize",), change("dtype", torch.int32), f"dtype is torch.int32; {FLOATS}"),
]  # fmt: skip
CASES = [pytest.param(name, *case, id=f"{name}-{i}") for i, (names, *case) in enumerate(WRONG) for name in names]


@pytest.mark.parametrize(("name", "wrong", "message"), CASES)
def test_a_wrong_call_fails_when_it_is_traced(name: str, wrong: Change, message: str) -> None:
    arguments = arguments_of(name)
    wrong(arguments)
    for backend in ops.BACKENDS:
        with pytest.raises((RuntimeError, ValueError), match=message):
            traced(backend, name, arguments)


@pytest.mark.parametrize(("name", "wrong", "message"), CASES)
def test_a_wrong_call_of_the_reference_fails_before_it_computes(name: str, wrong: Change, message: str) -> None:
    arguments = arguments_of(name)
    wrong(arguments)
    with pytest.raises((RuntimeError, ValueError), match=message):
        ops.operator("reference", name)(**arguments)


def test_fp8_has_no_global_scale() -> None:
    for name in WEIGHTED:
        arguments = arguments_of(name, FP8) | {"global_scale": torch.ones(()).double()}
        with pytest.raises(RuntimeError, match="fp8 has no global scale, but one was given; leave it out"):
            traced("reference", name, arguments)


@pytest.mark.parametrize("backend", [name for name, b in BACKENDS.items() if not b.unavailable()])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool], ids=str)
def test_every_backend_refuses_input_that_is_not_floating_point(backend: str, dtype: torch.dtype) -> None:
    for fmt in (NVFP4, FP8):
        if not {fmt.name} <= set(BACKENDS[backend].formats):
            continue
        for name in LINEARS:
            if backend == "scaled_mm" and not name.endswith("quantized"):
                continue
            arguments = arguments_of(name, fmt)
            packed = BACKENDS[backend].pack(arguments["weight"], arguments["weight_scale"], fmt)
            arguments |= {"x": arguments["x"].to(dtype), "weight": packed[0], "weight_scale": packed[1]}
            with pytest.raises(RuntimeError, match=r"x (is torch\.\w+; expected|must be) float32, bfloat16 or float16"):
                ops.operator(backend, name)(**arguments)


def test_a_wrong_call_fails_in_a_compiled_graph() -> None:
    arguments = arguments_of("linear")

    def run(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = ops.operator("reference", "linear")(**(arguments | {"x": x}))
        return out

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(arguments["x"]), run(arguments["x"]))
    with pytest.raises(Exception, match=f"x is torch.int32; {FLOATS}"):
        compiled(arguments["x"].int())
