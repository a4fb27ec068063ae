"""Whole checkpoints: streamed and block by block, many architectures, what is kept, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import naive_model as naive
import pytest
import torch
import transformers
from comparing import assert_same_files
from jobs import planned
from safetensors.torch import load_file, save_file
from shards import tensors_of
from small_models import ARCHITECTURES, save_small, save_text, tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaPreTrainedModel

import fp4
from fp4 import FP4Linear, FPQuantConfig
from fp4.calibration.data import load_samples
from fp4.checkpoint.io.headers import Checkpoint
from fp4.pipeline.block_inputs import capture, output_of, result_form
from fp4.pipeline.skeleton import Skeleton


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_streamed_rounding_equals_quantizing_on_the_fly(architecture: str, tmp_path: Path) -> None:
    model = save_small(architecture, tmp_path / "model")
    fp4.quantize(model, tmp_path / "out", "nvfp4a16", "rtn", rule="abs_max")
    config = FPQuantConfig(activation_dtype="model", scale_rule="abs_max", checkpoint_format="compressed-tensors")
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, quantization_config=config)
    loaded.save_pretrained(tmp_path / "fly")
    assert_same_files(tmp_path / "out", tmp_path / "fly")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_calibrated_checkpoint_loads_and_computes_what_it_should(architecture: str, tmp_path: Path, text: Path) -> None:
    """On the CPU inputs stay as they are, so that it computes what Transformers does with naively decoded weights."""
    model = save_small(architecture, tmp_path / "model")
    report = fp4.quantize(model, tmp_path / "out", "nvfp4", "rtn", text, samples=3, seq_len=32, device="cpu")
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    quantized = [name for name, module in packed.named_modules() if isinstance(module, FP4Linear)]
    assert sorted(quantized) == sorted(row["name"] for row in report["layers"])
    assert not any("note" in row for row in report["layers"])  # every layer was reached
    naive.fill_linears(dense, tensors_of(tmp_path / "out"), quantized)
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_block_by_block_is_what_the_model_computes(architecture: str, tmp_path: Path, text: Path) -> None:
    """From the embedding of the samples' rows alone to each block's output, with the arguments that were captured."""
    model, cpu = save_small(architecture, tmp_path / "model"), torch.device("cpu")
    ids = torch.stack(load_samples(text, tokenizer(), 2, 32).tokens)
    skeleton = Skeleton(Checkpoint.open(model), torch.float32)
    with skeleton.outside_filled(cpu, [ids]):
        with skeleton.filled(skeleton.blocks[0], cpu):
            form = result_form(skeleton, ids)
        captured = capture(skeleton, ids, form)
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        expected = loaded(ids, output_hidden_states=True).hidden_states
        hidden = captured.hidden
        for name, call, wanted in zip(skeleton.blocks, captured.calls, expected, strict=False):
            # GPT-2's own layers add the bias within the product, which nn.Linear in their place need not do.
            assert torch.equal(hidden, wanted) or (architecture == "gpt2" and torch.allclose(hidden, wanted, atol=1e-5))
            with skeleton.filled(name, cpu) as block:
                hidden = output_of(block.eval()(hidden, *call.args, **call.kwargs))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_default_method_on_every_architecture(architecture: str, tmp_path: Path, text: Path) -> None:
    """It rewrites norms and neighbouring layers, which each architecture connects in its own way."""
    model = save_small(architecture, tmp_path / "model")
    few = {"samples": 3, "seq_len": 32, "device": "cpu"}
    fp4.quantize(model, tmp_path / "out", "nvfp4a16", "best", text, **few)
    fp4.quantize(model, tmp_path / "rounded", "nvfp4a16", "rtn", text, **few)
    ids = torch.stack(load_samples(text, tokenizer(), 3, 32).tokens)
    logits = []
    for folder in (model, tmp_path / "out", tmp_path / "rounded"):
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            logits.append(loaded(ids).logits)
    errors = [float((found - logits[0]).norm() / logits[0].norm()) for found in logits[1:]]
    assert errors[0] < errors[1]


def test_rotations_are_those_that_measured_best_where_they_are_asked_for(tmp_path: Path) -> None:
    model = save_small("llama", tmp_path / "model")

    def schemes(scheme: str, method: str, **options: Any) -> set[tuple[str, str]]:
        layers = planned(model, scheme, method, **options).plan.layers.values()
        return {(layer.scheme.rotation, layer.scheme.weight_rule) for layer in layers}

    for method in ("rtn", "gptq"):
        assert schemes("nvfp4", method) == schemes("nvfp4a16", method) == {("identity", "mse")}
        assert schemes("mxfp4", method) == {("identity", "mse")}, "vLLM serves none without CUDA kernels"
        assert schemes("mxfp4", method, format="fp_quant") == {("hadamard", "mse")}
    assert schemes("mxfp4a16", "gptq", format="fp_quant") == {("hadamard", "mse")}
    # Rounded to nearest a rotation does not pay for itself where activations stay as they are.
    assert schemes("mxfp4a16", "rtn") == schemes("mxfp4a16", "rtn", rotation="none") == {("identity", "even")}
    assert schemes("mxfp4a16", "rtn", rotation="hadamard32") == {("hadamard", "mse")}
    assert schemes("mxfp4a16", "rtn", rule="ceil") == {("identity", "ceil")}
    assert schemes("mxfp4", "gptq", format="modelopt") == {("identity", "mse")}, "it has no place for rotations"


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4", "mxfp4a16", "fp8_dynamic", "nvfp4a8"])
def test_every_scheme_loads_in_its_default_format(scheme: str, tmp_path: Path, text: Path) -> None:
    model = save_small("llama", tmp_path / "model")
    report = fp4.quantize(model, tmp_path / "out", scheme, "rtn", text, samples=2, seq_len=32)
    # compressed-tensors is the one that vLLM serves in every scheme; TensorRT-LLM alone runs nvfp4a8.
    assert report["format"] == ("modelopt" if scheme == "nvfp4a8" else "compressed-tensors")
    assert {row["rotation"] for row in report["layers"]} == {None}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    naive.fill_linears(dense, tensors_of(tmp_path / "out"), [row["name"] for row in report["layers"]])
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    assert {row["scheme"] for row in report["layers"]} == {scheme}


def test_patterns_choose_layers(tmp_path: Path) -> None:
    model = save_small("llama", tmp_path / "model")
    job = planned(
        model, "nvfp4a16", "rtn", skip=["down_proj"], overrides={"*.0.*": None, "o_proj": "mxfp4a16"}, rotation="none"
    )
    chosen = {name: layer.preset for name, layer in job.plan.layers.items()}
    assert set(chosen.values()) == {"nvfp4a16", "mxfp4a16"}
    assert not any("down_proj" in name or ".0." in name for name in chosen)
    assert all((preset == "mxfp4a16") == name.endswith("o_proj") for name, preset in chosen.items())
    only = planned(model, "nvfp4a16", "rtn", only=["*.layers.2.mlp.*"])
    assert sorted(only.plan.layers) == [f"model.layers.2.mlp.{name}_proj" for name in ("down", "gate", "up")]
    reasons = {layer.name: layer.reason for layer in job.plan.kept}
    assert reasons["lm_head"] == "output embedding"
    assert reasons["model.layers.1.mlp.down_proj"] == "skipped by down_proj"


@pytest.mark.parametrize("entry", ["o_proj", "self_attn.o_proj.weight"])
def test_layers_that_the_model_keeps_in_float32(entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither way of quantizing packs them, but what an older release packed still loads."""
    model = save_small("llama", tmp_path / "model")
    fp4.quantize(model, tmp_path / "older", "nvfp4a16", "rtn")
    monkeypatch.setattr(LlamaPreTrainedModel, "_keep_in_fp32_modules_strict", [entry])
    report = fp4.quantize(model, tmp_path / "out", "nvfp4a16", "rtn")
    reasons = {row["name"]: row["reason"] for row in report["kept"]}
    assert reasons["model.layers.0.self_attn.o_proj"] == "the model keeps it in float32"
    fly = AutoModelForCausalLM.from_pretrained(model, quantization_config=FPQuantConfig())
    streamed, older = map(AutoModelForCausalLM.from_pretrained, (tmp_path / "out", tmp_path / "older"))
    for loaded in (fly, streamed):
        attention = loaded.model.layers[0].self_attn
        assert attention.o_proj.weight.dtype is torch.float32
        assert not isinstance(attention.o_proj, FP4Linear)
        assert isinstance(attention.v_proj, FP4Linear)
    assert isinstance(older.model.layers[0].self_attn.o_proj, FP4Linear)


def test_mixed_schemes_in_one_checkpoint(tmp_path: Path) -> None:
    model = save_small("llama", tmp_path / "model")
    fp4.quantize(model, tmp_path / "out", "nvfp4a16", "rtn", overrides=["down_proj=mxfp4a16"], rotation="none")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    formats = {
        name.rpartition(".")[2]: m.scheme.format.name for name, m in loaded.named_modules() if isinstance(m, FP4Linear)
    }
    assert formats["down_proj"] == "mxfp4"
    assert formats["up_proj"] == "nvfp4"


def test_output_is_whole(tmp_path: Path, text: Path) -> None:
    model = save_small("llama", tmp_path / "model")
    report = fp4.quantize(model, tmp_path / "out", "nvfp4", "rtn", text, samples=2, seq_len=32, command="the command")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    expected = {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors",
        "report.json",
        "README.md",
    }
    assert expected <= names
    assert not (tmp_path / "out.partial").exists()
    assert not any(name.startswith(("block-", "hidden-", ".", "lock")) for name in names)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert report["command"] == "the command"
    assert report["data"]["samples"] == 2
    assert len(report["data"]["sha256"]) == 64


def test_several_shards(tmp_path: Path, text: Path) -> None:
    model = save_small("llama", tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    loaded.save_pretrained(tmp_path / "split", max_shard_size="60KB")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 3
    (tmp_path / "split" / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    (tmp_path / "split" / "tokenizer_config.json").write_bytes((model / "tokenizer_config.json").read_bytes())
    for scheme in ("nvfp4a16", "nvfp4"):
        for source in ("model", "split"):
            fp4.quantize(tmp_path / source, tmp_path / f"{source}-{scheme}", scheme, "rtn", text, samples=2, seq_len=32)
        assert_same_files(tmp_path / f"split-{scheme}", tmp_path / f"model-{scheme}")


# --- what is refused


def test_mistakes_are_named(tmp_path: Path, text: Path) -> None:
    model = save_small("llama", tmp_path / "model")
    for options, message in (
        ({"scheme": "int4"}, "scheme is 'int4'"),
        ({"method": "magic"}, "method is 'magic'"),
        ({"skip": ["nothing.*"]}, "skip 'nothing.\\*' fits none"),
        ({"rotation": "hadamard63"}, "rotation is 'hadamard63'"),
        ({"format": "gguf"}, "format is 'gguf'"),
        ({"options": {"x": 1}}, "has no option x"),
        ({"max_memory": "60"}, "max_memory"),
        ({"only": ["*.0.*"], "skip": ["*.0.*"]}, "no layer is left"),
        ({"rule": "best"}, "rule is 'best'"),
        ({"format": "fp_quant", "scheme": "nvfp4a8"}, "fp_quant has no place for nvfp4a8"),
    ):
        with pytest.raises(ValueError, match=message):
            fp4.quantize(model, tmp_path / "out", **({"scheme": "nvfp4a16", "method": "rtn"} | options))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_model_without_blocks_is_refused(tmp_path: Path) -> None:
    model = save_small("llama", tmp_path / "model", num_hidden_layers=0)
    with pytest.raises(ValueError, match="has no list of blocks"):
        fp4.quantize(model, tmp_path / "out", "nvfp4a16", "rtn")


def test_an_unknown_model_type_is_refused(tmp_path: Path) -> None:
    model = save_small("llama", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    with pytest.raises(ValueError, match="unheard_of"):
        fp4.quantize(model, tmp_path / "out", "nvfp4a16", "rtn")


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    model = save_small("llama", tmp_path / "model")
    fp4.quantize(model, tmp_path / "out", "nvfp4a16", "rtn")
    with pytest.raises(ValueError, match=r"out exists; name another folder, or replace it with overwrite=True$"):
        fp4.quantize(model, tmp_path / "out", "nvfp4a16", "rtn")


def test_no_tokenizer(tmp_path: Path, text: Path) -> None:
    model = save_small("llama", tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        os.unlink(model / name)
    remedy = r"method rtn with a scheme that needs no calibration \(nvfp4a16, .*\) quantizes it$"
    with pytest.raises(ValueError, match=f"no tokenizer.*; {remedy}"):
        fp4.quantize(model, tmp_path / "out", "nvfp4", "rtn", text)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_tokenizer_without_vocabulary_is_none(tmp_path: Path, text: Path) -> None:
    model = save_small("qwen2", tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        os.unlink(model / name)
    assert len(AutoTokenizer.from_pretrained(model)) < 10  # made up by Transformers
    with pytest.raises(ValueError, match=r"has no tokenizer: .* has no vocabulary there; method rtn with a scheme"):
        fp4.quantize(model, tmp_path / "out", "nvfp4", "rtn", text)


def save_encoder(folder: Path, architecture: str) -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    getattr(transformers, architecture)(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("architecture", "task", "auto"),
    [
        ("BertForMaskedLM", "fill-mask", "AutoModelForMaskedLM"),
        ("BertForSequenceClassification", "text-classification", "AutoModelForSequenceClassification"),
        ("BertModel", "feature-extraction", "AutoModel"),
    ],
)
def test_encoders_are_rounded_and_called_what_they_are(architecture: str, task: str, auto: str, tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "model", architecture)
    fp4.quantize(model, tmp_path / "out", "nvfp4a16", "rtn")
    loaded = getattr(transformers, architecture).from_pretrained(tmp_path / "out", dtype=torch.float32)
    packed = [name for name, module in loaded.named_modules() if isinstance(module, fp4.FP4Linear)]
    assert len(packed) == 12
    dense = getattr(transformers, architecture).from_pretrained(model, dtype=torch.float32)
    naive.fill_linears(dense, tensors_of(tmp_path / "out"), packed)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids)[0], dense(ids)[0], rtol=1e-4, atol=1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"pipeline_tag: {task}\n" in card
    assert f"model = {auto}.from_pretrained(" in card
    assert "vllm" not in card


@pytest.mark.parametrize("scheme", ["nvfp4a16", "nvfp4"])
def test_nan_is_named_and_finished_work_is_kept(scheme: str, tmp_path: Path, text: Path) -> None:
    model = save_small("llama", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name][3, 5] = torch.nan
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    keep = r"keep the layer as it is with skip=\['model\.layers\.2\.mlp\.up_proj'\]"
    with pytest.raises(ValueError, match=rf"model\.layers\.2\.mlp\.up_proj.* NaN .* {keep}"):
        fp4.quantize(model, tmp_path / "out", scheme, "rtn", text, samples=2, seq_len=32)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / "block-00001.json").is_file() == (scheme == "nvfp4")
    assert (tmp_path / "out.partial").exists() == (scheme == "nvfp4")


def test_a_truncated_shard(tmp_path: Path) -> None:
    model = save_small("llama", tmp_path / "model")
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="truncated"):
        fp4.quantize(model, tmp_path / "out", "nvfp4a16", "rtn")


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fp4.checkpoint.io.shards import ShardWriter

    def fail(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        raise OSError(28, "No space left on device")

    model = save_small("llama", tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", fail)
        with pytest.raises(OSError, match=r"disk of .* is full; make room; nothing was finished yet"):
            fp4.quantize(model, tmp_path / "out", "nvfp4a16", "rtn")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    fp4.quantize(model, tmp_path / "out", "nvfp4a16", "rtn")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_unfinished_work_of_another_request_is_not_lost(tmp_path: Path) -> None:
    model = save_small("llama", tmp_path / "model")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "request.json").write_text('{"scheme": "mxfp4"}')
    with pytest.raises(ValueError, match=r"another request.*scheme.* replace it with overwrite=True$"):
        fp4.quantize(model, tmp_path / "out", "nvfp4a16", "rtn")
    fp4.quantize(model, tmp_path / "out", "nvfp4a16", "rtn", overwrite=True)
