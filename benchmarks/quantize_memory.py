"""Speed and memory of `fp4 quantize`: rounding against a plain copy of the file, GPTQ against the memory it is allowed.

    python benchmarks/quantize_memory.py stream [--gigabytes 8] [--rule abs_max]
    python benchmarks/quantize_memory.py blocks [--hidden 1024] [--layers 20]

``stream`` claims: rtn reads its input at no less than half the speed of copying it, and its memory grows by at most
three times the largest tensor. ``blocks`` claims: GPTQ needs at most 2.5 times one block plus the hidden states it is
told it may keep, of a model four times larger than the memory it is allowed. Checkpoints are random Llamas. Every
measurement is a fresh process; its memory is the growth of anonymous resident memory (RssAnon) over what it was before
the call, sampled every millisecond. A copy and a rounding start with an input that is not in the page cache, and are
done when the output is on the disk; they take turns, and the fastest of each counts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import RESULTS, machine, memory_growth, save, table, verdict

MEASURE = "--measure"
SAMPLES, TOKENS = 4, 128
VOCABULARY = 32000


def make_checkpoint(folder: Path, hidden: int, layers: int, vocabulary: int, blocks_a_file: int) -> int:
    """A random bfloat16 Llama, every block with the same values; returns the bytes of its weights."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=7 * hidden // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )
    folder.mkdir()
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).bfloat16()

    inner, keys = 7 * hidden // 2, hidden // 4
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    block = {f"{name}.weight": matrix(*shape) for name, shape in shapes.items()}
    block |= {
        f"{name}.weight": torch.ones(hidden).bfloat16() for name in ("input_layernorm", "post_attention_layernorm")
    }
    outside = {
        "model.embed_tokens.weight": matrix(vocabulary, hidden),
        "lm_head.weight": matrix(vocabulary, hidden),
        "model.norm.weight": torch.ones(hidden).bfloat16(),
    }
    files, weight_map = -(-layers // blocks_a_file), {}
    for number in range(files):
        tensors = dict(outside) if number == 0 else {}
        for layer in range(number * blocks_a_file, min(layers, (number + 1) * blocks_a_file)):
            tensors |= {f"model.layers.{layer}.{name}": tensor for name, tensor in block.items()}
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    backend = Tokenizer(models.WordLevel({str(token): token for token in range(vocabulary)}, unk_token="0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def forget(folder: Path) -> None:
    """Drop what the page cache holds of a folder's files, once they are on the disk."""
    os.sync()
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(source: Path, target: Path) -> float:
    """Seconds to copy all weights, every byte on the disk."""
    started = time.perf_counter()
    target.mkdir()
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb") as read, (target / path.name).open("wb") as write:
            shutil.copyfileobj(read, write, 16 << 20)
            write.flush()
            os.fsync(write.fileno())
    return time.perf_counter() - started


def measure(options: dict[str, object]) -> None:
    import fp4

    # Libraries and thread pools, loaded on first use, are not what is measured.
    with tempfile.TemporaryDirectory() as name:
        make_checkpoint(Path(name) / "model", 256, 1, 1024, 1)
        fp4.quantize(**(options | {"model": f"{name}/model", "out": f"{name}/out"}))
    with memory_growth() as growth:
        started = time.perf_counter()
        fp4.quantize(**options)
        seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "growth": growth.bytes}))


def measured(options: dict[str, object]) -> dict[str, float]:
    command = [sys.executable, __file__, MEASURE, json.dumps(options)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def at_most(ratio: float, limit: float) -> str:
    return f"{ratio:.2f} (<= {limit:g}: {'pass' if ratio <= limit else 'FAIL'})"


def stream(folder: Path, gigabytes: float, rules: list[str], turns: int) -> None:
    hidden, vocabulary = 2048, 32000
    block = 2 * (2 * hidden**2 + hidden**2 // 2 + 3 * hidden * 7 * hidden // 2)
    outside = 2 * 2 * vocabulary * hidden
    layers = max(1, round((gigabytes * 1e9 - outside) / block))
    model = folder / "model"
    total = sum(path.stat().st_size for path in model.glob("*.safetensors")) if model.exists() else 0
    total = total or make_checkpoint(model, hidden, layers, vocabulary, 20)
    largest = max(2 * vocabulary * hidden, 2 * hidden * 7 * hidden // 2)
    copies: list[float] = []
    found: dict[str, list[dict[str, float]]] = {rule: [] for rule in rules}
    for _ in range(turns):
        forget(model)
        copies.append(copy(model, folder / "copy"))
        shutil.rmtree(folder / "copy")
        for rule in rules:
            forget(model)
            options = {"model": str(model), "out": str(folder / "out"), "scheme": "nvfp4a16", "method": "rtn"}
            found[rule].append(measured(options | {"rule": rule}))
            shutil.rmtree(folder / "out")
    rows, copied = [], min(copies)
    for rule, runs in found.items():
        seconds, growth = min(run["seconds"] for run in runs), max(run["growth"] for run in runs)
        figures = [f"{total / copied / 1e6:.0f}", f"{total / seconds / 1e6:.0f}", verdict(copied / seconds, 0.5)]
        rows.append([rule, *figures, f"{growth / 1e6:.0f}", at_most(growth / largest, 3)])
    data = [{"bytes": total, "largest_bytes": largest, "copy_seconds": copies, "rtn": found}]
    header = ["scale rule", "copy MB/s", "rtn MB/s", "speed against copy", "memory MB", "memory / largest tensor"]
    text = (
        f"A checkpoint of {total / 1e9:.2f} GB in {len(list(model.glob('*.safetensors')))} files, {layers} blocks, "
        f"largest tensor {largest / 1e6:.0f} MB; to nvfp4a16; fastest of {turns}.\n\n{table(header, rows)}"
    )
    report("stream", "Rounding against a plain copy of the input", text, data)


def blocks(folder: Path, hidden: int, layers: int) -> None:
    total = make_checkpoint(folder / "model", hidden, layers, VOCABULARY, layers)
    block = 4 * (2 * hidden**2 + hidden**2 // 2 + 3 * hidden * 7 * hidden // 2)  # float32, as it is computed
    (folder / "text.txt").write_text(" ".join(str(i * 7919 % 1024) for i in range(SAMPLES * TOKENS)))
    kept = 4 * 4 * SAMPLES * TOKENS * hidden
    allowed = total // 4
    options = {"model": str(folder / "model"), "out": str(folder / "out"), "method": "gptq", "samples": SAMPLES}
    options |= {"seq_len": TOKENS, "data": str(folder / "text.txt"), "device": "cpu", "max_memory": {"cpu": allowed}}
    found = measured(options)
    memory = (found["growth"] - kept) / block
    row = [
        f"{total / 1e6:.0f}",
        f"{allowed / 1e6:.0f}",
        f"{block / 1e6:.0f}",
        f"{kept / 1e6:.1f}",
        f"{found['growth'] / 1e6:.0f}",
        at_most(found["growth"] / allowed, 1),
        at_most(memory, 2.5),
        f"{found['seconds']:.0f}",
    ]
    header = ["model MB", "allowed MB", "a block MB", "hidden MB", "used MB", "used / allowed"]
    header += ["(used - hidden) / block", "seconds"]
    text = (
        f"nvfp4 by gptq, {SAMPLES} samples of {TOKENS} tokens; a model of {layers} blocks in bfloat16; a block as it "
        f"is computed, in float32.\n\n{table(header, [row])}"
    )
    data = {"bytes": total, "allowed": allowed, "block": block, "kept": kept, "layers": layers, **found}
    report("blocks", "GPTQ of a model four times larger than the memory it is allowed", text, [data])


def report(name: str, heading: str, text: str, data: list[dict[str, Any]]) -> None:
    """Print, and save beside what the other part has saved."""
    print(text)
    path = RESULTS / "quantize_memory.json"
    parts = json.loads(path.read_text())["parts"] if path.is_file() else {}
    parts[name] = {"heading": heading, "text": f"{machine()['date']}. {text}", "rows": data}
    sections = {part["heading"]: part["text"] for part in parts.values()}
    save("quantize_memory", "Speed and memory of fp4 quantize", sections, {"parts": parts}, machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["stream", "blocks"])
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--rule", nargs="+", default=["abs_max", "mse"])
    parser.add_argument("--turns", type=int, default=2, help="of a copy and each rule")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="work here and keep the checkpoint, which a second run takes again")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        if arguments.what == "stream":
            stream(folder, arguments.gigabytes, arguments.rule, arguments.turns)
        else:
            blocks(folder, arguments.hidden, arguments.layers)


if __name__ == "__main__":
    if sys.argv[1:2] == [MEASURE]:
        measure(json.loads(sys.argv[2]))
    else:
        main()
