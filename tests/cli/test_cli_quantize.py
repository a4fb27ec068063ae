"""``fp4 quantize`` and ``fp4 schemes``, as a user meets them."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_sources import store
from safetensors.torch import load_file, save_file
from small_models import save_small, save_text, save_vision_language
from typer.testing import CliRunner

from fp4 import cli
from fp4.cli import app
from fp4.methods import METHODS
from fp4.pipeline import Job
from fp4.pipeline.calibrate import BlockCalibration
from fp4.scheme import SCHEMES


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_small("llama", tmp_path / "model")


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    return result.output


def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path
) -> tuple[int, str]:
    """Exit code and message of the ``fp4`` command."""
    monkeypatch.setattr(sys, "argv", ["fp4", *map(str, arguments)])
    with pytest.raises(SystemExit) as raised:
        cli.main()
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return int(raised.value.code or 0), error


def test_schemes_and_methods_are_listed() -> None:
    output = run("schemes")
    for word in (*SCHEMES, "rtn", "gptq", "autoround", "best", "compressed-tensors", "fp_quant"):
        assert word in output


def test_schemes_as_json() -> None:
    found = json.loads(run("schemes", "--json"))
    assert list(found) == ["schemes", "methods"]
    assert [row["name"] for row in found["schemes"]] == list(SCHEMES)
    assert [row["name"] for row in found["methods"]] == list(METHODS)
    keys = {"name", "summary", "bits_per_weight", "runs_on", "formats"}
    assert all(set(row) == keys for row in found["schemes"])
    assert all(set(row) == {"name", "cost", "needs_data"} for row in found["methods"])
    by_name = {row["name"]: row for row in found["schemes"]}
    assert by_name["mxfp4"]["bits_per_weight"] == 4.25
    assert by_name["nvfp4a8"]["formats"] == ["modelopt"]


def test_quantize(model: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "out", save_text(tmp_path)
    output = run("quantize", model, out, "--method", "gptq", "--data", text, "--samples", "2", "--seq-len", "32")
    assert "21 layers to nvfp4 by gptq, 1 kept" in output
    assert "largest output errors: model.layers." in output
    assert json.loads((out / "report.json").read_text())["data"]["tokens"] == 64
    assert "21 nvfp4" in run("inspect", out)


def test_plan_shows_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    pairs = ("down_proj=fp8_dynamic", "*.o_proj=mxfp4a16", "*.layers.2.*=keep")
    options = [*(word for pair in pairs for word in ("--override", pair)), "--skip", "k_proj"]
    output = run(
        "quantize", model, tmp_path / "out", "--scheme", "nvfp4a16", "--method", "rtn", "--rotation", "none",
        "--format", "compressed-tensors", *options, "--plan"
    )  # fmt: skip
    rows = {line.split("│")[1].strip(): line for line in output.splitlines() if line.startswith("│")}
    assert "fp8_dynamic" in rows["model.layers.*.mlp.down_proj"]
    assert "mxfp4a16" in rows["model.layers.*.self_attn.o_proj"]
    assert "│ 2     │" in rows["model.layers.*.self_attn.q_proj"]
    assert "model.layers.*.self_attn.k_proj (skipped by k_proj)" in output
    assert "lm_head (output embedding)" in output
    assert "streamed tensor by tensor" in output
    assert "GB of memory besides its libraries" in " ".join(output.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("options", "schemes", "summary"),
    [
        (
            ["--only", "*layers.1.*", "--override", "*.o_proj=fp8_dynamic"],
            {"layers.1.self_attn.o_proj": "fp8_dynamic", "layers.1.self_attn.q_proj": "nvfp4a16"},
            "6 layers to nvfp4a16, 1 to fp8_dynamic by rtn, 15 kept",
        ),
        (
            ["--skip", "*layers.1.*", "--override", "*.o_proj=fp8_dynamic"],
            {"layers.0.self_attn.o_proj": "fp8_dynamic", "layers.1.self_attn.o_proj": None},
            "12 layers to nvfp4a16, 2 to fp8_dynamic by rtn, 8 kept",
        ),
        (
            ["--skip", "o_proj", "--only", "*layers.1.*"],
            {"layers.1.self_attn.o_proj": None, "layers.1.self_attn.q_proj": "nvfp4a16"},
            "6 layers to nvfp4a16 by rtn, 16 kept",
        ),
    ],
)
def test_skip_goes_before_only_and_only_before_override(
    options: list[str], schemes: dict[str, str | None], summary: str, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    output = run("quantize", model, out, "--scheme", "nvfp4a16", "--method", "rtn", *options)
    assert summary in " ".join(output.split())
    found = {row["name"]: row["scheme"] for row in json.loads((out / "report.json").read_text())["layers"]}
    assert {name: found.get(f"model.{name}") for name in schemes} == schemes


def test_every_command_says_the_same_bits(model: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "out", ["--scheme", "nvfp4a8", "--method", "rtn", "--samples", "2", "--seq-len", "32"]
    line = next(line for line in run("schemes").splitlines() if "nvfp4a8" in line)
    assert "│ 4.25 │" in line
    assert "4.25 bits per quantized weight" in " ".join(run("quantize", model, out, *options, "--plan").split())
    run("quantize", model, out, *options)
    assert "4.26 bits per quantized weight" in run("inspect", out)  # and the global scales of so small layers
    assert "| 21 | nvfp4a8 | 4.25 |" in (out / "README.md").read_text()


def test_it_says_what_a_quantized_source_was(model: Path, tmp_path: Path) -> None:
    for source, expected in (
        ("fp8-block", "quantized already (fp8: weights 21 in fp8_block)"),
        ("compressed-tensors-mxfp4", "weights 21 in mxfp4a16); 21 of 21 layers keep its values exactly"),
    ):
        folder, _ = store(model, tmp_path / source, source)
        options = ["--scheme", "nvfp4a16", "--method", "rtn"]
        assert expected in " ".join(run("quantize", folder, tmp_path / source / "out", *options).split())


def test_plan_shows_what_is_included_outside_the_decoder(tmp_path: Path) -> None:
    model = save_vision_language(tmp_path / "model")
    command = ["quantize", model, tmp_path / "out", "--scheme", "nvfp4a16", "--method", "rtn", "--plan"]
    assert "vision_tower" not in run(*command).partition("kept:")[0]
    included = run(*command, "--include", "*.vision_tower.*.fc1", "--include", "*.vision_tower.*.fc2")
    rows = [line.split("│")[1].strip() for line in included.splitlines() if line.startswith("│")]
    of_tower = [name.rpartition(".")[2] for name in rows if "vision_tower" in name]
    assert of_tower == ["fc1", "fc2"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--data", "absent.jsonl"], 2, "there is no file or folder absent.jsonl"),
        (["--data", "empty.txt"], 2, "empty.txt holds 0 tokens; calibration needs at least 2"),
        (["--data", "bad.jsonl"], 2, "bad.jsonl): line 2 is no valid JSON"),
        (["--max-memory", "gpu:8GiB"], 2, "max_memory names gpu, but this machine has none"),
        ([], 3, "is too small: it has 1e-06 GB free, and output and work files need about 0.00"),
        ([], 2, "out exists; name another folder, or replace it with --overwrite"),
    ],
)
def test_plan_finds_what_the_run_would_find(
    options: list[str],
    code: int,
    message: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"text": }\n')
    if code == 3:
        monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(2000, 1000, 1000))
    if "exists" in message:
        (tmp_path / "out").mkdir()
    before = sorted(tmp_path.iterdir())
    command = ["quantize", model, "out", "--method", "gptq", "--device", "cpu", "--samples", "2", "--seq-len", "32"]
    for plan in ([], ["--plan"]):
        found, error = refused(monkeypatch, capsys, *command, *options, *plan)
        assert (found, message in error) == (code, True), error
        assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_plan_estimates_the_whole_time(method: str, model: Path, tmp_path: Path) -> None:
    few = ["--samples", "2", "--seq-len", "32", "--device", "cpu"]
    output = " ".join(run("quantize", model, tmp_path / "out", "--method", method, *few, "--plan").split())
    assert re.search(r"takes about \d+ (s|min) in all, from rates measured just now", output)
    assert "forward passes" not in output


def test_plan_says_when_memory_is_short(model: Path, tmp_path: Path) -> None:
    short = ["--max-memory", "cpu:100KB", "--samples", "2", "--seq-len", "32", "--plan"]
    output = run("quantize", model, tmp_path / "out", "--method", "gptq", "--device", "cpu", *short)
    assert "3 blocks, one at a time, on cpu" in output
    assert "more memory than the" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scheme", "nvpf4"], "scheme is 'nvpf4'; expected one of nvfp4, "),
        (["--method", "gtpq"], "method is 'gtpq'; expected one of "),
        (["--max-memory", "8G"], "max_memory has 8G"),
        (["--option", "damping"], "option is 'damping'; expected NAME=VALUE"),
        (["--option", "dampnig=1"], "method gptq has no option dampnig; it has damping"),
        (["--override", "down_proj"], "expected PATTERN=SCHEME"),
        (["--data", "recipe.yaml"], "line 2, datasets[0].wieght: there is no such key"),
        (["--data", "absent.jsonl"], "absent.jsonl"),
        (["--device", "cuda:9"], "device is 'cuda:9', which cannot be used"),
        (["--rotation", "hadamard"], "rotation is 'hadamard'"),
    ],
)
def test_mistakes_are_named(
    options: list[str],
    message: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("datasets:\n  - {path: a.txt, wieght: 2}\n")
    base = ["quantize", model, "out", "--method", "gptq", *options]
    code, error = refused(monkeypatch, capsys, *base)
    assert code == 2
    assert message in error
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_messages_name_flags_of_the_command(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, layer = tmp_path / "out", "model.layers.2.mlp.up_proj"
    tensors = load_file(model / "model.safetensors")
    tensors[f"{layer}.weight"][3, 5] = torch.nan
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    command = ["quantize", model, out, "--scheme", "nvfp4", "--method", "rtn", "--samples", "2", "--seq-len", "32"]
    code, error = refused(monkeypatch, capsys, *command)
    assert code == 2
    assert "holds 1 NaN or infinite values out of 8192" in error
    assert f"or keep the layer as it is with --skip {layer}; what is finished is kept in {out}.partial" in error
    code, error = refused(monkeypatch, capsys, *command, "--skip", "layers.0.mlp.up_proj")
    assert (code, error.strip().endswith("(it differs in skip); finish that one with its own command, or replace it "
        "with --overwrite")) == (2, True)  # fmt: skip
    code, error = refused(monkeypatch, capsys, *command, "--skip", layer)
    assert code == 0, error
    code, error = refused(monkeypatch, capsys, *command, "--skip", layer)
    assert code == 2
    assert error.strip() == f"error: {out} exists; name another folder, or replace it with --overwrite"


def test_an_interruption_says_how_to_go_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = BlockCalibration._quantize

    def interrupted(self: BlockCalibration, number: int, *arguments: Any) -> Any:
        if number == 1:
            raise KeyboardInterrupt
        return original(self, number, *arguments)

    monkeypatch.setattr(BlockCalibration, "_quantize", interrupted)
    command = ["quantize", model, tmp_path / "out", "--method", "rtn", "--samples", "2", "--seq-len", "32"]
    code, error = refused(monkeypatch, capsys, *command)
    assert code == 130
    kept = f"what is finished is kept in {tmp_path / 'out.partial'}; the same command goes on from there"
    assert error.strip() == f"interrupted; {kept}"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOMEM, errno.EIO, errno.EFBIG])
def test_failures_of_the_machine_exit_with_3(
    number: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Job, *arguments: Any, **options: Any) -> None:
        raise OSError(number, "the machine failed")

    monkeypatch.setattr(Job, "run", fail)
    code, error = refused(monkeypatch, capsys, "quantize", model, tmp_path / "out", "--method", "rtn")
    assert code == 3
    assert "the machine failed" in error


def test_folders_of_the_hub_come_from_an_env_file(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"HF_HOME={tmp_path / 'hub'}\n")
    code = (
        "import atexit, importlib; constants = 'huggingface_hub.constants'; "
        "atexit.register(lambda: print(importlib.import_module(constants).HF_HOME)); "
        "from fp4.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "schemes"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "hub")
    assert done.stdout.count(str(tmp_path / "hub")) == 1
