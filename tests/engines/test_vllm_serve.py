"""``vllm serve`` on a CPU with a checkpoint of fp4's, spoken to by OpenAI's client, as the README shows it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_wheel import named_vllm

import fp4

pytest.importorskip("vllm", reason="vLLM is not installed; make vllm installs it")
openai = pytest.importorskip("openai")

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",  # as it is where nobody has changed it
    "VLLM_LOGGING_LEVEL": "INFO",
    "HF_HUB_OFFLINE": "1",
}
QUESTION = [{"role": "user", "content": "Continue: The capital of France is"}]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_vllm_serve_answers_as_transformers_does(smollm2: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    config = fp4.FPQuantConfig(scheme="nvfp4a16", checkpoint_format="compressed-tensors")
    model = AutoModelForCausalLM.from_pretrained(smollm2, quantization_config=config, dtype=torch.bfloat16)
    folder = tmp_path / "SmolLM2-NVFP4A16"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    port = free_port()
    arguments = [
        "serve",
        str(folder),
        "--port",
        str(port),
        "--max-model-len",
        "256",
        "--dtype",
        "float32",
        "--enforce-eager",
    ]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", *arguments]
    log = tmp_path / "log.txt"
    with log.open("w") as output:
        environment = os.environ | ENVIRONMENT | {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
        environment |= {"PYTHONPATH": os.pathsep.join([str(named_vllm(tmp_path)), *sys.path])}
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
            for _ in range(600):
                assert server.poll() is None, log.read_text()[-5000:]
                try:
                    (served,) = client.models.list().data
                    break
                except openai.APIConnectionError:
                    time.sleep(1)
            answer = client.chat.completions.create(model=served.id, messages=QUESTION, temperature=0, max_tokens=16)
        finally:
            server.terminate()
            server.wait(60)
    assert "Using Fp4NvFp4LinearKernel for NVFP4 GEMM" in log.read_text()

    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    reference = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.choices[0].message.content == reference
