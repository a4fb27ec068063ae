"""lm-eval's own models on quantized checkpoints: ``hf``, which fails on llm-compressor's FP8 experts, and ``vllm``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_models import save_small
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_wheel import named_vllm

import fp4

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra 'eval')")


@pytest.fixture
def tasks(tmp_path: Path) -> list[dict[str, object]]:
    """A choice and a text, which no network is needed for."""
    choices = [{"question": f"{a} and {a} is", "label": a % 2} for a in range(4)]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in choices))
    (tmp_path / "text.jsonl").write_text(json.dumps({"page": "It was seen by many, and none could say why."}) + "\n")

    def data(name: str) -> dict[str, object]:
        files = {"dataset_kwargs": {"data_files": {"test": str(tmp_path / f"{name}.jsonl")}}}
        return {"task": f"fp4_{name}", "dataset_path": "json", "test_split": "test", **files}

    choice = {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_target": "label"}
    text = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{page}}"}
    return [
        {**data("choices"), **choice, "doc_to_choice": [" even", " odd"], "metric_list": [{"metric": "acc"}]},
        {**data("text"), **text, "metric_list": [{"metric": "word_perplexity"}]},
    ]


def results(model: object, tasks: list[dict[str, object]], **arguments: object) -> dict[str, dict[str, float]]:
    options = {"model_args": arguments} if arguments else {}
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=model,
        tasks=tasks,
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),  # thousands of files that nothing here needs
        **options,
    )
    return found["results"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("scheme", ["fp8_dynamic", "nvfp4a16"])
def test_the_hf_model_runs_on_quantized_experts(
    scheme: str, shared: Callable[[str], Path], tasks: list[dict[str, object]], tmp_path: Path
) -> None:
    source = shared("fixtures/source-granitemoehybrid")
    config = fp4.FPQuantConfig(scheme=scheme, checkpoint_format="compressed-tensors")
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(tmp_path / "out")
    found = results("hf", tasks, pretrained=str(tmp_path / "out"), dtype="float32")
    assert 0 <= found["fp4_choices"]["acc,none"] <= 1
    from lm_eval.models.huggingface import HFLM

    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).dequantize()
    expected = results(HFLM(pretrained=twin, tokenizer=tokenizer), tasks)
    for name, metric in (("fp4_choices", "acc,none"), ("fp4_text", "word_perplexity,none")):
        assert found[name][metric] == pytest.approx(expected[name][metric], rel=1e-3)


def test_the_vllm_model_agrees_with_the_hf_model(
    tasks: list[dict[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a weight-only checkpoint, whose numbers both runtimes share."""
    pytest.importorskip("vllm", reason="vLLM is not installed; make vllm installs it")
    monkeypatch.syspath_prepend(named_vllm(tmp_path))
    for name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_NO_USAGE_STATS", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}  # of 32 columns, the fewest that vLLM has on a CPU
    source = save_small("llama", tmp_path / "dense", max_position_embeddings=512, **heads)
    config = fp4.FPQuantConfig(scheme="nvfp4a16", checkpoint_format="compressed-tensors")
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "out")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "out")
    arguments = {"pretrained": str(tmp_path / "out"), "dtype": "float32"}
    engine = {"max_model_len": 512, "enforce_eager": True, "gpu_memory_utilization": 0.1}
    found, expected = results("vllm", tasks, **arguments, **engine), results("hf", tasks, **arguments)
    for name, metric in (("fp4_choices", "acc,none"), ("fp4_text", "word_perplexity,none")):
        assert found[name][metric] == pytest.approx(expected[name][metric], rel=1e-3)
