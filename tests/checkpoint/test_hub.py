"""Everything that takes a path takes a hub id: against a hub on localhost with private models and revisions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import Hub, serve
from small_models import save_small, save_text
from transformers import AutoModelForCausalLM

from fp4 import FPQuantConfig
from fp4.checkpoint.convert import convert
from fp4.checkpoint.inspect import inspect

TOKEN = "hf_secret"

# One process for all commands, because huggingface_hub reads HF_ENDPOINT when it is imported.
COMMANDS = """
import json, os, sys
from pathlib import Path
import fp4, torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner
from fp4.cli import app
from fp4.checkpoint.convert import convert
from fp4.quality.evaluate import evaluate
from fp4.checkpoint.inspect import inspect
from fp4.pipeline import Hub

token, root, text = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
found = {}
at = {"revision": "packed", "token": token}
inspected = inspect("owner/model", **at)
found["inspect"] = [inspected.format, inspected.schemes, inspected.notes]
sizes = [path.stat().st_size for path in root.rglob("*.safetensors")]
found["weights fetched to inspect"] = sum(sizes)
for name in ("owner/model", "owner/legacy", "owner/dense"):
    options = at if name == "owner/model" else {"token": token}
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options)
    with torch.no_grad():
        found[name] = model(torch.arange(16)[None]).logits.sum().item()
    found[f"{name} is packed"] = sum(isinstance(m, fp4.FP4Linear) for m in model.modules())
convert("owner/model", root / "converted", "modelopt", **at)
fp4.quantize("owner/model", root / "quantized", "nvfp4a16", "rtn", hub=Hub("dense", token))
found["evaluate"] = evaluate("owner/model", text, against="owner/dense", window=32, windows=2, **at).to_dict()
report = Path(root / "report.html")
command = ["report", "owner/model", "--source", "owner/dense", "--output", str(report)]
called = CliRunner().invoke(app, [*command, "--revision", "packed", "--token", token])
found["report"] = [called.exit_code, called.output, report.is_file()]
errors = {
    "no such revision": lambda: inspect("owner/model", revision="v9", token=token),
    "no token": lambda: convert("owner/untouched", root / "other", "modelopt"),
    "no such model": lambda: inspect("owner/nothing", token=token),
}
for name, call in errors.items():
    try:
        call()
    except ValueError as error:
        found[name] = str(error)
for token_in_environment in (token, "wrong"):
    os.environ["HF_TOKEN"] = token_in_environment
    called = CliRunner().invoke(app, ["inspect", "owner/model", "--revision", "packed"])
    found[f"fp4 inspect with {token_in_environment}"] = [called.exit_code, called.output, str(called.exception)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    root = tmp_path_factory.mktemp("models")
    # Large enough that fetching headers alone can be told from fetching everything.
    dense = save_small("llama", root / "dense", hidden_size=512, intermediate_size=2048)
    config = FPQuantConfig(scheme="nvfp4a16", checkpoint_format="compressed-tensors")
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=config).save_pretrained(root / "packed")
    for path in dense.glob("*token*"):
        shutil.copy(path, root / "packed")
    convert(root / "packed", root / "legacy", "modelopt")
    described = json.loads((root / "legacy/config.json").read_text())
    del described["quantization_config"]
    (root / "legacy/config.json").write_text(json.dumps(described))
    return {
        ("owner/model", "packed"): root / "packed",
        ("owner/model", "dense"): dense,
        ("owner/dense", "main"): dense,
        ("owner/legacy", "main"): root / "legacy",
        ("owner/untouched", "main"): root / "packed",
    }


def run(hub: Hub, root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "FP4_TOKEN"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(root / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


def logits(folder: Path) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return float(model(torch.arange(16)[None]).logits.sum())


@pytest.mark.slow
def test_every_command_by_hub_id(models: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    text = save_text(tmp_path)
    with serve(models, TOKEN) as hub:
        done = run(hub, tmp_path, "-c", COMMANDS, TOKEN, str(tmp_path), str(text))
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    packed, dense = models["owner/model", "packed"], models["owner/dense", "main"]

    local = inspect(packed)
    assert found["inspect"][:2] == [local.format, local.schemes]
    assert "headers only" in found["inspect"][2][0]
    assert found["weights fetched to inspect"] == 0
    first = next(request for request in hub.requests if request[1].endswith("packed/model.safetensors"))
    assert first[3] < 0.6 * (packed / "model.safetensors").stat().st_size

    assert (found["owner/model"], found["owner/model is packed"]) == (logits(packed), 21)
    assert (found["owner/legacy"], found["owner/legacy is packed"]) == (logits(packed), 21)
    assert (found["owner/dense"], found["owner/dense is packed"]) == (logits(dense), 0)
    convert(packed, tmp_path / "local", "modelopt")
    name = "model.safetensors"
    assert (tmp_path / "converted" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    assert inspect(tmp_path / "quantized").schemes == {"nvfp4a16": 21}
    assert found["report"][::2] == [0, True], found["report"][1]
    assert "worst of 21 layers" in found["report"][1]
    assert found["evaluate"]["comparison"]["original_perplexity"] > 1

    assert "owner/model is no folder here, and the hub did not give it" in found["no such revision"]
    assert "Revision Not Found" in found["no such revision"]
    assert "owner/untouched is no folder here, and the hub did not give it" in found["no token"]
    assert "owner/nothing is no folder here" in found["no such model"]
    assert not (tmp_path / "other").exists()
    asked = [request for request in hub.requests if "/resolve/" in request[1]]
    assert {authorization for _, _, authorization, _ in asked} == {f"Bearer {TOKEN}"}

    # The command line takes the token from the environment.
    code, output, _ = found[f"fp4 inspect with {TOKEN}"]
    assert code == 0
    assert "compressed-tensors, llama" in output
    code, _, error = found["fp4 inspect with wrong"]
    assert code == 1
    assert "the hub did not give it" in error
