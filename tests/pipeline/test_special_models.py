"""Models that are no plain decoders through ``fp4.quantize``: what is quantized, what is kept, and that it loads."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from comparing import assert_same_tensors, packed
from marks import sampled
from moe import make_moe
from safetensors.torch import load_file, save_file
from shards import tensors_of
from small_models import save_text, tokenizer
from special_models import BOTH, ENCODERS, PARTLY, TOWERS, logits, save_model, vit

import fp4

RUNS: list[dict[str, Any]] = [
    {"scheme": "nvfp4a16", "method": "rtn"},
    {"scheme": "nvfp4", "method": "best", "samples": 2, "seq_len": 32},
]
IDS = ["streamed", "calibrated"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text"))


def quantized(source: Path, out: Path, text: Path, **options: Any) -> dict[str, Any]:
    return fp4.quantize(source, out, data=text, device="cpu", progress=False, **options)


def assert_runs(dense: Any, out: Path, count: int) -> Any:
    """All tensors are found, ``count`` layers are packed, and logits are those of the dequantized model."""
    loaded, found = type(dense).from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["mismatched_keys"]
    assert len(packed(loaded)) == count
    after = logits(loaded)  # on a CPU, where activations stay as they are
    difference = after - logits(loaded.dequantize())
    assert difference.norm() <= 1e-4 * after.norm()
    original = logits(dense)
    assert 0 < (after - original).norm() < 0.5 * original.norm()
    return loaded


@pytest.mark.parametrize("options", sampled(RUNS, RUNS[0]), ids=IDS)
@pytest.mark.parametrize("family", TOWERS)
def test_text_decoders_behind_towers(family: str, options: dict[str, Any], tmp_path: Path, text: Path) -> None:
    make, towers = TOWERS[family]
    dense = save_model(make, tmp_path / "model")
    report = quantized(tmp_path / "model", tmp_path / "out", text, **options)
    assert {row["block"] for row in report["layers"]} == {0, 1}
    assert len(report["layers"]) == 14
    kept = {row["name"]: row["reason"] for row in report["kept"]}
    of_towers = [name for name in kept if any(tower in name for tower in towers)]
    assert {kept[name] for name in of_towers} == {"outside the decoder's blocks"}
    assert {*kept} - {*of_towers} == {"lm_head"}
    before, after = tensors_of(tmp_path / "model"), tensors_of(tmp_path / "out")
    same = [name for name in before if any(tower in name for tower in towers)]
    assert same
    assert_same_tensors({name: after[name] for name in same}, {name: before[name] for name in same})
    assert_runs(dense, tmp_path / "out", 14)


def test_a_class_that_comes_with_the_checkpoint(tmp_path: Path, text: Path) -> None:
    """It is named for one of the auto classes that is not that of language models alone."""
    save_model(TOWERS["llava"][0], tmp_path / "model")
    (tmp_path / "model" / "modeling_own.py").write_text(
        "from transformers import LlavaConfig, LlavaForConditionalGeneration\n"
        "class OwnConfig(LlavaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlavaForConditionalGeneration):\n    config_class = OwnConfig\n"
    )
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    auto = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForImageTextToText": "modeling_own.OwnModel"}
    own = {"model_type": "own", "architectures": ["OwnModel"], "auto_map": auto}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | own))
    report = quantized(tmp_path / "model", tmp_path / "out", text, **RUNS[0], trust_remote_code=True)
    assert report["architectures"] == ["OwnModel"]
    assert len(report["layers"]) == 14


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_tower_is_rounded_where_it_is_included(method: str, tmp_path: Path, text: Path) -> None:
    make, _ = TOWERS["llava"]
    dense = save_model(make, tmp_path / "model")
    amounts: dict[str, Any] = {} if method == "rtn" else {"samples": 2, "seq_len": 32}
    chosen: dict[str, Any] = {"include": ["*.vision_tower.*"], "skip": ["*.vision_tower.*.fc2"], **amounts}
    report = quantized(tmp_path / "model", tmp_path / "out", text, scheme="nvfp4a16", method=method, **chosen)
    outside = [row for row in report["layers"] if row["block"] is None]
    assert len(outside) == 10
    assert all("vision_tower" in row["name"] and row["scale_rule"] == "mse" for row in outside)
    kept = {row["name"]: row["reason"] for row in report["kept"]}
    assert sum(reason == "skipped by *.vision_tower.*.fc2" for reason in kept.values()) == 2
    loaded = assert_runs(dense, tmp_path / "out", 24)
    # The tower's weights are rounded as rtn rounds them, whatever calibrated the decoder.
    quantized(tmp_path / "model", tmp_path / "rtn", text, scheme="nvfp4a16", method="rtn", include=chosen["include"])
    rounded = type(dense).from_pretrained(tmp_path / "rtn", dtype=torch.float32).dequantize()
    for row in outside:
        ours = loaded.get_submodule(row["name"]).weight
        assert torch.equal(ours, rounded.get_submodule(row["name"]).weight)


def test_a_tower_has_no_calibrated_input_scales(tmp_path: Path, text: Path) -> None:
    save_model(TOWERS["llava"][0], tmp_path / "model")
    arguments = (tmp_path / "model", tmp_path / "out", text)
    with pytest.raises(ValueError, match=r"include fits model\.vision_tower\.\S+, outside .* its scheme nvfp4 needs"):
        quantized(*arguments, scheme="nvfp4", method="gptq", include=["*.vision_tower.*"])
    with pytest.raises(ValueError, match=r"include '\*\.q_lora' fits none of 15 layers outside the decoder's blocks"):
        quantized(*arguments, scheme="nvfp4a16", method="rtn", include=["*.q_lora"])
    with pytest.raises(ValueError, match=r"skip '\*\.vision_tower\.\*' fits none of 14 layers"):
        quantized(*arguments, scheme="nvfp4a16", method="rtn", skip=["*.vision_tower.*"])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("options", sampled(RUNS, RUNS[0]), ids=IDS)
@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_of_text(family: str, options: dict[str, Any], tmp_path: Path, text: Path) -> None:
    dense = save_model(ENCODERS[family], tmp_path / "model")
    report = quantized(tmp_path / "model", tmp_path / "out", text, **options)
    assert_runs(dense, tmp_path / "out", len(report["layers"]))
    assert len(report["layers"]) == {"bert": 12, "modernbert": 8}[family]


@pytest.mark.parametrize("family", BOTH)
def test_both_stacks_of_encoder_decoders_are_rounded(family: str, tmp_path: Path, text: Path) -> None:
    make, count = BOTH[family]
    dense = save_model(make, tmp_path / "model")
    report = quantized(tmp_path / "model", tmp_path / "out", text, **RUNS[0])
    assert len(report["layers"]) == count
    assert {"encoder", "decoder"} == {
        stack for row in report["layers"] for stack in ("encoder", "decoder") if stack in row["name"].split(".")
    }
    assert_runs(dense, tmp_path / "out", count)


def test_models_that_text_does_not_run_are_not_calibrated(tmp_path: Path, text: Path) -> None:
    save_model(BOTH["whisper"][0], tmp_path / "whisper")
    save_model(vit, tmp_path / "vit")
    remedy = "method rtn with a scheme that needs no calibration .* quantizes it$"
    with pytest.raises(
        ValueError, match=f"WhisperForConditionalGeneration has an encoder beside its decoder.*{remedy}"
    ):
        quantized(tmp_path / "whisper", tmp_path / "out", text, **RUNS[1])
    with pytest.raises(ValueError, match=f"ViTForImageClassification reads pixel_values, and .* on text; {remedy}"):
        quantized(tmp_path / "vit", tmp_path / "out", text, **RUNS[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vit", "whisper"]
    quantized(tmp_path / "vit", tmp_path / "out", text, **RUNS[0])


@pytest.mark.parametrize("options", sampled(RUNS, RUNS[0]), ids=IDS)
@pytest.mark.parametrize("family", PARTLY)
def test_what_cannot_be_quantized_is_named_in_one_warning_and_loads(
    family: str, options: dict[str, Any], tmp_path: Path, text: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make, reason = PARTLY[family]
    dense = save_model(make, tmp_path / "model")
    with caplog.at_level(logging.WARNING, "fp4"):
        report = quantized(tmp_path / "model", tmp_path / "out", text, **options)
    told = [record.getMessage() for record in caplog.records if "stay as they are" in record.getMessage()]
    assert len(told) == 1
    assert reason in told[0]
    kept = [row for row in report["kept"] if row["reason"] == reason]
    assert told[0].startswith(f"{len(kept)} layers, ")
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert {row["name"] for row in kept} <= {*ignored}
    assert_runs(dense, tmp_path / "out", len(report["layers"]))


def test_experts_that_are_packed_and_cannot_be_run_are_refused(tmp_path: Path, text: Path) -> None:
    """As another tool may write them; Transformers would leave them random."""
    save_model(PARTLY["jetmoe"][0], tmp_path / "model")
    quantized(tmp_path / "model", tmp_path / "out", text, **RUNS[0])
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    stack = "model.layers.0.mlp.input_linear"
    del tensors[f"{stack}.weight"]
    tensors |= {
        f"{stack}.weight_packed": torch.zeros(4, 256, 32, dtype=torch.uint8),
        f"{stack}.weight_scale": torch.ones(4, 256, 4).to(torch.float8_e4m3fn),
        f"{stack}.weight_global_scale": torch.ones(1),
    }
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"holds 1 layers packed that fp4 cannot run, {stack} first"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def _with_further_heads(family: str, folder: Path) -> dict[str, torch.Tensor]:
    """Write a model with a block after its last one that its class does not build; returns the block's tensors."""
    make_moe(family).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    last, further = "model.layers.1.", {"deepseek_v3": "model.layers.2.", "qwen3_moe": "mtp.layers.0."}[family]
    extra = {name.replace(last, further): value.clone() for name, value in tensors.items() if name.startswith(last)}
    extra[f"{further}eh_proj.weight"] = torch.randn(128, 256).to(torch.bfloat16)
    save_file(tensors | extra, folder / "model.safetensors", {"format": "pt"})
    return extra


@pytest.mark.parametrize("format", ["compressed-tensors", "modelopt", "fp_quant"])
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
@pytest.mark.parametrize("method", sampled(["rtn", "gptq"], "rtn"))
def test_heads_that_predict_further_tokens_are_copied_and_named(
    method: str, family: str, format: str, tmp_path: Path, text: Path
) -> None:
    extra = _with_further_heads(family, tmp_path / "model")
    amounts: dict[str, Any] = {} if method == "rtn" else {"samples": 2, "seq_len": 32}
    report = quantized(
        tmp_path / "model", tmp_path / "out", text, scheme="nvfp4a16", method=method, format=format, **amounts
    )
    after = tensors_of(tmp_path / "out")
    assert_same_tensors({name: after[name] for name in extra}, extra)
    matrices = {name.removesuffix(".weight") for name, tensor in extra.items() if tensor.ndim > 1}
    rows = {row["name"]: row for row in report["kept"] if row["name"] in matrices}
    assert rows.keys() == matrices
    assert all("does not build it" in row["reason"] and row["dtype"] == "BF16" for row in rows.values())
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert matrices <= {*config.get("ignore", config.get("modules_to_not_convert"))}
    _, found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not found["missing_keys"]
