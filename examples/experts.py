"""Mixture-of-experts models in FP4: quantized while they load, saved, reloaded, generating.

    python examples/experts.py [FOLDER_OR_HUB_ID ...]

Without a model named, two with random weights are made: few blocks with the matrices of Granite 4 Tiny (mamba,
attention, shared MLP, experts) and of Qwen3-30B-A3B, 32 experts a block.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, GraniteMoeHybridConfig, PretrainedConfig, PreTrainedModel, Qwen3MoeConfig
from transformers.utils import logging as transformers_logging

from fp4 import FPQuantConfig
from fp4.nn import FP4Experts

VOCABULARY = 8192
NEW_TOKENS = 16


def granite() -> PretrainedConfig:
    return GraniteMoeHybridConfig(
        vocab_size=VOCABULARY,
        hidden_size=1536,
        intermediate_size=512,
        shared_intermediate_size=1024,
        num_hidden_layers=2,
        layer_types=["mamba", "attention"],
        num_attention_heads=12,
        num_key_value_heads=4,
        num_local_experts=32,
        num_experts_per_tok=6,
        mamba_n_heads=48,
        mamba_d_head=64,
        mamba_d_state=128,
        mamba_n_groups=1,
        tie_word_embeddings=True,
    )


def qwen() -> PretrainedConfig:
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        moe_intermediate_size=768,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=32,
        num_experts_per_tok=8,
    )


MADE = {"Granite 4 shape": granite, "Qwen3-MoE shape": qwen}


@dataclass
class Outcome:
    """One model before and after."""

    parameters: int
    share: float
    before: int
    after: int
    similarity: float
    equal: bool
    tokens: list[int]


def stored_bytes(folder: Path | str) -> int:
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


@torch.no_grad()
def run(source: str, out: Path) -> Outcome:
    """Quantize ``source``, save it into ``out`` and reload it."""
    dense: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    ids = torch.randint(3, min(VOCABULARY, dense.config.get_text_config().vocab_size), (1, 32))
    expected = dense(ids).logits.float()
    before = sum(parameter.nbytes for parameter in dense.parameters())
    del dense
    packed = AutoModelForCausalLM.from_pretrained(source, quantization_config=FPQuantConfig(), dtype=torch.bfloat16)
    report = packed.hf_quantizer.report
    found = packed(ids).logits
    packed.save_pretrained(out)
    del packed
    again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    assert any(isinstance(module, FP4Experts) for module in again.modules())
    generated = again.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    return Outcome(
        report.total,
        report.share_of_blocks,
        before,
        stored_bytes(out),
        torch.nn.functional.cosine_similarity(expected.flatten(), found.float().flatten(), dim=0).item(),
        torch.equal(again(ids).logits, found),
        generated[0, ids.shape[1] :].tolist(),
    )


def main() -> None:
    logging.getLogger("fp4").setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    console = Console(width=120)
    table = Table("model", "parameters", "in FP4, outside embeddings", "bfloat16", "saved", "logits to bfloat16's")
    table.add_column("reloaded")
    table.add_column("generates")
    with tempfile.TemporaryDirectory() as folder:
        sources = {name: name for name in sys.argv[1:]}
        for name, config in [] if sources else MADE.items():
            torch.manual_seed(0)
            sources[name] = str(Path(folder) / name)
            AutoModelForCausalLM.from_config(config(), dtype=torch.bfloat16).save_pretrained(sources[name])
        for number, (name, source) in enumerate(sources.items()):
            outcome = run(source, Path(folder) / f"out{number}")
            table.add_row(
                name,
                f"{outcome.parameters / 1e6:.0f} M",
                f"{outcome.share:.2%}",
                f"{outcome.before / 1e9:.2f} GB",
                f"{outcome.after / 1e9:.2f} GB",
                f"cosine {outcome.similarity:.3f}",
                "equal logits" if outcome.equal else "OTHER LOGITS",
                f"{len(outcome.tokens)} tokens",
            )
    console.print(table)


if __name__ == "__main__":
    main()
