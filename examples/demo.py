"""Quantize a real model in two ways, and compare both with the original: on the fly while it loads, and by calibration.

    python examples/demo.py [MODEL]

MODEL is a folder or hub id of a causal language model with a chat template; by default the SmolLM2-135M-Instruct that
``examples/smollm2.py`` unpacks. The calibrated model goes to demo-out, where `fp4 inspect` and `fp4 report` find it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fp4 import FPQuantConfig
from fp4.quality.evaluate import perplexity

OUT = Path("demo-out")
#: Judges; the calibration uses the text that comes with fp4.
TEXT = Path(__file__).with_name("text.txt")
QUESTION = "Why is the sky blue?"
NEW_TOKENS = 48
#: As much as the best method works through in about a minute and a half on two cores.
CALIBRATION = ["--samples", "2", "--seq-len", "512"]
console = Console()


@torch.no_grad()
def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[str, float]:
    """The answer to the question, and how many tokens a second it came in."""
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    options = {"do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    model.generate(**ids, max_new_tokens=2, **options)
    start = time.perf_counter()
    model.generate(**ids, max_new_tokens=1, **options)
    prompt = time.perf_counter() - start
    start = time.perf_counter()
    new = model.generate(**ids, max_new_tokens=NEW_TOKENS, **options)[0, ids["input_ids"].shape[1] :]
    speed = (len(new) - 1) / (time.perf_counter() - start - prompt)
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip(), speed


def calibrate(source: str) -> Path:
    """Quantize by the best method known, through the command that a user would type."""
    folder = OUT / "calibrated"
    command = ["quantize", source, str(folder), *CALIBRATION, "--overwrite"]
    console.print(f"$ fp4 {' '.join(command)}", style="bold")
    subprocess.run([Path(sys.executable).with_name("fp4"), *command], check=True)
    return folder


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    source = sys.argv[1] if len(sys.argv) > 1 else os.path.relpath(os.environ["FP4_SMOLLM2"])
    tokenizer = AutoTokenizer.from_pretrained(source)
    text = tokenizer(TEXT.read_text(), return_tensors="pt", add_special_tokens=False).input_ids[0]
    calibrated = calibrate(source)

    table, answers = Table("", "weights", "perplexity", "tokens/s"), []
    for name, folder, config in (
        ("bfloat16", source, None),
        ("NVFP4, on the fly", source, FPQuantConfig()),
        ("NVFP4, calibrated", str(calibrated), None),
    ):
        options = {} if config is None else {"quantization_config": config}
        model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto", dtype=torch.bfloat16, **options)
        weights = sum(parameter.nbytes for parameter in model.parameters()) / 1e6
        said, speed = answer(model, tokenizer)
        table.add_row(name, f"{weights:.0f} MB", f"{perplexity(model, text, window=512):.2f}", f"{speed:.1f}")
        answers.append(f"\n[bold]{name}[/]: {escape(' '.join(said.split()))} ...")
    console.print(table)
    console.print("Perplexity is of examples/text.txt. Embeddings, tied to the output layer here, stay in bfloat16.")
    console.print(f"\n[italic]{QUESTION}[/]", *answers, sep="\n")


if __name__ == "__main__":
    main()
