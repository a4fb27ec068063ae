"""vLLM itself on a CPU, with fp4's plugin: what it makes of fp4's and other tools' checkpoints, beside Transformers.

Everything is compared in float32, in which W4A16 gives the same log-probabilities. Of W4A4 the layers are compared:
where activations are rounded, rounding alone moves a whole model.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_llama
from moe import make_moe
from small_models import save_text
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import fp4
from fp4.checkpoint.convert import convert
from fp4.nn.activations import packed_modules, set_activations

if importlib.util.find_spec("vllm") is None:  # before the environment of other tests is changed
    pytest.skip("vLLM is not installed; make vllm installs it", allow_module_level=True)

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, where its layers can be reached
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}
vllm: Any = importlib.import_module("vllm")

LENGTH = 96


@contextlib.contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    """vLLM with a model, in this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = {"max_model_len": 128, "max_num_seqs": 8, "dtype": "float32", "enforce_eager": True, "seed": 0}
    try:
        yield vllm.LLM(str(folder), skip_tokenizer_init=True, disable_log_stats=True, **(settings | options))
    finally:
        cleanup_dist_env_and_memory()


@pytest.fixture(autouse=True)
def _float32_modelopt(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM lists bfloat16 and float16 for ModelOpt, though nothing in it depends on that."""
    from vllm.model_executor.layers.quantization import modelopt

    for config in (modelopt.ModelOptNvFp4Config, modelopt.ModelOptFp8Config, modelopt.ModelOptMixedPrecisionConfig):
        monkeypatch.setattr(config, "get_supported_act_dtypes", lambda self: [torch.float32, torch.bfloat16])


def prompt(vocabulary: int) -> list[int]:
    return torch.randint(3, vocabulary, (LENGTH,), generator=torch.Generator().manual_seed(0)).tolist()


def served(llm: Any, vocabulary: int) -> tuple[Tensor, Tensor]:
    """The most likely token after each position but the last, and the log-probability of the token that is there."""
    token_ids = prompt(vocabulary)
    sampling = vllm.SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=1, detokenize=False)
    (found,) = llm.generate([{"prompt_token_ids": token_ids}], sampling, use_tqdm=False)
    assert len(found.outputs[0].token_ids) == 2
    rows = found.prompt_logprobs[1:]
    top = torch.tensor([min(row, key=lambda token: row[token].rank) for row in rows])
    return top, torch.tensor([row[token].logprob for row, token in zip(rows, token_ids[1:], strict=True)])


def expected(model: nn.Module, vocabulary: int) -> tuple[Tensor, Tensor]:
    """The same of Transformers and fp4."""
    token_ids = torch.tensor([prompt(vocabulary)])
    with torch.no_grad():
        logits = model(token_ids).logits[0, :-1].log_softmax(-1)
    return logits.argmax(-1), logits.gather(1, token_ids[0, 1:, None])[:, 0]


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def assert_same_model(folder: Path, model: Any, **options: Any) -> None:
    vocabulary = min(model.config.vocab_size, 30000)
    with engine(folder, **options) as llm:
        top, log_probabilities = served(llm, vocabulary)
    theirs, reference = expected(model, vocabulary)
    assert torch.equal(top, theirs)
    torch.testing.assert_close(log_probabilities, reference, rtol=0, atol=1e-3)


FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def assert_same_layers(folder: Path, model: Any, kernel: str, accuracy: float = 1e-5) -> None:
    """Every packed linear layer with the activations that the checkpoint asks for, on inputs of its own."""
    set_activations(model, "fp4")
    packed = {name: module for name, module in model.named_modules() if hasattr(module, "scheme")}
    random = torch.Generator().manual_seed(0)

    def compare(theirs: nn.Module) -> int:
        count = 0
        for name, layer in theirs.named_modules():
            parent, _, own = name.rpartition(".")
            parts = [f"{parent}.{part}" for part in FUSED.get(own, (own,))]
            if not all(part in packed for part in parts):
                continue
            method = getattr(layer, "scheme", layer.quant_method)  # compressed-tensors' kernels are its schemes'
            assert kernel in str(vars(method).values())
            x = torch.randn(5, packed[parts[0]].in_features, generator=random)
            with torch.no_grad():
                found = layer.quant_method.apply(layer, x)
                reference = torch.cat([packed[part](x) for part in parts], dim=-1)
            torch.testing.assert_close(found, reference, rtol=0, atol=accuracy * reference.abs().max().item())
            count += len(parts)
        return count

    with engine(folder) as llm:
        (count,) = llm.apply_model(compare)
    assert count == len(packed)


# --- SmolLM2, quantized by fp4 ----------------------------------------------------------------------------------------

_MADE: dict[tuple[str, str], Path] = {}


@pytest.fixture
def quantized(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """SmolLM2 in a scheme and a format. Weights of other formats than compressed-tensors are converted, to the bit."""

    def make(scheme: str, form: str = "compressed-tensors") -> Path:
        if (scheme, form) not in _MADE:
            folder = tmp_path_factory.mktemp(f"{scheme}-{form}") / "model"
            if form != "compressed-tensors":
                convert(make(scheme), folder, form, allow_rounding=True)
            elif scheme == "nvfp4":
                text = save_text(folder.parent)
                fp4.quantize(smollm2, folder, scheme, "rtn", text, samples=2, seq_len=64, device="cpu", format=form)
            else:
                config = fp4.FPQuantConfig(scheme=scheme, checkpoint_format=form)
                AutoModelForCausalLM.from_pretrained(
                    smollm2, quantization_config=config, dtype=torch.bfloat16
                ).save_pretrained(folder)
            _MADE[scheme, form] = folder
        return _MADE[scheme, form]

    return make


@pytest.mark.parametrize(
    ("scheme", "form"),
    [("nvfp4a16", "compressed-tensors"), ("nvfp4a16", "modelopt"), ("mxfp4a16", "compressed-tensors")],
)
def test_weight_only_smollm2(scheme: str, form: str, quantized: Callable[..., Path]) -> None:
    assert_same_model(quantized(scheme, form), load(quantized(scheme)))


@pytest.mark.parametrize("form", ["compressed-tensors", "modelopt"])
def test_w4a4_smollm2(form: str, quantized: Callable[..., Path]) -> None:
    assert_same_layers(quantized("nvfp4", form), load(quantized("nvfp4")), "Fp4NvFp4LinearKernel")


@pytest.mark.parametrize("form", ["compressed-tensors", "modelopt"])
def test_fp8_smollm2(form: str, quantized: Callable[..., Path]) -> None:
    """vLLM has kernels of its own for FP8 on a CPU, which round to bfloat16."""
    assert_same_layers(quantized("fp8_dynamic", form), load(quantized("fp8_dynamic")), "FP8", accuracy=0.02)


# --- other tools' checkpoints -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llmcompressor-NVFP4A16", "modelopt-W4A16_NVFP4"])
def test_weight_only_checkpoints_of_others(name: str, shared: Callable[[str], Path]) -> None:
    folder = shared(f"fixtures/{name}")
    assert_same_model(folder, load(folder))


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("llmcompressor-NVFP4", "Fp4NvFp4LinearKernel"),
        ("modelopt-NVFP4", "Fp4NvFp4LinearKernel"),
        ("autoround-NVFP4", "Fp4NvFp4LinearKernel"),
        ("llmcompressor-MXFP4", "Fp4MxFp4LinearKernel"),
    ],
)
def test_w4a4_checkpoints_of_others(name: str, kernel: str, shared: Callable[[str], Path]) -> None:
    folder = shared(f"fixtures/{name}")
    assert_same_layers(folder, load(folder), kernel)


@pytest.mark.parametrize("name", ["llmcompressor-NVFP4-qwen3moe", "modelopt-NVFP4-qwen3moe"])
def test_w4a4_experts_of_others(name: str, shared: Callable[[str], Path]) -> None:
    """Two layers, so few that rounding does not add up; all experts have input scales of their own."""
    folder = shared(f"fixtures/{name}")
    model = load(folder)
    set_activations(model, "fp4")
    assert_same_model(folder, model)


# --- small models -----------------------------------------------------------------------------------------------------


def save(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder / "dense")
    config = fp4.FPQuantConfig(**options)
    quantized = AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=config, dtype=torch.bfloat16)
    quantized.save_pretrained(folder / "out")
    return folder / "out"


@pytest.mark.parametrize(
    ("scheme", "form"),
    [("nvfp4a16", "compressed-tensors"), ("nvfp4a16", "modelopt"), ("mxfp4a16", "compressed-tensors")],
)
def test_experts(scheme: str, form: str, tmp_path: Path) -> None:
    folder = save(make_moe("qwen3_moe"), tmp_path, scheme=scheme, checkpoint_format=form)
    assert_same_model(folder, load(folder))


MIXED = {"*.self_attn.*": {"scheme": "fp8_dynamic"}, "*.layers.1.mlp.*": None}


@pytest.mark.parametrize("form", ["compressed-tensors", "modelopt"])
def test_mixed_schemes(form: str, tmp_path: Path) -> None:
    """One block's MLP packed, the other's dense, attention in FP8, whose activations vLLM quantizes."""
    folder = save(make_llama(), tmp_path, scheme="nvfp4a16", checkpoint_format=form, overrides=MIXED)
    model = load(folder)
    assert {module.scheme.format.name for module in packed_modules(model)} == {"nvfp4", "fp8"}
    with engine(folder, dtype="bfloat16") as llm:
        _, log_probabilities = served(llm, 256)
    _, reference = expected(model, 256)
    torch.testing.assert_close(log_probabilities, reference, rtol=0, atol=0.1)


def test_weights_are_packed_once(tmp_path: Path) -> None:
    """No layer holds a second copy, neither as vLLM loaded it nor dense."""
    folder = save(make_llama(), tmp_path, scheme="nvfp4a16", checkpoint_format="compressed-tensors")

    def sizes(model: nn.Module) -> dict[str, int]:
        return {
            name: sum(tensor.nbytes for tensor in [*layer.parameters(recurse=False), *layer.buffers(recurse=False)])
            for name, layer in model.named_modules()
            if name.endswith("_proj")
        }

    with engine(folder) as llm:
        (found,) = llm.apply_model(sizes)
    assert len(found) == 2 * 4
    weights = {"qkv_proj": 256 * 128, "o_proj": 128 * 128, "gate_up_proj": 512 * 128, "down_proj": 128 * 256}
    for name, size in found.items():
        assert size == pytest.approx(weights[name.rpartition(".")[2]] * 9 / 16, abs=32), name


@pytest.mark.parametrize("run", ["compiled", "from the cache"])
def test_compiled(run: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own torch.compile, whose graph a second engine finds on disk."""
    root = tmp_path_factory.getbasetemp() / "compiled"
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(root / "cache"))
    if run == "compiled":
        save(make_llama(), root, scheme="nvfp4a16", checkpoint_format="compressed-tensors")
    assert any((root / "cache").rglob("model")) == (run == "from the cache")
    assert_same_model(root / "out", load(root / "out"), enforce_eager=False)


TWO_RANKS = """
import sys, torch, vllm
if __name__ == "__main__":  # the other rank's process imports this file
    folder, found, *token_ids = sys.argv[1:]
    llm = vllm.LLM(folder, tensor_parallel_size=2, max_model_len=128, max_num_seqs=8, dtype="float32", seed=0,
                   skip_tokenizer_init=True, enforce_eager=True)
    sampling = vllm.SamplingParams(max_tokens=8, temperature=0, detokenize=False, ignore_eos=True)
    (said,) = llm.generate([{"prompt_token_ids": [int(token) for token in token_ids]}], sampling, use_tqdm=False)
    torch.save(list(said.outputs[0].token_ids), found)
"""


def test_gate_and_up_of_an_expert_share_their_global_scale_or_are_refused() -> None:
    from fp4.integrations.vllm import experts

    layer = SimpleNamespace(layer_name="model.layers.3.mlp.experts")
    assert experts._one_scale(torch.tensor([[2.0, 2.0], [3.0, 3.0]]), layer).tolist() == [2.0, 3.0]
    with pytest.raises(ValueError, match=r"model\.layers\.3\.mlp\.experts: the gate and up .* different global scales"):
        experts._one_scale(torch.tensor([[2.0, 2.0], [3.0, 1.0]]), layer)


def test_two_ranks_share_out_linear_layers_and_experts(tmp_path: Path) -> None:
    """vLLM's tensor parallelism on a CPU: every rank packs what vLLM has given it."""
    folder = save(make_moe("qwen3_moe"), tmp_path, scheme="nvfp4a16", checkpoint_format="compressed-tensors")
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    token_ids = prompt(320)
    command = [sys.executable, str(script), str(folder), str(tmp_path / "found.pt"), *map(str, token_ids)]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    model = load(folder)
    model.generation_config.eos_token_id = None
    reference = model.generate(torch.tensor([token_ids]), max_new_tokens=8, do_sample=False)[0, LENGTH:]
    assert torch.load(tmp_path / "found.pt") == reference.tolist()
