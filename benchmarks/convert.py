"""Speed and memory of `fp4 convert` against a plain copy of the same files.

    python benchmarks/convert.py [--layers 16] [--hidden 2048]

Makes a checkpoint of random NVFP4 layers (0.45 GB), converts it to three formats, and copies it; medians of seven, in
turns, the page cache warm for all. Prints and saves the ratio of bytes per second (the aim is at least 0.5) and the
memory that converting took.
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

import torch
from measure import save, table, verdict
from safetensors.torch import save_file

from fp4.checkpoint import CODECS, LayerScheme
from fp4.checkpoint.codec import StoredLinear
from fp4.convert import convert
from fp4.formats import NVFP4, QuantizedTensor


def make_checkpoint(folder: Path, layers: int, hidden: int) -> int:
    """Random codes and scales in compressed-tensors' format, four layers a shard; returns the bytes of weights."""
    generator = torch.Generator().manual_seed(0)
    codec, scheme = CODECS["compressed-tensors"]({"config_groups": {}}), LayerScheme(NVFP4, "model")
    names, weight_map = [], {}
    shards = -(-layers // 4)
    for shard in range(shards):
        tensors = {}
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        for layer in range(shard * 4, min(layers, shard * 4 + 4)):
            for name in ("q_proj", "gate_proj", "up_proj"):
                codes = torch.randint(0, 256, (4 * hidden, hidden // 2), dtype=torch.uint8, generator=generator)
                scales = torch.randint(8, 120, (4 * hidden, hidden // 16), dtype=torch.uint8, generator=generator)
                scale = torch.tensor(2.0**-9, dtype=torch.float64)
                weight = QuantizedTensor(codes, scales.view(torch.float8_e4m3fn), scale)
                full = f"model.layers.{layer}.{name}"
                names.append(full)
                for suffix, tensor in codec.write(StoredLinear(weight, None, None), scheme).items():
                    tensors[full + suffix] = tensor
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = codec.configuration(dict.fromkeys(names, scheme), [], {})
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16", "quantization_config": config}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def copy(source: Path, target: Path) -> None:
    """What a user would do: every byte through the file system, and on the disk when it returns."""
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as file:
            os.fsync(file.fileno())


def seconds_of(contenders: dict[str, Callable[[Path, Path], object]], source: Path, target: Path) -> dict[str, float]:
    """Median seconds of seven runs; all take turns, so that a change of the disk's speed meets each of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(7):
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
        "from fp4.convert import convert\n"
        "status = lambda key: int(re.search(key + r':\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "before = status('VmRSS')\n"
        "Path('/proc/self/clear_refs').write_text('5')\n"  # the highest so far was while importing
        "convert(sys.argv[1], sys.argv[2], 'modelopt')\n"
        "print(status('VmHWM') - before)\n"
    )
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, "-c", code, str(source), str(target)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fp4-convert-") as name:
        folder = Path(name)
        source = folder / "source"
        source.mkdir()
        size = make_checkpoint(source, options.layers, options.hidden)
        targets = ("modelopt", "auto-round", "fp_quant")
        contenders: dict[str, Callable[[Path, Path], object]] = {"plain copy": copy}
        contenders |= {to: functools.partial(convert, to=to) for to in targets}
        seconds = seconds_of(contenders, source, folder / "out")
        grown = peak_growth(source, folder / "out")
    ratios = {to: seconds["plain copy"] / seconds[to] for to in targets}
    speeds = {name: size / taken / 1e6 for name, taken in seconds.items()}
    rows = [["plain copy", f"{speeds['plain copy']:.0f}", ""]]
    rows += [[f"to {to}", f"{speeds[to]:.0f}", verdict(ratios[to], 0.5)] for to in targets]
    layer = 4 * options.hidden * options.hidden * 9 / 16
    memory = f"{grown / 1e6:.0f} MB more than before converting; the largest layer has {layer / 1e6:.1f} MB."
    result = table(["", "MB/s", "of the copy"], rows)
    print(f"{result}\n\nPeak memory: {memory}")
    title = f"fp4 convert: {size / 1e6:.0f} MB in {options.layers * 3} NVFP4 layers, from compressed-tensors"
    data = {"bytes": size, "seconds": seconds, "ratios": ratios, "peak_growth_bytes": grown, "largest_layer": layer}
    save("convert", title, {"Speed": result, "Peak memory": memory}, data)


if __name__ == "__main__":
    main()
