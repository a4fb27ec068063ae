"""LoRA on packed experts, against the same adapter on the dequantized model, for every layout of experts."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from marks import sampled
from moe import FAMILIES, make_moe
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from small_models import train
from torch import Tensor, nn
from transformers import AutoConfig

import fp4
from fp4 import FPQuantConfig
from fp4.nn import FP4Experts, PackedWeight
from fp4.nn.rank_share import Split

PROJECTIONS = ["experts.gate_up_proj", "experts.down_proj"]


def load(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    (name,) = AutoConfig.from_pretrained(path).architectures
    if options:
        options = {"quantization_config": FPQuantConfig(**options)}
    return getattr(transformers, name).from_pretrained(path, dtype=dtype, **options).eval()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Unquantized checkpoint of a family."""
    root = tmp_path_factory.mktemp("moe")

    def find(family: str) -> Path:
        if not (root / family).exists():
            make_moe(family).save_pretrained(root / family)
        return root / family

    return find


@pytest.fixture(scope="module")
def fresh(dense: Callable[[str], Path]) -> Callable[[str], nn.Module]:
    """Makes the quantized model of a family, in float32."""
    models: dict[str, nn.Module] = {}

    def make(family: str) -> nn.Module:
        if family not in models:
            models[family] = load(dense(family), scheme="nvfp4a16")
        return copy.deepcopy(models[family])

    return make


def lora(**options: Any) -> LoraConfig:
    defaults = {"r": 3, "target_modules": [], "target_parameters": PROJECTIONS, "init_lora_weights": False}
    return LoraConfig(**defaults | options)


def adapt(model: nn.Module, config: LoraConfig) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(model, config).eval()


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients(model: nn.Module, token_ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(token_ids, labels=token_ids).loss.backward()
    return {name: parameter.grad for name, parameter in trained(model).items() if parameter.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    assert found
    for name, gradient in found.items():
        assert torch.isfinite(gradient).all(), name
        scale = expected[name].abs().max() + 1e-12
        torch.testing.assert_close(gradient / scale, expected[name] / scale, rtol=0, atol=tolerance, msg=name)


def logits(model: nn.Module, token_ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(token_ids).logits
    return found


def experts_of(model: nn.Module) -> list[FP4Experts]:
    return [module for module in model.modules() if isinstance(module, FP4Experts)]


@pytest.mark.parametrize("family", sampled(FAMILIES, "qwen3_moe", "gpt_oss"))
def test_adapter_is_that_of_the_dequantized_model(
    family: str,
    fresh: Callable[[str], nn.Module],
    token_ids: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has the same tensors, logits and gradients, learns, and fits both models once it is saved."""
    base = logits(fresh(family), token_ids)
    adapted, twin = adapt(fresh(family), lora()), adapt(fresh(family).dequantize(), lora())
    state, expected = get_peft_model_state_dict(adapted), get_peft_model_state_dict(twin)
    assert state.keys() == expected.keys()
    assert len(state) == 4 * len(experts_of(adapted)) > 0
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    assert not any(projection in experts._parameters for experts in experts_of(adapted) for projection in PROJECTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(PackedWeight, "dequantize", lambda *_: pytest.fail("experts were dequantized"))
        found, of_adapter = logits(adapted, token_ids), gradients(adapted, token_ids)
    assert (found - base).abs().max() > 0.1
    torch.testing.assert_close(found, logits(twin, token_ids), rtol=1e-4, atol=1e-4)
    assert_same_gradients(of_adapter, gradients(twin, token_ids))

    adapted.zero_grad()
    losses = train(adapted.train(), torch.optim.Adam(trained(adapted).values(), lr=3e-3), token_ids)
    assert losses[-1] < losses[0] - 0.5
    after = logits(adapted.eval(), token_ids)
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(fresh(family), tmp_path).eval(), token_ids), after)
    in_dense = PeftModel.from_pretrained(fresh(family).dequantize(), tmp_path).eval()
    torch.testing.assert_close(logits(in_dense, token_ids), after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4"])
def test_adapter_is_merged_and_unmerged(
    family: str, fresh: Callable[[str], nn.Module], token_ids: Tensor, tmp_path: Path
) -> None:
    adapted = adapt(fresh(family), lora())
    base, expected = logits(fresh(family), token_ids), logits(adapted, token_ids)
    for safe_merge in (False, True):
        adapted.merge_adapter(safe_merge=safe_merge)
        torch.testing.assert_close(logits(adapted, token_ids), expected, rtol=1e-4, atol=1e-4)
        adapted.unmerge_adapter()
        torch.testing.assert_close(logits(adapted, token_ids), expected, rtol=1e-4, atol=1e-4)
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted, token_ids), base, rtol=1e-4, atol=1e-4)
    merged = adapted.merge_and_unload()
    assert not any(experts.is_packed for experts in experts_of(merged))
    torch.testing.assert_close(logits(merged, token_ids), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert not experts_of(loaded)
    torch.testing.assert_close(logits(loaded, token_ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "checkpoint_format"),
    [("mixtral", "compressed-tensors"), ("gpt_oss", "fp_quant"), ("llama4", "modelopt")],
)
def test_merged_experts_are_requantized_on_request(
    family: str, checkpoint_format: str, dense: Callable[[str], Path], token_ids: Tensor, tmp_path: Path
) -> None:
    model = load(dense(family), scheme="nvfp4a16", checkpoint_format=checkpoint_format)
    adapted = adapt(model, lora(target_parameters=["experts.down_proj"]))
    gate_up = [experts.gate_up_proj.clone() for experts in experts_of(model)]
    merged = adapted.merge_and_unload()
    down = [experts.down_proj.clone() for experts in experts_of(merged)]
    names = fp4.requantize(merged)
    assert len(names) == len(experts_of(merged)) > 0
    assert all(name.endswith("experts") for name in names)
    for experts, kept, edited in zip(experts_of(merged), gate_up, down, strict=True):
        assert experts.is_packed
        assert torch.equal(experts.gate_up_proj, kept)
        assert 0 < (experts.down_proj - edited).norm() / edited.norm() < 0.15
    merged.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert len(experts_of(loaded)) == len(names)
    assert torch.equal(logits(loaded, token_ids), logits(merged, token_ids))


def test_several_adapters_and_transformers_own_loading(
    fresh: Callable[[str], nn.Module], token_ids: Tensor, tmp_path: Path
) -> None:
    adapted, twin = adapt(fresh("gpt_oss"), lora()), adapt(fresh("gpt_oss").dequantize(), lora())
    first = logits(adapted, token_ids)
    for model in (adapted, twin):
        torch.manual_seed(1)
        model.add_adapter("second", lora(r=2))
        model.base_model.set_adapter(["default", "second"])
    both = logits(adapted, token_ids)
    torch.testing.assert_close(both, logits(twin, token_ids), rtol=1e-4, atol=1e-4)
    adapted.set_adapter("second")
    second = logits(adapted, token_ids)
    assert min((one - other).abs().max() for one, other in ((first, second), (first, both), (second, both))) > 0.1
    adapted.set_adapter("default")
    assert torch.equal(logits(adapted, token_ids), first)
    adapted.save_pretrained(tmp_path, selected_adapters=["default"])
    model = fresh("gpt_oss")
    model.load_adapter(str(tmp_path))
    assert torch.equal(logits(model, token_ids), first)


@pytest.mark.parametrize(
    "target_modules", ["all-linear", ["q_proj", "w1", "w2", "w3"], r".*(q_proj|w1|w2|w3)", ["q_proj", "w2"]]
)
def test_targets_are_those_of_the_dense_model(
    target_modules: str | list[str], fresh: Callable[[str], nn.Module], token_ids: Tensor
) -> None:
    """Names of Mixtral's separate experts, for which PEFT takes today's stacks."""
    adapted, twin = (
        adapt(model, LoraConfig(target_modules=target_modules, init_lora_weights=False))
        for model in (fresh("mixtral"), fresh("mixtral").dequantize())
    )
    assert trained(adapted).keys() == trained(twin).keys()
    assert any("experts" in name for name in trained(adapted))
    torch.testing.assert_close(logits(adapted, token_ids), logits(twin, token_ids), rtol=1e-4, atol=1e-4)


def test_patterns_of_linear_layers_do_not_match_experts(fresh: Callable[[str], nn.Module]) -> None:
    adapted, twin = (
        adapt(model, LoraConfig(target_modules=["up_proj", "down_proj"]))
        for model in (fresh("llama4"), fresh("llama4").dequantize())
    )
    assert trained(adapted).keys() == trained(twin).keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_parameters": ["self_attn.q_proj.weight"]},
            "q_proj.weight, the weight of a packed Linear layer.*target_modules",
        ),
        (
            {"target_parameters": ["experts.gate_up_proj_bias"]},
            "targets gate_up_proj_bias of a FP4Experts.*gate_up_proj and down_proj",
        ),
        ({"target_parameters": [], "target_modules": ["experts"]}, "targets the whole of a FP4Experts"),
        ({"use_dora": True}, "does not work with use_dora=True"),
        ({"lora_dropout": 0.1}, "does not work with lora_dropout"),
    ],
)
def test_what_cannot_be_adapted_is_told(
    options: dict[str, Any], message: str, fresh: Callable[[str], nn.Module]
) -> None:
    with pytest.raises(ValueError, match=message):
        adapt(fresh("gpt_oss"), lora(**options))


def test_shares_of_experts_are_not_adapted(fresh: Callable[[str], nn.Module]) -> None:
    model = fresh("gpt_oss")
    for experts in experts_of(model):
        experts.packed_down.split = Split("experts", 0, 2)
    with pytest.raises(ValueError, match="holds only a share"):
        adapt(model, lora())
    assert not any(re.search(r"gate_up_proj$|down_proj$", name) for name, _ in model.named_parameters())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(
    use_reentrant: bool, fresh: Callable[[str], nn.Module], token_ids: Tensor
) -> None:
    adapted = adapt(fresh("gpt_oss"), lora()).train()
    expected = gradients(adapted, token_ids)
    adapted.enable_input_require_grads()
    adapted.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same_gradients(gradients(adapted, token_ids), expected)


def test_training_under_autocast_is_that_of_the_dequantized_model(
    dense: Callable[[str], Path], token_ids: Tensor
) -> None:
    model = load(dense("gpt_oss"), torch.bfloat16, scheme="nvfp4a16")
    adapted, twin = (
        adapt(model, lora()),
        adapt(load(dense("gpt_oss"), torch.bfloat16, scheme="nvfp4a16").dequantize(), lora()),
    )
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = gradients(adapted, token_ids), gradients(twin, token_ids)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        cosine = nn.functional.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.98, name


@pytest.mark.slow
def test_forward_compiles_without_graph_breaks(fresh: Callable[[str], nn.Module], token_ids: Tensor) -> None:
    adapted = adapt(fresh("qwen3_moe"), lora())
    expected = logits(adapted, token_ids)
    adapted.base_model.model.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(adapted, token_ids), expected, rtol=1e-4, atol=1e-4)


def test_dense_experts_are_parameters_of_no_adapted_model(fresh: Callable[[str], nn.Module]) -> None:
    """So nothing that moves, counts or saves parameters sees them."""
    adapted = adapt(fresh("qwen3_moe"), lora())
    for experts in experts_of(adapted):
        assert {parameter.dtype for parameter in experts.parameters()} == {torch.uint8}
        assert not experts.state_dict().keys() & experts.layout.projections.keys()


@pytest.mark.slow
def test_peft_may_be_imported_after_fp4() -> None:
    program = "import fp4; from peft.tuners.lora.model import LoraModel; assert LoraModel.inject_adapter._fp4"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_adapters_of_models_without_experts_are_left_to_peft() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    config = LoraConfig(target_modules=["0"], target_parameters=["0.weight"])
    with pytest.raises(ValueError, match=r"Trying to wrap an `nn\.Parameter`"):  # PEFT's own words
        get_peft_model(model, config)
    assert config._custom_modules is None
