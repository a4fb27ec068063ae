"""The ``fp4`` command, as a user meets it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from fp4 import FPQuantConfig
from fp4.cli import app


@pytest.fixture(scope="module")
def packed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "mxfp4"
    config = FPQuantConfig("mxfp4", transform_init="identity", scale_rule="mse", activation_dtype="model")
    AutoModelForCausalLM.from_pretrained(llama, quantization_config=config).save_pretrained(path)
    return path


def test_env_names_versions_devices_and_backends() -> None:
    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 0
    for word in (torch.__version__, "transformers", "cpu", "reference", "nvfp4", "mxfp4"):
        assert word in result.output


def test_env_as_json() -> None:
    result = CliRunner().invoke(app, ["env", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert list(found) == ["versions", "devices", "backends"]
    assert list(found["versions"]) == ["python", "fp4", "torch", "transformers", "accelerate", "safetensors", "triton"]
    assert found["versions"]["torch"] == torch.__version__
    assert all(set(device) == {"device", "description", "runs"} for device in found["devices"])
    assert found["devices"][0]["device"] == "cpu"
    for fmt in ("nvfp4", "mxfp4"):
        assert set(found["devices"][0]["runs"][fmt]) == {"backend", "activations"}
    rows = {row["name"]: row for row in found["backends"]}
    reference = rows["reference"]
    assert (reference["name"], reference["available"], reference["reason"]) == ("reference", True, None)
    assert {"scaled_mm", "qutlass", "flashinfer", "cutlass", "cpu", "triton", "reference"} == set(rows)
    assert all(row["purpose"] for row in rows.values())
    assert all(row["available"] == (row["reason"] is None) for row in rows.values())


def test_help_lists_the_commands() -> None:
    result = CliRunner().invoke(app, [])
    for command in ("env", "convert", "inspect", "evaluate", "report"):
        assert command in result.output


def test_convert_and_inspect(packed: Path, tmp_path: Path) -> None:
    target = tmp_path / "[red]:fire:[v2]"  # neither markup nor emoji
    result = CliRunner().invoke(app, ["convert", str(packed), str(target), "--to", "compressed-tensors"])
    assert result.exit_code == 0, result.output
    assert "fp_quant -> compressed-tensors: 14 layers" in result.output
    assert target.name in result.output
    result = CliRunner().invoke(app, ["inspect", str(target), "--layers"])
    assert result.exit_code == 0, result.output
    assert target.name in result.output
    assert "14 mxfp4a16, 4.25 bits per quantized weight" in result.output
    assert "not quantized: lm_head" in result.output
    result = CliRunner().invoke(app, ["inspect", str(target), "--json"])
    assert len(json.loads(result.output)["layers"]) == 14


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "no/such/:fire:/[red]here"], "no/such/:fire:/[red]here"),
        (["convert", "no-such-folder", "out", "--to", "gguf"], "'gguf'; expected one of compressed-tensors"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from fp4.cli import main; main()", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_evaluate_and_report(packed: Path, llama: Path, shared: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(packed, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(shared(f"fixtures/source-llama/{name}"), folder / name)
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be " * 50)
    options = ["--data", str(text), "--against", str(llama), "--window", "16", "--windows", "2", "--device", "cpu"]
    result = CliRunner().invoke(app, ["evaluate", str(folder), *options])
    assert result.exit_code == 0, result.output
    for words in ("perplexity", "KL divergence, mean", "14 layers: mxfp4, unquantized activations"):
        assert words in result.output
    result = CliRunner().invoke(app, ["evaluate", str(folder), *options, "--json", "--save", "--activations", "fp4"])
    found = json.loads(result.stdout)
    assert found == json.loads((folder / "evaluation.json").read_text())
    assert list(found["runs"].values()) == [14]
    pytest.importorskip("matplotlib", reason="the plots need it")
    result = CliRunner().invoke(app, ["report", str(folder), "--source", str(llama)])
    assert result.exit_code == 0, result.output
    assert "worst of 14 layers" in result.output
    assert (folder / "report.html").is_file()


def test_report_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("matplotlib", "fp4.quality.report_p"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = CliRunner().invoke(app, ["report", "anything"])
    assert isinstance(result.exception, ValueError)
    assert "pip install matplotlib" in str(result.exception)
