"""fp4.quality.evaluate against token-by-token arithmetic, and on checkpoints of other tools."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fp4.quality import evaluate as evaluation
from fp4.quality.evaluate import compare, evaluate, perplexity, split_windows


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def token_ids() -> torch.Tensor:
    return torch.randint(0, 50, (70,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def naive(model: LlamaForCausalLM, ids: list[int], window: int, windows: int) -> float:
    means = []
    for start in range(0, window * windows, window):
        losses = []
        for end in range(start + 1, start + window):
            logits = model(torch.tensor([ids[start:end]])).logits[0, -1].double()
            losses.append(-logits.log_softmax(-1)[ids[end]].item())
        means.append(sum(losses) / len(losses))
    return math.exp(sum(means) / len(means))


@pytest.mark.parametrize("windows", [1, 3, None])
def test_perplexity_token_by_token(model: LlamaForCausalLM, token_ids: torch.Tensor, windows: int | None) -> None:
    expected = naive(model, token_ids.tolist(), 16, windows or 4)
    assert perplexity(model, token_ids, window=16, windows=windows) == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, token_ids[None], window=16, windows=windows) == pytest.approx(expected, rel=1e-5)


def test_perplexity_of_a_uniform_model_is_the_size_of_its_vocabulary(token_ids: torch.Tensor) -> None:
    config = LlamaConfig(vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=0, num_attention_heads=1)
    uniform = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    torch.nn.init.zeros_(uniform.lm_head.weight)
    assert perplexity(uniform, token_ids, window=32) == pytest.approx(50, rel=1e-5)


@pytest.mark.parametrize(("window", "windows"), [(100, None), (16, 5), (16, 0), (1, None)])
def test_texts_that_are_too_short_are_refused(
    model: LlamaForCausalLM, token_ids: torch.Tensor, window: int, windows: int | None
) -> None:
    with pytest.raises(ValueError, match=r"at least"):
        perplexity(model, token_ids, window=window, windows=windows)


# --- compared with the original --------------------------------------------------------------------------------------


@torch.no_grad()
def naive_comparison(
    model: LlamaForCausalLM, original: LlamaForCausalLM, ids: torch.Tensor, window: int
) -> tuple[float, float, float]:
    """Mean KL, its 99th percentile and agreement, token by token in float64."""
    divergences, same = [], 0
    for row in ids[: len(ids) // window * window].reshape(-1, window):
        logits = (m(row[None]).logits[0].double().softmax(-1).tolist() for m in (original, model))
        for p, q in zip(*logits, strict=True):
            divergences.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
            same += p.index(max(p)) == q.index(max(q))
    divergences.sort()
    return (
        sum(divergences) / len(divergences),
        divergences[math.ceil(0.99 * len(divergences)) - 1],
        same / len(divergences),
    )


@pytest.mark.parametrize("chunk", [1 << 23, 50, 170])
def test_comparison_equals_token_by_token_arithmetic(
    model: LlamaForCausalLM, token_ids: torch.Tensor, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "_CHUNK_ELEMENTS", chunk)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight += 0.02 * torch.randn(
            other.lm_head.weight.shape, generator=torch.Generator().manual_seed(2)
        )
    seen: list[tuple[int, int]] = []
    found = compare(other, model, token_ids, window=16, progress=lambda *step: seen.append(step))
    mean, p99, same = naive_comparison(other, model, token_ids, 16)
    assert 0 < same < 1
    assert found.kl_mean == pytest.approx(mean, rel=1e-4)
    assert found.kl_p99 == pytest.approx(p99, rel=1e-4)
    assert found.top1_agreement == pytest.approx(same)
    assert found.perplexity == pytest.approx(perplexity(other, token_ids, window=16), rel=1e-6)
    assert found.original_perplexity == pytest.approx(perplexity(model, token_ids, window=16), rel=1e-6)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_model_agrees_with_itself(model: LlamaForCausalLM, token_ids: torch.Tensor) -> None:
    found = compare(model, model, token_ids, window=16)
    assert (found.kl_mean, found.kl_p99, found.top1_agreement) == (0, 0, 1)
    assert found.perplexity == found.original_perplexity


def test_a_token_that_the_original_rules_out_adds_nothing(token_ids: torch.Tensor) -> None:
    class Fixed(torch.nn.Module):
        def __init__(self, logits: list[float]) -> None:
            super().__init__()
            self.logits = torch.nn.Parameter(torch.tensor(logits))

        def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
            return SimpleNamespace(logits=self.logits.expand(1, input_ids.shape[1], -1))

    found = compare(Fixed([0.0, 0, 0]), Fixed([0.0, 0, -torch.inf]), torch.zeros(8, dtype=torch.long), window=4)
    assert found.kl_mean == pytest.approx(math.log(3 / 2), rel=1e-6)
    with pytest.raises(ValueError, match="the model predicts 2 tokens, the original 3"):
        compare(Fixed([0.0, 0]), Fixed([0.0, 0, 0]), torch.zeros(8, dtype=torch.long), window=4)


def test_windows_can_start_with_a_token() -> None:
    rows = split_windows(torch.arange(10), window=4, first=99)
    assert rows.tolist() == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8]]


# --- models and texts by name ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("All the world is a stage, and all the men and women merely players. " * 40)
    return path


@pytest.mark.parametrize("name", ["llmcompressor-NVFP4", "modelopt-MXFP4", "fpquant-nvfp", "autoround-NVFP4"])
def test_any_fp4_checkpoint_against_its_original(name: str, shared: Callable[[str], Path], text: Path) -> None:
    source, folder = shared("fixtures/source-llama"), shared(f"fixtures/{name}")
    results = {}
    for activations, how in (("model", "unquantized"), ("fp4", "fp4"), ("auto", "unquantized")):
        found = evaluate(folder, text, against=source, window=32, windows=2, activations=activations, device="cpu")
        assert found.comparison is not None
        ((runs, count),) = found.runs.items()
        assert (count, runs.split(", ")[1]) == (14, f"{how} activations")
        assert (found.dtype, found.device, found.windows, found.data["tokens"]) == ("float32", "cpu", 2, 64)
        assert found.perplexity == found.comparison.perplexity
        assert 0 < found.comparison.kl_mean <= found.comparison.kl_p99
        results[activations] = found.comparison
        json.dumps(found.to_dict())
    assert results["auto"] == results["model"] != results["fp4"]
    alone = evaluate(folder, text, window=32, windows=2, device="cpu")
    assert alone.perplexity == pytest.approx(results["auto"].perplexity, rel=1e-6)
    assert alone.comparison is None


def test_fp8_activations_can_be_left_out(shared: Callable[[str], Path], text: Path) -> None:
    folder = shared("fixtures/llmcompressor-FP8_DYNAMIC")
    for activations, how in (("fp4", "fp8"), ("model", "unquantized")):
        source = shared("fixtures/source-llama")  # has the tokenizer, too
        found = evaluate(folder, text, against=source, window=32, windows=1, activations=activations, device="cpu")
        assert [runs.split(", ")[:2] for runs in found.runs] == [["fp8", f"{how} activations"]]
    with pytest.raises(ValueError, match="has no tokenizer that can be read"):
        evaluate(folder, text, window=32, windows=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "no.txt"}, "is no file"),
        ({"activations": "fp8"}, "expected 'auto', 'fp4' or 'model'"),
        ({"dtype": "int4"}, "dtype is 'int4'"),
        ({"windows": 1000}, "the text has"),
    ],
)
def test_mistakes_are_named(
    options: dict[str, object], message: str, shared: Callable[[str], Path], text: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(shared("fixtures/llmcompressor-NVFP4"), **({"data": text} | options))


def test_text_must_be_utf8(shared: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no text in UTF-8"):
        evaluate(shared("fixtures/llmcompressor-NVFP4"), tmp_path / "text")
