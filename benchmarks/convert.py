"""Speed and memory of `fp4 convert` against a plain copy of the same files.

    python benchmarks/convert.py [--layers 24] [--hidden 2048]

Makes a checkpoint of random NVFP4 layers, converts it to another format, and copies it; best of three, the page cache
warm for all. Prints the ratio of bytes per second (the aim is at least 0.5) and the memory that converting took.
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
from collections.abc import Callable
from pathlib import Path

import torch
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


def best_of(function: Callable[[Path, Path], object], source: Path, target: Path, repeats: int = 3) -> float:
    seconds = []
    for _ in range(repeats):
        shutil.rmtree(target, ignore_errors=True)
        start = time.perf_counter()
        function(source, target)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


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
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fp4-convert-") as name:
        folder = Path(name)
        source = folder / "source"
        source.mkdir()
        size = make_checkpoint(source, options.layers, options.hidden)
        copying = best_of(copy, source, folder / "copy")
        print(f"checkpoint: {size / 1e6:.0f} MB, {options.layers * 3} layers, NVFP4 in compressed-tensors' format")
        print(f"plain copy: {size / copying / 1e6:.0f} MB/s")
        for to in ("modelopt", "auto-round", "fp_quant"):
            converting = best_of(lambda a, b, to=to: convert(a, b, to), source, folder / "out")  # type: ignore[misc]
            print(f"to {to}: {size / converting / 1e6:.0f} MB/s, {copying / converting:.2f} of the copy")
        layer = 4 * options.hidden * options.hidden * 9 / 16
        grown = peak_growth(source, folder / "out")
        print(f"peak memory: {grown / 1e6:.0f} MB more than before; the largest layer has {layer / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
