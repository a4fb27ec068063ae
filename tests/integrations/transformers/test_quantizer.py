"""from_pretrained and save_pretrained: on the fly, reloaded, offloaded."""

from __future__ import annotations

import json
from pathlib import Path

import naive_model as naive
import pytest
import torch
import transformers
from comparing import assert_same_tensors, packed
from conftest import make_llama
from products import assert_product
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel, LlamaForCausalLM

from fp4 import FP4Linear, FPQuantConfig

FORMATS = ("nvfp4", "mxfp4")


def load(path: Path, config: object = None, **options: object) -> LlamaForCausalLM:
    if config is not None:
        options["quantization_config"] = config
    return AutoModelForCausalLM.from_pretrained(path, **options)


def assert_same_weights(model: nn.Module, other: nn.Module) -> None:
    assert_same_tensors(model.state_dict(), other.state_dict())
    for name, module in packed(model).items():
        twin = packed(other)[name]
        assert (module.rotation is None) == (twin.rotation is None)
        assert module.rotation is None or torch.equal(module.rotation, twin.rotation)


def assert_reloads(model: nn.Module, ids: torch.Tensor, out: Path, **save: object) -> LlamaForCausalLM:
    model.save_pretrained(out, **save)
    reloaded = type(model).from_pretrained(out)
    assert_same_weights(model, reloaded)
    with torch.no_grad():
        expected, found = model(ids)[0], reloaded(ids)[0]
    assert torch.equal(expected, found)
    return reloaded


CONFIGS = {
    "nvfp4": FPQuantConfig(),
    "nvfp4-w4a4": FPQuantConfig(activation_dtype="fp4"),
    "nvfp4-hadamard": FPQuantConfig(transform_init="hadamard", activation_dtype="fp4"),
    "nvfp4-gsr32": FPQuantConfig(transform_init="gsr", hadamard_group_size=32, scale_rule="four_over_six"),
    "mxfp4": FPQuantConfig("mxfp4"),
    "mxfp4-w4a4": FPQuantConfig("mxfp4", activation_dtype="fp4"),
    "mxfp4-hadamard": FPQuantConfig("mxfp4", transform_init="hadamard", activation_dtype="fp4"),
    "mxfp4-quest": FPQuantConfig("mxfp4", forward_method="quest", transform_init="hadamard", activation_dtype="fp4"),
    "mxfp4-identity": FPQuantConfig("mxfp4", transform_init="identity", scale_rule="ceil"),
    "pseudo-nvfp4": FPQuantConfig(pseudoquantization=True, transform_init="hadamard"),
    "pseudo-mxfp4": FPQuantConfig("mxfp4", pseudoquantization=True),
    "mixed": FPQuantConfig(
        overrides={"*.down_proj": {"forward_dtype": "mxfp4"}, "*.o_proj": None, "*.up_proj": {"scale_rule": "abs_max"}}
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_model_reloads_with_equal_tensors_and_logits(
    name: str, llama: Path, token_ids: torch.Tensor, tmp_path: Path
) -> None:
    model = load(llama, CONFIGS[name], dtype="auto", device_map="auto")
    assert packed(model)
    reloaded = assert_reloads(model, token_ids, tmp_path / "out")
    assert_reloads(reloaded, token_ids, tmp_path / "again")
    first, second = load_file(tmp_path / "out/model.safetensors"), load_file(tmp_path / "again/model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_layer_multiplies_its_weight_rounded_to_nearest(
    fmt: str, dtype: torch.dtype, llama: Path, token_ids: torch.Tensor
) -> None:
    """By the plainest rule of scales. For each term of a product the weight and the output are rounded."""
    dense = load(llama, dtype=dtype)
    model = load(llama, FPQuantConfig(fmt, scale_rule="abs_max", transform_init="identity"), dtype=dtype)
    assert model.dtype == dtype
    assert model(token_ids).logits.dtype == dtype
    assert len(packed(model)) == 14
    generator = torch.Generator().manual_seed(0)
    for name, module in packed(model).items():
        weight = dense.get_submodule(name).weight.data.float()
        scale = naive.power_of_two_scale(float(weight.abs().max()))
        values = naive.mxfp4(weight) if fmt == "mxfp4" else naive.nvfp4(weight, scale)
        assert torch.equal(module.dequantize(), values), name
        x = torch.randn(3, module.in_features, generator=generator).to(dtype)
        assert_product(module(x), x, values, rounded_factors=1)


def test_sharded_checkpoints(token_ids: torch.Tensor, tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path / "dense", max_shard_size="200KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 2
    model = load(tmp_path / "dense", FPQuantConfig("mxfp4"))
    assert_reloads(model, token_ids, tmp_path / "out", max_shard_size="100KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2


def test_saving_over_an_older_model_leaves_no_stale_shards(
    llama: Path, token_ids: torch.Tensor, tmp_path: Path
) -> None:
    model = load(llama, FPQuantConfig())
    model.save_pretrained(tmp_path / "out", max_shard_size="100KB")
    (tmp_path / "out/notes.txt").write_text("kept")
    assert_reloads(model, token_ids, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").glob("model*")] == ["model.safetensors"]
    assert (tmp_path / "out/notes.txt").exists()


@pytest.mark.parametrize("fmt", FORMATS)
def test_tied_embeddings_stay_tied(fmt: str, token_ids: torch.Tensor, tmp_path: Path) -> None:
    make_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", FPQuantConfig(fmt, modules_to_not_convert=[]))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head" not in packed(model)
    reloaded = assert_reloads(model, token_ids, tmp_path / "out")
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight


def test_output_embedding_is_kept_unless_asked(llama: Path, token_ids: torch.Tensor, tmp_path: Path) -> None:
    assert "lm_head" not in packed(load(llama, FPQuantConfig()))
    model = load(llama, FPQuantConfig(modules_to_not_convert=[]))
    assert "lm_head" in packed(model)
    assert_reloads(model, token_ids, tmp_path / "out")


def test_the_users_config_object_is_not_changed(llama: Path) -> None:
    config = FPQuantConfig()
    before = config.to_dict()
    assert load(llama, config).config.quantization_config.modules_to_not_convert == ["lm_head"]
    assert config.to_dict() == before


def test_layers_named_by_the_user_are_kept(llama: Path) -> None:
    names = packed(load(llama, FPQuantConfig(modules_to_not_convert=["q_proj", "model.layers.1"])))
    assert set(names) == {f"model.layers.0.self_attn.{p}_proj" for p in "kvo"} | {
        f"model.layers.0.mlp.{p}_proj" for p in ("gate", "up", "down")
    } | {"lm_head"}


@pytest.mark.parametrize("fmt", FORMATS)
def test_biases_and_a_model_that_is_no_language_model(fmt: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    dense = BertModel(BertConfig(vocab_size=99, **shape)).to(torch.bfloat16).eval()
    for parameter in dense.parameters():
        parameter.data.uniform_(-0.5, 0.5)
    dense.save_pretrained(tmp_path / "dense")
    ids = torch.randint(0, 99, (2, 12))
    model = AutoModel.from_pretrained(tmp_path / "dense", quantization_config=FPQuantConfig(fmt))
    layer = model.encoder.layer[0].attention.self.query
    assert torch.equal(layer.bias, dense.encoder.layer[0].attention.self.query.bias)
    assert_reloads(model, ids, tmp_path / "out")
    x = torch.randn(3, 64)
    without_bias = FP4Linear.from_linear(nn.Linear(64, 64, bias=False), layer.scheme)
    without_bias.hold(layer.canonical())
    torch.testing.assert_close(layer(x) - layer.bias.float(), without_bias(x), rtol=0, atol=2e-6)


def test_rows_that_no_tile_divides_survive(tmp_path: Path, token_ids: torch.Tensor) -> None:
    make_llama(intermediate_size=160, vocab_size=259).save_pretrained(tmp_path / "dense")
    config = FPQuantConfig(modules_to_not_convert=[])
    assert_reloads(load(tmp_path / "dense", config), token_ids, tmp_path / "out")


def test_layer_that_cannot_be_quantized_is_kept_and_named(
    tmp_path: Path, token_ids: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    make_llama(intermediate_size=200).save_pretrained(tmp_path / "dense")
    with caplog.at_level("WARNING", "fp4"):
        model = load(tmp_path / "dense", FPQuantConfig())
    assert "model.layers.1.mlp.down_proj: in_features 200 is not a multiple of 16" in caplog.text
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.Linear)
    assert_reloads(model, token_ids, tmp_path / "out")
    with pytest.raises(ValueError, match=r"strict=True.*down_proj.*not a multiple of 16"):
        load(tmp_path / "dense", FPQuantConfig(strict=True))


def test_stock_config_object_gives_fp_quant_behaviour(llama: Path, token_ids: torch.Tensor, tmp_path: Path) -> None:
    model = load(llama, transformers.FPQuantConfig(forward_dtype="nvfp4", hadamard_group_size=32))
    layer = model.model.layers[0].mlp.up_proj
    assert layer.rotation.shape == (32, 32)
    assert 1 / layer.global_scale == 1 / layer.input_global_scale == 3
    assert_reloads(model, token_ids, tmp_path / "out")
    stored = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    stock = transformers.FPQuantConfig.from_dict(stored)
    assert (stock.forward_dtype, stock.transform_init, stock.hadamard_group_size) == ("nvfp4", "hadamard", 32)


def test_stored_layout_is_fp_quants(llama: Path, tmp_path: Path) -> None:
    load(llama, FPQuantConfig("mxfp4")).save_pretrained(tmp_path / "out")
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        prefix = "model.layers.0.mlp.down_proj."
        found = {
            key.removeprefix(prefix): (file.get_slice(key).get_dtype(), file.get_slice(key).get_shape())
            for key in file.keys()  # noqa: SIM118
            if key.startswith(prefix)
        }
    size = FPQuantConfig("mxfp4").hadamard_group_size
    assert found == {
        "qweight": ("U8", [128, 128]),
        "scales": ("U8", [128, 8]),
        "weight_global_scale": ("BF16", [1]),
        "act_global_scale": ("BF16", [1]),
        "forward_hadamard_matrix": ("BF16", [size, size]),
        "backward_hadamard_matrix": ("BF16", [size, size]),
    }


@pytest.mark.parametrize(("fmt", "bits"), [("nvfp4", 4.51), ("mxfp4", 4.26)])
def test_bits_per_weight_in_memory_and_on_disk(fmt: str, bits: float, llama: Path, tmp_path: Path) -> None:
    model = load(llama, FPQuantConfig(fmt))
    layers = packed(model)
    weights = sum(m.in_features * m.out_features for m in layers.values())
    held = sum(
        parameter.numel() * parameter.element_size()
        for module in layers.values()
        for name, parameter in module.named_parameters()
        if name != "bias"
    )
    assert held * 8 / weights <= bits
    model.save_pretrained(tmp_path / "out")
    stored = load_file(tmp_path / "out/model.safetensors")
    on_disk = sum(t.nbytes for name, t in stored.items() if name.rpartition(".")[2] in ("qweight", "scales"))
    on_disk += sum(t.nbytes for name, t in stored.items() if name.endswith("global_scale"))
    assert on_disk * 8 / weights <= bits + 0.01  # 16 bytes of global scales show in layers as small as these
    assert not any(name.endswith("_proj.weight") for name in stored)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, None])
def test_device_maps(device_map: object, llama: Path, token_ids: torch.Tensor) -> None:
    expected = load(llama, FPQuantConfig())(token_ids).logits
    assert torch.equal(load(llama, FPQuantConfig(), device_map=device_map)(token_ids).logits, expected)


@pytest.mark.parametrize("fmt", FORMATS)
def test_disk_offload(fmt: str, llama: Path, token_ids: torch.Tensor, tmp_path: Path) -> None:
    load(llama, FPQuantConfig(fmt)).save_pretrained(tmp_path / "packed")
    expected = load(tmp_path / "packed", FPQuantConfig(backend="reference"))
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    model = load(tmp_path / "packed", device_map=device_map, offload_folder=tmp_path / "offload")
    assert model.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    torch.testing.assert_close(model(token_ids).logits, expected(token_ids).logits, rtol=0.02, atol=0.02)
    model.save_pretrained(tmp_path / "out")
    assert_same_weights(expected, load(tmp_path / "out", FPQuantConfig(backend="reference")))


def test_automatic_device_maps_count_packed_bytes(llama: Path) -> None:
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    from fp4 import FPQuantHfQuantizer

    with init_empty_weights():
        model = LlamaForCausalLM(AutoConfig.from_pretrained(llama))
    quantizer = FPQuantHfQuantizer(FPQuantConfig(), pre_quantized=False)
    quantizer.preprocess_model(model, dtype=torch.bfloat16)
    for name, module in packed(model).items():
        counted = sum(
            parameter.numel() * quantizer.param_element_size(model, f"{name}.{key}", parameter)
            for key, parameter in module.named_parameters()
        )
        assert counted * 8 / (module.in_features * module.out_features) < 4.51


@pytest.mark.parametrize("name", ["nvfp4-hadamard", "mxfp4", "mixed"])
def test_dequantize_gives_the_model_that_was_run(name: str, llama: Path, token_ids: torch.Tensor) -> None:
    options = CONFIGS[name].to_dict() | {"activation_dtype": "model"}
    model = load(llama, FPQuantConfig(**options), dtype=torch.float32)
    logits = model(token_ids).logits
    dense = model.dequantize()
    assert not packed(dense)
    assert not getattr(dense.config, "quantization_config", None)
    torch.testing.assert_close(dense(token_ids).logits, logits, rtol=1e-4, atol=1e-4)


def test_casting_a_model_leaves_packed_weights_alone(llama: Path) -> None:
    model = load(llama, FPQuantConfig("mxfp4", transform_init="identity"))
    layer = model.model.layers[0].mlp.up_proj
    layer.bias = nn.Parameter(torch.zeros(256, dtype=torch.bfloat16))
    before = {name: tensor.dtype for name, tensor in layer.state_dict().items()}
    nn.Module.to(model, torch.float16)
    after = {name: tensor.dtype for name, tensor in layer.state_dict().items()}
    assert after == before | {"bias": torch.float16}


def test_state_dict_round_trip(llama: Path, token_ids: torch.Tensor) -> None:
    model, other = load(llama, FPQuantConfig()), load(llama, FPQuantConfig(scale_rule="abs_max"))
    assert not torch.equal(model(token_ids).logits, other(token_ids).logits)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(token_ids).logits, other(token_ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4-w4a4"])
def test_compiles_without_graph_breaks_for_any_length(
    name: str, backend: str, llama: Path, token_ids: torch.Tensor
) -> None:
    options = CONFIGS[name].to_dict() | {"backend": backend}
    model = load(llama, FPQuantConfig(**options), dtype=torch.float32)
    compiled = torch.compile(model.forward, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for length in (24, 7, 13):
            ids = token_ids[:, :length]
            torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_generates_with_a_static_cache(llama: Path, token_ids: torch.Tensor) -> None:
    model = load(llama, FPQuantConfig(), dtype=torch.float32)
    assert model.hf_quantizer.is_compileable
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(token_ids, **options)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    found = model.generate(token_ids, cache_implementation="static", **options)
    assert torch.equal(found, expected)
