"""fp4's codes and scales against fp_quant 0.3.2, the library behind Transformers' own FPQuantConfig.

Its Triton kernels run on the CPU under Triton's interpreter, in a process of their own (``fp_quant_reference.py``).
Needs the ``parity`` extra. Where fp_quant is at fault, fp4 does something else on purpose, and a test here shows it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fp4.checkpoint.formats.pseudo_quantized import recover
from fp4.numerics.elements import decode_e2m1, unpack_codes
from fp4.numerics.formats import FORMATS, MXFP4, NVFP4, Format, dequantize, quantize
from fp4.numerics.rotation import ROTATIONS, rotate

for package, version in (("fp_quant", "0.3.2"), ("triton", None), ("scipy", None)):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: make parity installs it", allow_module_level=True)
    if version is not None and importlib.metadata.version(package) != version:
        pytest.skip(f"compares with {package} {version}, another version is installed", allow_module_level=True)

# FPQuantConfig's (forward_dtype, forward_method) -> (format, scale rule, reciprocal global scale) that mean the same.
METHODS: dict[tuple[str, str], tuple[Format, str, float | None]] = {
    ("nvfp4", "abs_max"): (NVFP4, "abs_max", 3.0),
    ("mxfp4", "abs_max"): (MXFP4, "below_six", 3.0),
    ("mxfp4", "quest"): (MXFP4, "quest", None),
}
GROUP_SIZES = {"nvfp4": (16, 32, 64, 128), "mxfp4": (32, 64, 128)}
KERNELS = [
    (fmt, method, rotation, size)
    for (fmt, method) in METHODS
    for rotation, size in product(ROTATIONS, GROUP_SIZES[fmt])
]
TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
BF16 = torch.bfloat16


def matrix_of(rotation: str, size: int) -> Tensor:
    """fp_quant keeps its matrices in the weight's dtype, so that is what rotates."""
    return ROTATIONS[rotation](size).to(BF16)


def random_weight() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = torch.exp2(8 * torch.rand(64, 1, generator=generator) - 4)
    return (torch.randn(64, 256, generator=generator) * rows).to(BF16)


def adversarial_weight() -> Tensor:
    """One row each."""
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(12, 256, generator=generator)
    x = normal * 0.1
    x[0] = 0.0
    x[1, 100] = 1000.0  # beyond 6 * 448 / 3, the largest value under the fixed global scale
    x[2] = -normal[2].abs()
    x[3] = normal[3] * 1e4
    x[4] = 1.0
    x[5] = torch.tensor([3.0, -3.0]).repeat(128)
    x[6] = 0.0
    x[6, 77] = -0.5
    x[7] = 0.01 * normal[7].sign()
    x[8] = torch.exp2(normal[8])
    x[9, :128] = 0.0
    x[10] = torch.linspace(-4, 4, 256)
    x[11, ::16] = 448.0
    return x.to(BF16)


def tie_weight(fmt: str, method: str) -> Tensor:
    """[8, 128] not to be rotated: every block has a known scale and holds each rounding tie at both signs."""
    if fmt == "nvfp4":  # amax 4 -> stored scale fl(3 * 4 / 6) = 2 exactly, code = x * 3 / 2
        block = torch.tensor([4.0, 0.5, -0.5, 1.5, -1.5, 0, 2.0, -1.0] + [0.5] * 8)
    elif method == "abs_max":  # amax in [1, 2) -> exponent 0, code = x * 3
        block = torch.tensor([1.75, 0.25, -0.25, 0.5, -1.25, 1.25, -0.75, 0.75] + [0.25] * 24)
    else:  # scale 1: code = x
        block = torch.tensor([sign * tie for tie in TIES for sign in (1, -1)] + [2.0, -2.0] * 9)
    return block.repeat(8, 128 // len(block)).to(BF16)


def build_cases() -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    cases: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}

    def add(kind: str, name: str, given: dict[str, Tensor], **options: Any) -> None:
        cases.append({"kind": kind, "name": name, **options})
        tensors.update({f"{name}.{key}": value.contiguous() for key, value in given.items()})

    def kernel(name: str, x: Tensor, matrix: Tensor, fmt: str, method: str, **options: Any) -> None:
        given = {"x": x.float(), "matrix": matrix.float()}  # values of bfloat16, so that results are not rounded to it
        add("kernel", name, given, format=fmt, method=method, global_scale=3.0, **options)

    for fmt, method, rotation, size in KERNELS:
        for data, x in (("random", random_weight()), ("adversarial", adversarial_weight())):
            kernel(f"{fmt}-{method}-{rotation}-{size}-{data}", x, matrix_of(rotation, size), fmt, method)
    generator = torch.Generator().manual_seed(2)
    for fmt, method in METHODS:
        kernel(f"ties-{fmt}-{method}", tie_weight(fmt, method), torch.eye(32), fmt, method)
        random = random_weight()
        kernel(f"unrepaired-{fmt}-{method}", random, matrix_of("identity", 32), fmt, method, repaired=False)
        for master, bias in product((False, True), repeat=2):
            weight = torch.randn(40, 96, generator=generator).to(BF16)
            given = {
                "weight": weight,
                "x": torch.randn(5, 96, generator=generator).to(BF16),
                "grad": torch.randn(5, 40, generator=generator).to(BF16),
            }
            if bias:
                given["bias"] = torch.randn(40, generator=generator).to(BF16)
            name = f"module-{fmt}-{method}-{'master' if master else 'frozen'}-{'bias' if bias else 'plain'}"
            options = {"store_master_weights": master, "group_size": 32, "rotation": "hadamard"}
            add("module", name, given, format=fmt, method=method, **options)
    small = torch.full((2, 64), 2.0**-9) * torch.tensor([1.0, -0.5]).repeat(32)
    small[1, :16] *= 2
    kernel("underflow", small, torch.eye(16), "nvfp4", "abs_max")
    below = torch.nextafter(torch.tensor(32.0), torch.tensor(0.0))
    kernel("below-power", torch.full((1, 32), below.item()), torch.eye(32), "mxfp4", "abs_max")
    kernel("tiny", torch.full((1, 32), 2.0**-133), torch.eye(32), "mxfp4", "abs_max")
    offset = 1000.0 + torch.randn(64, 256, generator=generator) * 0.05
    kernel("offset", offset, torch.eye(32), "mxfp4", "quest")
    return cases, tensors


@pytest.fixture(scope="session")
def inputs() -> dict[str, Tensor]:
    return build_cases()[1]


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What fp_quant computes for every case, by ``{case}.{tensor}``."""
    cases, tensors = build_cases()
    folder = tmp_path_factory.mktemp("fp_quant")
    save_file(tensors, folder / "cases.safetensors", {"cases": json.dumps(cases)})
    script = Path(__file__).with_name("fp_quant_reference.py")
    command = [sys.executable, str(script), str(folder / "cases.safetensors"), str(folder / "results.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return load_file(folder / "results.safetensors")


def unit_of(reciprocal: float | None) -> Tensor | None:
    return None if reciprocal is None else torch.tensor(1 / reciprocal, dtype=torch.float64)


def near_a_tie(quotients: Tensor) -> Tensor:
    """Within two float32 steps of a tie: there the order of the divisions decides, and fp_quant rounds ties down."""
    ties = torch.tensor(TIES, dtype=torch.float64)
    distance = (quotients.abs()[..., None] - ties).abs() / ties
    return (distance < 2.0**-22).any(dim=-1)


def fp4_of(x: Tensor, matrix: Tensor, fmt: str, method: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rotated input, code values, block scales (both float32) and dequantized values by fp4."""
    form, rule, reciprocal = METHODS[fmt, method]
    rotated = rotate(x, matrix)
    quantized = quantize(rotated, form, rule, unit_of(reciprocal))
    return rotated, decode_e2m1(unpack_codes(quantized.codes)), quantized.scales.float(), dequantize(*quantized)


def per_element(scales: Tensor, fmt: str) -> Tensor:
    return scales.repeat_interleave(FORMATS[fmt].block_size, dim=-1)


def code_values(values: Tensor, scales: Tensor, fmt: str, method: str) -> Tensor:
    """E2M1 values out of fp_quant's result, checking that every one of them is code * scale / global scale."""
    form, _, reciprocal = METHODS[fmt, method]
    reciprocal = reciprocal or 1.0
    spread = per_element(scales, fmt)
    codes = (values.double() * reciprocal / spread).nan_to_num().float()
    codes = (codes * 2).round() / 2  # every E2M1 value is a multiple of a half
    expected = codes * spread / reciprocal if form == NVFP4 else codes * (spread / reciprocal)  # its own order
    assert torch.equal(values, expected)
    return codes


@pytest.mark.parametrize("data", ["random", "adversarial"])
@pytest.mark.parametrize(("fmt", "method", "rotation", "size"), KERNELS)
def test_codes_and_scales_are_equal(
    fmt: str, method: str, rotation: str, size: int, data: str, inputs: dict[str, Tensor], results: dict[str, Tensor]
) -> None:
    name = f"{fmt}-{method}-{rotation}-{size}-{data}"
    rotated, codes, scales, values = fp4_of(inputs[f"{name}.x"], inputs[f"{name}.matrix"], fmt, method)
    their_scales = results[f"{name}.scales"]
    their_codes = code_values(results[f"{name}.values"], their_scales, fmt, method)

    # Blocks of zeros have no right scale, and small ones have the scale 0 in fp_quant (a fault, see below).
    amax = rotated.unflatten(-1, (-1, FORMATS[fmt].block_size)).abs().amax(dim=-1)
    empty = amax <= (2.0**-9 if fmt == "nvfp4" else 0.0)
    assert torch.equal(scales[~empty], their_scales[~empty])
    quotients = rotated.double() * (METHODS[fmt, method][2] or 1.0) / per_element(scales, fmt).double()
    tied = near_a_tie(quotients)
    equal = ~tied & ~per_element(empty, fmt)
    assert torch.equal(codes[equal], their_codes[equal])
    torch.testing.assert_close(values[equal], results[f"{name}.values"][equal], rtol=2.0**-23, atol=0)
    assert torch.all(their_codes[tied].abs() < quotients[tied].abs() * (1 + 2.0**-21))
    if data == "random":  # ties are commonest where weights of few bits are not rotated and the scale is a power of two
        assert tied.float().mean() < 0.02
        assert not empty.any()


@pytest.mark.parametrize(("fmt", "method"), METHODS)
@pytest.mark.parametrize("bias", ["plain", "bias"])
def test_pseudo_quantized_module(
    fmt: str, method: str, bias: str, inputs: dict[str, Tensor], results: dict[str, Tensor]
) -> None:
    """dqweight, the buffers beside it and the output; codes and scales come back out of dqweight."""
    name = f"module-{fmt}-{method}-frozen-{bias}"
    state = {key.split(".state.")[1]: v for key, v in results.items() if key.startswith(f"{name}.state.")}
    buffers = {"weight_global_scale", "act_global_scale", "forward_hadamard_matrix", "backward_hadamard_matrix"}
    assert state.keys() == {"dqweight", *buffers} | ({"bias"} if bias == "bias" else set())
    assert all(tensor.dtype == BF16 for tensor in state.values())
    form, _, reciprocal = METHODS[fmt, method]
    for key in ("weight_global_scale", "act_global_scale"):
        assert state[key].tolist() == [reciprocal or 1.0]
    matrix = matrix_of("hadamard", 32)
    assert torch.equal(state["forward_hadamard_matrix"], matrix)
    assert torch.equal(state["backward_hadamard_matrix"], matrix)

    rotated, codes, scales, _ = fp4_of(inputs[f"{name}.weight"], matrix, fmt, method)
    found = recover(state["dqweight"], form, unit_of(reciprocal))
    assert found.exact.all()
    assert torch.equal(form.dequantize(found.codes, found.scales, unit_of(reciprocal), BF16), state["dqweight"])
    same_scale = found.scales.float() == scales
    assert same_scale.float().mean() > 0.98  # two scales explain a few blocks equally
    tied = near_a_tie(rotated.double() * (reciprocal or 1.0) / per_element(scales, fmt).double())
    comparable = per_element(same_scale, fmt) & ~tied
    assert torch.equal(decode_e2m1(unpack_codes(found.codes))[comparable], codes[comparable])

    x = fp4_of(inputs[f"{name}.x"], matrix, fmt, method)[3].to(BF16)
    y = x.float() @ state["dqweight"].float().T
    if bias == "bias":
        y += 2 * inputs[f"{name}.bias"].float()  # a fault, see below
    torch.testing.assert_close(results[f"{name}.y"].float(), y, rtol=0.02, atol=0.1)


@pytest.mark.parametrize(("fmt", "method"), METHODS)
def test_master_weights_and_straight_through_gradients(
    fmt: str, method: str, inputs: dict[str, Tensor], results: dict[str, Tensor]
) -> None:
    """With store_master_weights the state holds ``weight``; gradients pass where nothing was clipped (MXFP4)."""
    name = f"module-{fmt}-{method}-master-bias"
    state = {key.split(".state.")[1] for key in results if key.startswith(f"{name}.state.")}
    buffers = {"weight_global_scale", "act_global_scale", "forward_hadamard_matrix", "backward_hadamard_matrix"}
    assert state == {"weight", "bias", *buffers}
    matrix = matrix_of("hadamard", 32)
    grad = inputs[f"{name}.grad"].float()
    x, w = (fp4_of(inputs[f"{name}.{key}"], matrix, fmt, method) for key in ("x", "weight"))
    torch.testing.assert_close(
        results[f"{name}.y"].float(), x[3] @ w[3].T + inputs[f"{name}.bias"].float(), rtol=0.02, atol=0.1
    )
    for key, this, gradient in (("grad_x", x, grad @ w[3]), ("grad_weight", w, grad.T @ x[3])):
        rotated, _, scales, _ = this
        quotients = rotated * (METHODS[fmt, method][2] or 1.0) / per_element(scales, fmt)
        unclipped = quotients.abs() < 6 if fmt == "mxfp4" else torch.ones_like(rotated, dtype=torch.bool)
        expected = rotate(gradient * unclipped, matrix.T)
        error = (results[f"{name}.{key}"].float() - expected).norm() / expected.norm()
        assert error < 0.01


# --- Where fp_quant, or the interpreter, is at fault -----------------------------------------------------------------


@pytest.mark.parametrize(("fmt", "method"), METHODS)
def test_interpreter_repair_is_needed_only_for_its_casts(fmt: str, method: str, results: dict[str, Tensor]) -> None:
    """Without the repair MXFP4 is the same; NVFP4 too wherever the interpreter's E4M3 cast got the scale right."""
    raw, repaired = f"unrepaired-{fmt}-{method}", f"{fmt}-{method}-identity-32-random"
    same = results[f"{raw}.scales"] == results[f"{repaired}.scales"]
    assert same.all() if fmt == "mxfp4" else 0.5 < same.float().mean() < 1
    kept = per_element(same, fmt)
    assert torch.equal(results[f"{raw}.values"][kept], results[f"{repaired}.values"][kept])


@pytest.mark.parametrize(("fmt", "method"), METHODS)
def test_fault_ties_are_not_rounded_to_even(
    fmt: str, method: str, inputs: dict[str, Tensor], results: dict[str, Tensor]
) -> None:
    """0.75, 1.75 and 3.5 go to the odd code below them: its thresholds are all strict. Hardware rounds them up."""
    name = f"ties-{fmt}-{method}"
    rotated, codes, scales, _ = fp4_of(inputs[f"{name}.x"], torch.eye(32), fmt, method)
    their_codes = code_values(results[f"{name}.values"], results[f"{name}.scales"], fmt, method)
    assert torch.equal(scales, results[f"{name}.scales"])
    quotients = rotated.double() * (METHODS[fmt, method][2] or 1.0) / per_element(scales, fmt).double()
    wrong = {0.75: (0.5, 1.0), 1.75: (1.5, 2.0), 3.5: (3.0, 4.0)}
    seen = set()
    for tie, (below, even) in wrong.items():
        here = quotients.abs() == tie
        if here.any():
            seen.add(tie)
            assert torch.all(their_codes[here].abs() == below)
            assert torch.all(codes[here].abs() == even)
    assert 0.75 in seen
    others = ~torch.isin(quotients.abs(), torch.tensor(list(wrong), dtype=torch.float64))
    assert torch.equal(codes[others], their_codes[others])


def test_fault_small_nvfp4_blocks_are_lost(inputs: dict[str, Tensor], results: dict[str, Tensor]) -> None:
    """Under the fixed global scale a block whose largest element is at most 2^-9 gets scale 0; fp4 keeps 2^-9."""
    x = inputs["underflow.x"]
    lost = results["underflow.scales"] == 0
    assert lost.tolist() == [[True] * 4, [False, True, True, True]]
    assert torch.all(results["underflow.values"][per_element(lost, "nvfp4")] == 0)
    _, codes, scales, values = fp4_of(x, torch.eye(16), "nvfp4", "abs_max")
    assert torch.all(scales[lost] == 2.0**-9)
    assert torch.all(codes != 0)
    assert (values - x).abs().max() < 2.0**-12


def test_fault_exponent_from_a_float32_logarithm(results: dict[str, Tensor]) -> None:
    """The largest float32 below 32 has logarithm 5 in float32, so its exponent comes out one too high."""
    below = torch.nextafter(torch.tensor(32.0), torch.tensor(0.0))
    assert results["below-power.scales"].item() == 32.0
    assert fp4_of(below.expand(1, 32), torch.eye(32), "mxfp4", "abs_max")[2].item() == 16.0


def test_fault_scales_that_e8m0_cannot_hold(results: dict[str, Tensor]) -> None:
    """Pseudo-quantization keeps scales below 2^-127, which no packed checkpoint can; fp4 stays within E8M0."""
    assert results["tiny.scales"].item() == 2.0**-133
    assert fp4_of(torch.full((1, 32), 2.0**-133), torch.eye(32), "mxfp4", "abs_max")[2].item() >= 2.0**-127


def test_fault_quest_loses_the_variance_of_offset_blocks(inputs: dict[str, Tensor], results: dict[str, Tensor]) -> None:
    """E[x^2] - E[x]^2 cancels in float32: scales vary by chance and go to NaN where the difference is negative."""
    theirs = results["offset.scales"]
    ours = fp4_of(inputs["offset.x"], torch.eye(32), "mxfp4", "quest")[2]
    blocks = inputs["offset.x"].double().unflatten(-1, (-1, 32))
    exact = torch.exp2(torch.floor(torch.log2(blocks.std(dim=-1, correction=0) * (2.92247856 / 6) + 1e-8)))
    assert torch.equal(ours, exact.float())
    assert theirs.isnan().any()
    assert results["offset.values"].isnan().any()


@pytest.mark.parametrize(("fmt", "method"), METHODS)
def test_fault_bias_is_added_twice_without_master_weights(
    fmt: str, method: str, inputs: dict[str, Tensor], results: dict[str, Tensor]
) -> None:
    for kind, times in (("frozen", 2.0), ("master", 1.0)):
        name = f"module-{fmt}-{method}-{kind}-bias"
        matrix = matrix_of("hadamard", 32)
        x, w = (fp4_of(inputs[f"{name}.{key}"], matrix, fmt, method)[3] for key in ("x", "weight"))
        bias = inputs[f"{name}.bias"].float()
        rest = results[f"{name}.y"].float() - x @ w.T
        added = ((rest * bias).sum() / (bias * bias).sum() / rest.shape[0]).item()
        assert added == pytest.approx(times, abs=0.02)


def test_fault_padded_scales_do_not_fit_their_own_module() -> None:
    """Quantizing on the fly (QuTLASS) gives scales [128 i, 4 j]; loading declares [N, K / block], so N = 40 fails."""
    from fp_quant import FPQuantConfig, FPQuantDtype, FPQuantLinear
    from torch._subclasses.fake_tensor import FakeTensorMode

    for dtype, shape in ((FPQuantDtype.MXFP4, (40, 3)), (FPQuantDtype.NVFP4, (40, 6))):
        with FakeTensorMode():
            weight, matrix = torch.empty(40, 96, dtype=BF16), torch.empty(32, 32, dtype=BF16)
            ops = torch.ops.fp_quant
            if dtype is FPQuantDtype.MXFP4:
                scales = ops.fused_quantize_mx_op(weight, matrix, "abs_max", True)[1]
            else:
                scales = ops.fused_quantize_nv_op(weight, matrix, torch.empty(1))[1]
        config = FPQuantConfig(
            forward_dtype=dtype,
            forward_method="abs_max",
            backward_dtype=FPQuantDtype.BF16,
            pseudoquantization=True,
        )
        module = FPQuantLinear(96, 40, config)
        assert module.scales.shape == shape
        assert scales.shape == (128, 4 if dtype is FPQuantDtype.MXFP4 else 8)
        state = module.state_dict() | {"scales": torch.empty(scales.shape, dtype=torch.uint8)}
        with pytest.raises(RuntimeError, match="size mismatch for scales"):
            module.load_state_dict(state)


def test_fault_experts_are_not_quantized() -> None:
    from fp_quant import FPQuantConfig, FPQuantDtype, FPQuantLinear, replace_with_fp_quant_linear
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    replace_with_fp_quant_linear(
        model, FPQuantConfig(FPQuantDtype.MXFP4, backward_dtype=FPQuantDtype.BF16, pseudoquantization=True)
    )
    layer = model.model.layers[0]
    assert isinstance(layer.self_attn.q_proj, FPQuantLinear)
    assert not any(isinstance(module, FPQuantLinear) for module in layer.mlp.experts.modules())
    assert any(parameter.dim() == 3 for parameter in layer.mlp.experts.parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("pseudoquantization", [False, True])
def test_fault_stock_quantizer_refuses_the_cpu(pseudoquantization: bool) -> None:
    from transformers import FPQuantConfig
    from transformers.quantizers.quantizer_fp_quant import FPQuantHfQuantizer

    quantizer = FPQuantHfQuantizer(FPQuantConfig(pseudoquantization=pseudoquantization))
    with pytest.raises(NotImplementedError, match="only supported on GPU"):
        quantizer.validate_environment(device_map="cpu")
