"""fp4.evaluate.perplexity against token-by-token arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fp4.evaluate import perplexity


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
