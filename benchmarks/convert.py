"""Speed and memory of `fp4 convert` against a plain copy of the same files.

    python benchmarks/convert.py [--layers 4 54] [--hidden 2048] [--turns 5] [--save NAME]

Makes checkpoints of random NVFP4 layers (0.11 and 1.5 GB), converts them to three formats, and copies them; medians,
in turns, the page cache warm for all, every byte on the disk in the end. Prints the ratio of bytes per second
(the aim is at least 0.5) and the memory that converting took.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import save, table, verdict
from safetensors.torch import save_file

from fp4.checkpoint import CODECS, LayerScheme
from fp4.checkpoint.convert import convert
from fp4.checkpoint.formats.codec import StoredLinear
from fp4.numerics.formats import NVFP4, QuantizedTensor


def make_checkpoint(folder: Path, layers: int, hidden: int) -> int:
    """Random codes and scales in compressed-tensors' format, four layers a shard; returns the bytes of weights."""
    generator = torch.Generator().manual_seed(0)
    codec, scheme = CODECS["compressed-tensors"].writer(), LayerScheme(NVFP4, "model")
    names, weight_map = [], {}
    shards = -(-layers // 4)
    for shard in range(shards):
        tensors = {}
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        for layer in range(shard * 4, min(layers, shard * 4 + 4)):
            for name in ("q_proj", "gate_proj", "up_proj"):
                words = torch.randint(1 << 62, (4 * hidden, hidden // 16), generator=generator)
                codes = words.view(torch.uint8)
                scales = torch.randint(8, 120, (4 * hidden, hidden // 16), dtype=torch.uint8, generator=generator)
                scale = torch.tensor(2.0**-9, dtype=torch.float64)
                weight = QuantizedTensor(codes, scales.view(torch.float8_e4m3fn), scale, NVFP4)
                full = f"model.layers.{layer}.{name}"
                names.append(full)
                for suffix, tensor in codec.write(StoredLinear(weight, None, None), scheme).items():
                    tensors[full + suffix] = tensor
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = codec.configuration(dict.fromkeys(names, scheme), [], {})
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16", "quantization_config": config}))
    os.sync()  # so that none of it is written while others are timed
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def copy(source: Path, target: Path) -> None:
    """What a user would do: every byte through the file system, and on the disk when it returns."""
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as file:
            os.fsync(file.fileno())


def seconds_of(
    contenders: dict[str, Callable[[Path, Path], object]], source: Path, target: Path, turns: int
) -> dict[str, float]:
    """Median seconds; all take turns, so that a change of the disk's speed meets each of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(turns):
        for name, function in contenders.items():
            shutil.rmtree(target, ignore_errors=True)
            start = time.perf_counter()
            function(source, target)
            seconds[name].append(time.perf_counter() - start)
    shutil.rmtree(target)
    return {name: statistics.median(times) for name, times in seconds.items()}


def peak_growth(source: Path, target: Path) -> int:
    """Bytes by which converting raises a fresh process's memory at its highest (Linux)."""
    code = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from fp4.checkpoint.convert import convert\n"
        "status = lambda key: int(re.search(key + r':\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "before = status('VmRSS')\n"
        "Path('/proc/self/clear_refs').write_text('5')\n"  # the highest so far was while importing
        "convert(sys.argv[1], sys.argv[2], 'modelopt')\n"
        "print(status('VmHWM') - before)\n"
    )
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, "-c", code, str(source), str(target)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) * 1024


def measure(layers: int, hidden: int, turns: int) -> dict[str, Any]:
    """Seconds by contender, and memory, for a checkpoint of 3 matrices a layer."""
    with tempfile.TemporaryDirectory(prefix="fp4-convert-") as name:
        folder = Path(name)
        source = folder / "source"
        source.mkdir()
        size = make_checkpoint(source, layers, hidden)
        contenders: dict[str, Callable[[Path, Path], object]] = {"plain copy": copy}
        contenders |= {f"to {to}": functools.partial(convert, to=to) for to in ("modelopt", "auto-round", "fp_quant")}
        seconds = seconds_of(contenders, source, folder / "out", turns)
        grown = peak_growth(source, folder / "out")
    ratios = {name: seconds["plain copy"] / taken for name, taken in seconds.items() if name != "plain copy"}
    return {"layers": 3 * layers, "bytes": size, "seconds": seconds, "ratios": ratios, "peak_growth_bytes": grown}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 54])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.md and results/NAME.json")
    options = parser.parse_args()
    found = [measure(layers, options.hidden, options.turns) for layers in options.layers]
    rows, memory = [], []
    for result in found:
        for name, taken in result["seconds"].items():
            ratio = verdict(result["ratios"][name], 0.5) if name in result["ratios"] else ""
            rows.append([f"{result['bytes'] / 1e6:.0f} MB", name, f"{result['bytes'] / taken / 1e6:.0f}", ratio])
        memory.append(f"{result['peak_growth_bytes'] / 1e6:.0f} MB for {result['bytes'] / 1e6:.0f} MB")
    largest = 4 * options.hidden * options.hidden * 9 / 16
    grown = f"{', '.join(memory)} more than before converting; the largest layer has {largest / 1e6:.1f} MB."
    result = table(["checkpoint", "", "MB/s", "of the copy"], rows)
    print(f"{result}\n\nPeak memory: {grown}")
    if options.save:
        title = f"fp4 convert: NVFP4 layers, from compressed-tensors; medians of {options.turns} turns"
        sections, data = {"Speed": result, "Peak memory": grown}, {"checkpoints": found, "largest_layer": largest}
        save(options.save, title, sections, data)


if __name__ == "__main__":
    main()
