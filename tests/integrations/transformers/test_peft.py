"""PEFT's methods on packed Linear layers, each against the same adapter on the dequantized model.

The cases are those of PEFT's own tests of quantized models (test_quantization.py, test_common_gpu.py and
test_gpu_examples.py of PEFT 0.21) with more methods and tighter tolerances: the base weights are the same here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import make_llama
from marks import sampled
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from small_models import train
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import fp4
from fp4 import FP4Linear, FPQuantConfig

LAYERS = ["q_proj", "v_proj", "down_proj"]
SQUARE = ["q_proj", "o_proj"]  # methods that share matrices between layers want layers of one shape

#: Class and options of each method; ``target_modules`` is LAYERS if not said.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {}),
    "lora-orthogonal": ("LoraConfig", {"init_lora_weights": "orthogonal"}),
    "rslora": ("LoraConfig", {"use_rslora": True, "lora_alpha": 4}),
    "dora": ("LoraConfig", {"use_dora": True}),
    "pissa": ("LoraConfig", {"init_lora_weights": "pissa"}),
    "olora": ("LoraConfig", {"init_lora_weights": "olora"}),
    "adalora": ("AdaLoraConfig", {"total_step": 20}),
    "loha": ("LoHaConfig", {}),
    "lokr": ("LoKrConfig", {}),
    "oft": ("OFTConfig", {"oft_block_size": 32}),
    "oft-exact-cayley": ("OFTConfig", {"oft_block_size": 32, "use_cayley_neumann": False}),
    "oft-constrained": ("OFTConfig", {"oft_block_size": 32, "coft": True}),
    "oft-shared-blocks": ("OFTConfig", {"oft_block_size": 32, "block_share": True}),
    "boft": ("BOFTConfig", {"boft_block_size": 4}),
    "ia3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "shira": ("ShiraConfig", {"r": 8, "random_seed": 42}),
    "hra": ("HRAConfig", {}),
    "delora": ("DeloraConfig", {}),
    "miss": ("MissConfig", {"r": 4}),
    "miss-bat": ("MissConfig", {"r": 4, "init_weights": "bat"}),
    "miss-mini": ("MissConfig", {"r": 4, "mini_r": 2, "init_weights": "mini"}),
    "vera": ("VeraConfig", {"target_modules": SQUARE, "r": 8}),
    "randlora": ("RandLoraConfig", {"target_modules": SQUARE, "r": 8}),
    "road": ("RoadConfig", {}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 100}),
    "vblora": ("VBLoRAConfig", {"vector_length": 64, "num_vectors": 16, "topk": 2}),
    "c3a": ("C3AConfig", {"block_size": 64}),
    "hira": ("HiraConfig", {}),
    "gralora": ("GraloraConfig", {}),
    "psoft": ("PsoftConfig", {}),
    "supertuning": ("SupertuningConfig", {}),
}
#: Methods whose adapters begin by splitting the base weight into a part that is trained and a rest.
SPLIT_WEIGHTS = ("pissa", "olora")


def config_of(method: str) -> Any:
    name, options = METHODS[method]
    if not hasattr(peft, name):
        pytest.skip(f"this release of PEFT has no {name}")
    return getattr(peft, name)(**{"target_modules": LAYERS, "task_type": "CAUSAL_LM"} | options)


def load(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    config = FPQuantConfig(scheme="nvfp4a16", **options)
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=dtype).eval()


@pytest.fixture(scope="module")
def fresh(llama: Path) -> Callable[[], PreTrainedModel]:
    """Makes the quantized small Llama, in float32."""
    model = load(llama)
    return lambda: copy.deepcopy(model)


def adapt(model: nn.Module, config: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(model, config).eval()


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def move_away(adapted: PeftModel, twin: PeftModel | None = None) -> None:
    """Add the same noise to the adapters of both models, because most begin as the identity."""
    generator = torch.Generator().manual_seed(3)
    others = trained(adapted if twin is None else twin)
    for name, parameter in trained(adapted).items():
        noise = torch.randn(parameter.shape, generator=generator) * 0.02
        others[name].data.copy_(parameter.data.add_(noise.to(parameter.dtype)))


def gradients(model: nn.Module, token_ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(token_ids, labels=token_ids).loss.backward()
    return {name: parameter.grad for name, parameter in trained(model).items() if parameter.grad is not None}


def linears(model: nn.Module) -> dict[str, FP4Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FP4Linear)}


def logits(model: nn.Module, token_ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(token_ids).logits
    return found


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    assert found
    for name, gradient in found.items():
        assert torch.isfinite(gradient).all(), name
        scale = expected[name].abs().max() + 1e-12
        torch.testing.assert_close(gradient / scale, expected[name] / scale, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("method", sampled(METHODS, "lora", "dora", "oft", "loha", "ia3", "hra"))
def test_adapter_is_that_of_the_dequantized_model(
    method: str, fresh: Callable[[], PreTrainedModel], token_ids: Tensor, tmp_path: Path
) -> None:
    """It begins with equal tensors, gives equal logits and gradients, learns, and is saved and loaded."""
    adapted, twin = adapt(fresh(), config_of(method)), adapt(fresh().dequantize(), config_of(method))
    packed = linears(adapted).values()
    assert all(layer.is_packed for layer in packed) == (method not in SPLIT_WEIGHTS)
    state, expected = get_peft_model_state_dict(adapted), get_peft_model_state_dict(twin)
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5, msg=name)
    move_away(adapted, twin)
    torch.testing.assert_close(logits(adapted, token_ids), logits(twin, token_ids), rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(adapted, token_ids), gradients(twin, token_ids))

    adapted.zero_grad()
    losses = train(adapted.train(), torch.optim.Adam(trained(adapted).values(), lr=1e-2), token_ids)
    # Constrained OFT may not turn far enough to learn much.
    assert losses[-1] < losses[0] - (0.0 if method == "oft-constrained" else 0.01)
    assert all(layer.is_packed for layer in packed) == (method not in SPLIT_WEIGHTS)
    adapted.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh(), tmp_path).eval()
    assert torch.equal(logits(loaded, token_ids), logits(adapted, token_ids))


@pytest.mark.parametrize("method", sampled(METHODS, "lora", "dora", "oft", "loha", "ia3", "hra"))
def test_adapter_is_merged_and_unmerged(method: str, fresh: Callable[[], PreTrainedModel], token_ids: Tensor) -> None:
    adapted = adapt(fresh(), config_of(method))
    move_away(adapted)
    base, expected = logits(fresh(), token_ids), logits(adapted, token_ids)
    for safe_merge in (False, True):
        adapted.merge_adapter(safe_merge=safe_merge)
        torch.testing.assert_close(logits(adapted, token_ids), expected, rtol=1e-4, atol=1e-5)
        adapted.unmerge_adapter()
        torch.testing.assert_close(logits(adapted, token_ids), expected, rtol=1e-4, atol=1e-5)
    if method not in SPLIT_WEIGHTS:
        with adapted.disable_adapter():
            torch.testing.assert_close(logits(adapted, token_ids), base, rtol=1e-4, atol=1e-5)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged, token_ids), expected, rtol=1e-4, atol=1e-5)
    edited = {name.rpartition(".")[2] for name, layer in linears(merged).items() if not layer.is_packed}
    assert edited == set(config_of(method).target_modules)


@pytest.mark.parametrize("checkpoint_format", ["fp_quant", "compressed-tensors", "modelopt"])
def test_merged_layers_are_requantized_on_request(
    checkpoint_format: str, llama: Path, token_ids: Tensor, tmp_path: Path
) -> None:
    model = load(llama, checkpoint_format=checkpoint_format)
    before = {name: layer.canonical() for name, layer in linears(model).items()}
    adapted = adapt(model, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    merged = adapted.merge_and_unload()
    dense = {name: layer.weight.detach().clone() for name, layer in linears(merged).items() if not layer.is_packed}
    assert set(dense) == {name for name in before if name.endswith(("q_proj", "down_proj"))}
    assert fp4.requantize(merged) == list(dense)
    assert fp4.requantize(merged) == []
    for name, layer in linears(merged).items():
        assert layer.is_packed
        if name in dense:
            error = (layer.dequantize() - dense[name]).norm() / dense[name].norm()
            assert 0 < error < 0.15, name
        elif checkpoint_format == "fp_quant" or not name.endswith(("k_proj", "v_proj")):
            assert all(
                torch.equal(now, then) for now, then in zip(layer.canonical()[:2], before[name][:2], strict=True)
            )
    for block in merged.model.layers:
        scales = {float(getattr(block.self_attn, name).global_scale) for name in ("q_proj", "k_proj", "v_proj")}
        assert len(scales) == (2 if checkpoint_format == "fp_quant" else 1)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert linears(loaded).keys() == linears(merged).keys()
    assert torch.equal(logits(loaded, token_ids), logits(merged, token_ids))


def test_a_weight_of_zeros_does_not_set_the_scale_of_its_group(llama: Path) -> None:
    model = load(llama, checkpoint_format="compressed-tensors")
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.q_proj.weight.mul_(1.5)
        attention.k_proj.weight.zero_()
    fp4.requantize(model)
    scales = {float(getattr(attention, name).global_scale) for name in ("q_proj", "k_proj", "v_proj")}
    assert len(scales) == 1
    assert scales.pop() < 2**-4  # 1 is what a weight of zeros alone has
    assert not attention.k_proj.dequantize().any()


def test_damaged_adapters_are_not_merged(fresh: Callable[[], PreTrainedModel]) -> None:
    adapted = adapt(fresh(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    next(iter(trained(adapted).values())).data[0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        adapted.merge_and_unload(safe_merge=True)
    merged = adapted.merge_and_unload()
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj\.weight.*NaN"):
        fp4.requantize(merged)


def test_several_adapters_in_one_batch_and_one_after_the_other(
    fresh: Callable[[], PreTrainedModel], token_ids: Tensor
) -> None:
    adapted = adapt(fresh(), LoraConfig(target_modules=LAYERS, init_lora_weights=False))
    base, first = logits(fresh(), token_ids), logits(adapted, token_ids)
    adapted.add_adapter("second", LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False))
    adapted.set_adapter("second")
    second = logits(adapted, token_ids)
    assert (first - second).abs().max() > 0.01
    three = token_ids[[0, 0, 0]]
    with torch.no_grad():
        mixed = adapted(three, adapter_names=["__base__", "default", "second"]).logits
    for row, alone in enumerate((base, first, second)):
        torch.testing.assert_close(mixed[row], alone[0], rtol=1e-4, atol=1e-5)
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted, token_ids), base, rtol=1e-4, atol=1e-5)
    adapted.delete_adapter("second")
    adapted.set_adapter("default")
    assert torch.equal(logits(adapted, token_ids), first)


def test_biases_and_saved_modules_are_trained(tmp_path: Path, token_ids: Tensor) -> None:
    make_llama(attention_bias=True).save_pretrained(tmp_path / "dense")
    config = LoraConfig(target_modules=["q_proj", "v_proj"], bias="lora_only", modules_to_save=["lm_head"])
    adapted = adapt(load(tmp_path / "dense"), config)
    names = {name.rpartition("self_attn.")[2] for name in trained(adapted) if "bias" in name}
    assert names == {"q_proj.base_layer.bias", "v_proj.base_layer.bias"}
    found = gradients(adapted, token_ids)
    assert found.keys() == trained(adapted).keys()
    losses = train(adapted, torch.optim.Adam(trained(adapted).values(), lr=1e-2), token_ids)
    assert losses[-1] < losses[0] - 0.5
    expected = logits(adapted, token_ids)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(tmp_path / "dense"), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded, token_ids), expected)
    torch.testing.assert_close(logits(adapted.merge_and_unload(), token_ids), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_adapters_are_loaded_under_any_name(
    low_cpu_mem_usage: bool, fresh: Callable[[], PreTrainedModel], token_ids: Tensor, tmp_path: Path
) -> None:
    """Through PEFT and through Transformers' own ``load_adapter``."""
    adapted = adapt(fresh(), LoraConfig(target_modules=LAYERS, init_lora_weights=False))
    expected = logits(adapted, token_ids)
    adapted.save_pretrained(tmp_path)
    options = {"adapter_name": "other", "low_cpu_mem_usage": low_cpu_mem_usage}
    loaded = PeftModel.from_pretrained(fresh(), tmp_path, **options).eval()
    assert torch.equal(logits(loaded, token_ids), expected)
    model = fresh()
    model.load_adapter(str(tmp_path), **options)
    assert torch.equal(logits(model, token_ids), expected)


def test_prepared_for_kbit_training_with_gradient_checkpointing(llama: Path, token_ids: Tensor) -> None:
    model = peft.prepare_model_for_kbit_training(load(llama, torch.bfloat16))
    assert not trained(model)
    assert all(layer.is_packed for layer in linears(model).values())
    model.gradient_checkpointing_enable()
    adapted = adapt(model, LoraConfig(target_modules="all-linear")).train()
    losses = train(adapted, torch.optim.Adam(trained(adapted).values(), lr=1e-2), token_ids)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("method", sampled(["lora", "dora", "oft", "loha", "hra"], "lora"))
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(
    use_reentrant: bool, method: str, fresh: Callable[[], PreTrainedModel], token_ids: Tensor
) -> None:
    adapted = adapt(fresh(), config_of(method)).train()
    move_away(adapted)
    expected = gradients(adapted, token_ids)
    adapted.enable_input_require_grads()
    adapted.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same_gradients(gradients(adapted, token_ids), expected)


@pytest.mark.parametrize("method", sampled(["lora", "dora", "oft", "loha", "hra"], "lora"))
def test_training_under_autocast_is_that_of_the_dequantized_model(method: str, llama: Path, token_ids: Tensor) -> None:
    model = load(llama, torch.bfloat16)
    adapted, twin = adapt(model, config_of(method)), adapt(load(llama, torch.bfloat16).dequantize(), config_of(method))
    assert {parameter.dtype for parameter in trained(adapted).values()} == {torch.float32}
    move_away(adapted, twin)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = gradients(adapted, token_ids), gradients(twin, token_ids)
        assert logits(adapted, token_ids).dtype == logits(twin, token_ids).dtype
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert_same_gradients(found, expected, tolerance=0.1)
    adapted.zero_grad()
    # Each step in a context of its own, because autocast keeps its casts of parameters until the context ends.
    forward = adapted.forward
    adapted.forward = torch.autocast("cpu", torch.bfloat16)(forward)  # type: ignore[method-assign]
    losses = train(adapted, torch.optim.Adam(trained(adapted).values(), lr=1e-2), token_ids)
    assert losses[-1] < losses[0] - 0.01


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_compiles_without_graph_breaks(method: str, token_ids: Tensor, tmp_path: Path) -> None:
    make_llama(num_hidden_layers=1).save_pretrained(tmp_path)
    adapted = adapt(load(tmp_path), config_of(method)).train()
    move_away(adapted)
    expected, exact = logits(adapted, token_ids), gradients(adapted, token_ids)
    adapted.base_model.model.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(adapted, token_ids), expected, rtol=1e-4, atol=1e-5)
    assert_same_gradients(gradients(adapted, token_ids), exact, tolerance=1e-4)
