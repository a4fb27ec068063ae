"""The judge of checkpoints, model B and the quality table, against values worked out by hand or in another way."""

from __future__ import annotations

import ast
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import TEXT, save_small
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import continuous_twin  # noqa: E402  (of the folder above)
import judge  # noqa: E402
import quality  # noqa: E402

# One byte holds two codes, the lower nibble first: 1.0 (code 2) and -3.0 (code 13); 6.0 (7) and 0.5 (1).
BYTES = [2 | 13 << 4, 7 | 1 << 4]
CODES = [1.0, -3.0, 6.0, 0.5]
LAYER = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize("script", ["judge.py", "continuous_twin.py"])
def test_it_shares_no_code_with_fp4(script: str) -> None:
    imported = {
        name
        for node in ast.walk(ast.parse((BENCHMARKS / script).read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    roots = {name.split(".")[0] for name in imported}
    assert roots <= {*sys.stdlib_module_names, "torch", "safetensors", "transformers"}


def test_e2m1_by_hand() -> None:
    exact = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    ties = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}  # to the even code
    others = {0.26: 0.5, 0.74: 0.5, 1.26: 1.5, 4.9: 4.0, 5.1: 6.0, 100.0: 6.0}
    given = torch.tensor([*exact, *ties, *others])
    expected = torch.tensor([*exact, *ties.values(), *others.values()])
    assert torch.equal(judge.round_to_e2m1(given), expected)
    assert torch.equal(judge.round_to_e2m1(-given), -expected)


def test_activations_by_hand() -> None:
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([12.0, 5.0, -2.4, 0.4])
    x[0, 16] = 3.0
    # A global scale of 1: block scales 12 / 6 = 2 and 3 / 6 = 0.5 are exact in E4M3.
    expected = torch.zeros(1, 32)
    expected[0, :4] = torch.tensor([12.0, 4.0, -2.0, 0.0])  # 5 / 2 = 2.5 is a tie; 0.4 / 2 is below 0.25
    expected[0, 16] = 3.0
    assert torch.equal(judge.nvfp4_activations(x, torch.tensor(1.0)), expected)
    # MXFP4: 12 has the exponent 3, so the scale is 2 ** 1 for all 32; 3 / 2 = 1.5 is a value.
    assert torch.equal(judge.mxfp4_activations(x), expected)
    # FP8: a scale of 12 / 448 makes 12 the largest number; steps of E4M3 are at most a sixteenth apart.
    fp8 = judge.fp8_activations(x)
    assert fp8[0, 0] == 12
    assert ((fp8 - x).abs() <= x.abs() / 16).all()


def packed(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Bytes of a weight, and the values of its codes."""
    return (
        torch.tensor(BYTES * (columns // 4), dtype=torch.uint8).repeat(rows, 1),
        torch.tensor(CODES * (columns // 4)).repeat(rows, 1),
    )


def formats(rows: int, columns: int) -> dict[str, tuple[dict[str, Tensor], Tensor]]:
    """Of each format the tensors of a layer, and its dense weight by hand."""
    codes, values = packed(rows, columns)
    halves = torch.full((rows, columns // 16), 0.5).to(torch.float8_e4m3fn)
    # The last block has another scale, so that scales must meet their blocks.
    halves[:, -1] = 2.0
    nvfp4 = values * 0.5
    nvfp4[:, -16:] = values[:, -16:] * 2
    exponents = torch.full((rows, columns // 32), 127 - 1, dtype=torch.uint8)
    exponents[:, -1] = 127 + 1
    mxfp4 = values / 2
    mxfp4[:, -32:] = values[:, -32:] * 2
    identity = torch.eye(16)
    scalar = torch.tensor([0.5])
    return {
        "compressed-tensors nvfp4": (
            {"weight_packed": codes, "weight_scale": halves, "weight_global_scale": scalar},
            nvfp4 / 0.5,  # stored as the reciprocal
        ),
        "compressed-tensors mxfp4": ({"weight_packed": codes, "weight_scale": exponents}, mxfp4),
        "modelopt nvfp4": ({"weight": codes, "weight_scale": halves, "weight_scale_2": scalar}, nvfp4 * 0.5),
        "modelopt mxfp4": ({"weight": codes, "weight_scale": exponents}, mxfp4),
        "fp_quant nvfp4": (
            {
                "qweight": codes,
                "scales": halves.view(torch.uint8),
                "weight_global_scale": scalar,
                "act_global_scale": torch.tensor([4.0]),
                "forward_hadamard_matrix": identity,
                "backward_hadamard_matrix": identity,
            },
            nvfp4 / 0.5,
        ),
        "fp8": (
            {"weight": values.to(torch.float8_e4m3fn), "weight_scale": torch.full((rows, 1), 0.25)},
            values / 4,
        ),
    }


@pytest.mark.parametrize("name", list(formats(4, 64)))
def test_a_checkpoint_is_judged_as_the_dense_model_with_the_same_values(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_small("llama", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    dense = tensors.pop(f"{LAYER}.weight")
    stored, expected = formats(*dense.shape)[name]
    judged = tmp_path / "judged"
    judged.mkdir()
    (judged / "config.json").write_text("{}")
    save_file(
        {each: tensor.contiguous().clone() for each, tensor in tensors.items()}
        | {f"{LAYER}.{suffix}": tensor.contiguous().clone() for suffix, tensor in stored.items()},
        judged / "model.safetensors",
    )
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    judge.main(
        ["--source", str(source), "--model", str(judged), "--text", str(text), "--windows", "2", "--length", "48"]
    )
    printed = json.loads(capsys.readouterr().out)

    # The same without the judge: the dense model, and each token's probability by softmax.
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    model.get_submodule(LAYER).weight.data = expected.clone()
    ids = AutoTokenizer.from_pretrained(source)(TEXT, add_special_tokens=False)["input_ids"][: 2 * 48]
    logs = []
    for window in (ids[:48], ids[48:]):
        with torch.no_grad():
            probabilities = model(torch.tensor([window])).logits[0].double().softmax(-1)
        logs += [math.log(probabilities[i, token]) for i, token in enumerate(window[1:])]
    assert printed["ppl"] == pytest.approx(math.exp(-sum(logs) / len(logs)), rel=5e-6)
    unchanged = judge.perplexity(judge.build(source, source, "none"), torch.tensor(ids).reshape(2, 48))
    assert abs(unchanged / printed["ppl"] - 1) > 1e-4  # the layer matters: twenty times the tolerance above


def test_inputs_are_quantized_by_the_checkpoints_own_scale_in_the_rotated_basis(tmp_path: Path) -> None:
    source = save_small("llama", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    shape = tensors.pop(f"{LAYER}.weight").shape
    swap = torch.eye(16).roll(1, 0)
    layer = formats(*shape)["fp_quant nvfp4"][0] | {"forward_hadamard_matrix": swap}
    judged = tmp_path / "judged"
    judged.mkdir()
    (judged / "config.json").write_text("{}")
    save_file(
        tensors | {f"{LAYER}.{suffix}": tensor.contiguous().clone() for suffix, tensor in layer.items()},
        judged / "model.safetensors",
    )
    module = judge.build(source, judged, "nvfp4").get_submodule(LAYER)
    x = torch.zeros(1, shape[1])
    x[0, 0], x[0, 1] = 24.0, 5.0
    # Rolled by one within the block of 16: 24 is the last element, 5 the first. 24 / 6 * 4 = 16 is exact in E4M3, and
    # 16 / 4 = 4 is the block's scale: 24 stays, 5 / 4 = 1.25 becomes 1 and 4.
    weight = formats(*shape)["fp_quant nvfp4"][1]
    assert torch.allclose(module(x)[0], 24 * weight[:, 15] + 4 * weight[:, 0])


def test_tensors_that_the_model_has_not_are_an_error(tmp_path: Path) -> None:
    source = save_small("llama", tmp_path / "source")
    judged = tmp_path / "judged"
    judged.mkdir()
    (judged / "config.json").write_text("{}")
    tensors = load_file(source / "model.safetensors")
    weight = tensors.pop(f"{LAYER}.weight")
    save_file(tensors | {f"{LAYER}.dqweight": weight}, judged / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks \['model.layers.0.mlp.down_proj.weight'\]"):
        judge.build(source, judged, "none")
    (judged / "config.json").write_text('{"quantization_config": {"transform_config": {"config_groups": {"a": {}}}}}')
    with pytest.raises(ValueError, match="rotated by a transform_config"):
        judge.build(source, judged, "none")


def test_the_twins_weights_stay_within_their_cells() -> None:
    levels = torch.arange(16.0).repeat(2)
    weight = (levels * 0.25 - 1).repeat(4, 2)
    twin = continuous_twin.continuous({"a.q_proj.weight": weight, "norm.weight": torch.ones(4), "embed.weight": weight})
    moved = twin["a.q_proj.weight"] - weight
    assert (moved.abs() <= 0.125).all()
    assert moved.unique().numel() > 200
    assert torch.equal(twin["embed.weight"], weight)
    assert torch.equal(twin["norm.weight"], torch.ones(4))


def test_rows_of_other_tools_say_how_they_were_made() -> None:
    printed = quality.table([])
    assert "emulat" not in printed
    assert "| A | nvfp4 | auto-round iters=0 (no learning) | 32 | 27.21 |" in printed
    assert "| B | mxfp4 | llm-compressor rtn | none | 126.40 |" in printed
