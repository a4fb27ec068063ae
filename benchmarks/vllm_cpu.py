"""vLLM on a CPU, with fp4's kernels: NVFP4 and MXFP4 against bfloat16, which vLLM multiplies with its own kernels.

    PYTHONPATH=.venv/vllm python benchmarks/vllm_cpu.py [--layers 16] [--eager] [--save vllm_cpu]

A Llama of about 1.1 billion parameters with random weights, its output head left as it is. Every engine is a process of
its own, and they take turns. The tokens/s of one and of eight sequences are of decoding alone, the best of all turns:
the time of a long answer less that of a short one. To be reached: one sequence 2.5 times as fast as in bfloat16, and
never slower at eight.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from cpu_generate import random_llama, shaped_config
from measure import save, table, verdict
from transformers import AutoModelForCausalLM

import fp4

SEQUENCES = (1, 8)
PROMPT, SHORT = 16, 4
TARGETS = {1: 2.5, 8: 1.0}
ENGINE = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
          "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}  # fmt: skip


def write_models(layers: int, folder: Path) -> dict[str, Path]:
    """The model in bfloat16 and in both formats, weight-only."""
    folders = {name: folder / name for name in ("bf16", "nvfp4a16", "mxfp4a16")}
    random_llama(shaped_config(layers)).save_pretrained(folders["bf16"])
    for scheme in ("nvfp4a16", "mxfp4a16"):
        config = fp4.FPQuantConfig(scheme=scheme, checkpoint_format="compressed-tensors", scale_rule="abs_max")
        model = AutoModelForCausalLM.from_pretrained(folders["bf16"], quantization_config=config, dtype=torch.bfloat16)
        model.save_pretrained(folders[scheme])
    return folders


def serve(folder: str, new_tokens: int, eager: bool) -> None:
    """An engine, which measures once for every line of its input and answers with a line of tokens/s."""
    import vllm

    llm = vllm.LLM(folder, max_model_len=256, max_num_seqs=8, dtype="bfloat16", skip_tokenizer_init=True, seed=0,
                   enforce_eager=eager, disable_log_stats=True, enable_prefix_caching=False)  # fmt: skip

    def seconds(count: int, tokens: int) -> float:
        prompts = [{"prompt_token_ids": list(range(100 + n, 100 + n + PROMPT))} for n in range(count)]
        sampling = vllm.SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0, detokenize=False)
        start = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start

    for count in SEQUENCES:
        seconds(count, SHORT)
    print("ready", flush=True)
    for _ in sys.stdin:
        more = new_tokens - SHORT
        rates = [count * more / (seconds(count, new_tokens) - seconds(count, SHORT)) for count in SEQUENCES]
        print("rates", *rates, flush=True)


class Engine:
    """A process that serves one model."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--serve", str(folder), "--tokens", str(arguments.tokens)]
        command += ["--eager"] if arguments.eager else []
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | ENGINE
        )
        self.answer("ready")

    def answer(self, word: str) -> list[float]:
        """The numbers of the line that begins with ``word``; vLLM writes lines of its own."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return [float(number) for number in line.split()[1:]]
        raise SystemExit(f"the engine ended: {self.process.wait()}")

    def measure(self) -> list[float]:
        assert self.process.stdin is not None
        print("go", file=self.process.stdin, flush=True)
        return self.answer("rates")

    def close(self) -> None:
        self.process.communicate()


def results(rates: dict[str, list[float]]) -> str:
    """The table, with a verdict beside every ratio."""
    rows = []
    for name, own in rates.items():
        row = [name]
        for count, rate, base in zip(SEQUENCES, own, rates["bf16"], strict=True):
            row += [f"{rate:.1f}", "" if name == "bf16" else verdict(rate / base, TARGETS[count])]
        rows.append(row)
    header = [title for count in SEQUENCES for title in (f"tokens/s of {count}", "x bf16")]
    return table(["model", *header], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16, help="16 make 1.1 billion parameters")
    parser.add_argument("--tokens", type=int, default=36, help="of the long answer")
    parser.add_argument("--turns", type=int, default=3, help="of each engine")
    parser.add_argument("--eager", action="store_true", help="without vLLM's compiler, which takes minutes")
    parser.add_argument("--folder", type=Path, default=None, help="for the models, 4 GB")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.md and results/NAME.json")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.tokens, options.eager)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        engines = {name: Engine(model, options) for name, model in write_models(options.layers, Path(folder)).items()}
        best = {name: [0.0] * len(SEQUENCES) for name in engines}
        for _ in range(options.turns):
            for name, engine in engines.items():
                best[name] = [max(pair) for pair in zip(best[name], engine.measure(), strict=True)]
        for engine in engines.values():
            engine.close()
    heading = f"Llama shape, {options.layers} layers, {'eager' if options.eager else 'compiled'}"
    body = results(best)
    print(f"\n{heading}\n\n{body}")
    if options.save:
        save(options.save, "vLLM on a CPU", {heading: body}, {"tokens_per_second": best, "sequences": SEQUENCES})


if __name__ == "__main__":
    main()
