"""``fp4 quantize`` and ``fp4 schemes``, as a user meets them."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_models import save_small, save_text
from typer.testing import CliRunner

from fp4 import cli
from fp4.cli import app
from fp4.cli.settings import load_env_file
from fp4.methods import METHODS
from fp4.pipeline import Job
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
    (tmp_path / "more.yaml").write_text('"*.o_proj": mxfp4a16\n"*.layers.2.*": keep\n')
    options = ["--override", "down_proj=fp8_dynamic", "--overrides", tmp_path / "more.yaml", "--skip", "k_proj"]
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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "more.yaml"]


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
        (["--overrides", "list.yaml"], "list.yaml holds list"),
        (["--overrides", "broken.yaml"], "broken.yaml is no valid YAML"),
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
    (tmp_path / "list.yaml").write_text("- down_proj\n")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    (tmp_path / "recipe.yaml").write_text("datasets:\n  - {path: a.txt, wieght: 2}\n")
    base = ["quantize", model, "out", "--method", "gptq", *options]
    code, error = refused(monkeypatch, capsys, *base)
    assert code == 2
    assert message in error
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


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


def test_settings_come_from_an_env_file(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {**os.environ, "FP4_METHOD": "rtn"})
    (tmp_path / ".env").write_text("FP4_SCHEME=mxfp4a16\nexport FP4_METHOD=magic\nOTHER=x\n")
    code, _ = refused(monkeypatch, capsys, "quantize", model, "out")
    assert code == 0
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (found["scheme"], found["method"]) == ("mxfp4a16", "rtn")  # what is set in the environment stays
    (tmp_path / ".env").write_text("# tokens\nFP4_TOKEN\n")
    code, error = refused(monkeypatch, capsys, "quantize", model, "again")
    assert code == 2
    assert ".env, line 2: FP4_TOKEN has no value" in error


def test_folders_of_the_hub_come_from_an_env_file(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"HF_HOME={tmp_path / 'hub'}\n")
    code = (
        "import atexit; from huggingface_hub import constants; atexit.register(lambda: print(constants.HF_HOME)); "
        "from fp4.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "schemes"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "hub")
    assert done.stdout.count(str(tmp_path / "hub")) == 1


def test_env_files_are_read_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"FP4_SEED": "1"})
    path = tmp_path / ".env"
    path.write_text("FP4_SEED=2\nHF_TOKEN = 'a b' \n\nPATH=/nowhere\n")
    assert load_env_file(path) == ["HF_TOKEN"]
    assert dict(os.environ) == {"FP4_SEED": "1", "HF_TOKEN": "a b"}
