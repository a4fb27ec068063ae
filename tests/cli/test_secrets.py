"""A token reaches the hub and nothing else: no file, no log, no error; and what a .env file may set."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub import Hub, serve
from marks import sampled
from small_models import save_small, save_text
from transformers import AutoModelForCausalLM

import fp4
from fp4 import FPQuantConfig, cli
from fp4.checkpoint.convert import convert
from fp4.checkpoint.inspect import inspect
from fp4.cli import app
from fp4.cli.env_file import ALLOWED, load_env_file
from fp4.pipeline import Hub as HubOptions
from fp4.pipeline import Job
from fp4.request import Request

TOKEN = "hf_SECRETsecretSECRET"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense model, and the same packed, with a tokenizer each."""
    root = tmp_path_factory.mktemp("models")
    dense = save_small("llama", root / "dense", num_hidden_layers=1)
    config = FPQuantConfig(scheme="nvfp4a16", checkpoint_format="compressed-tensors")
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=config).save_pretrained(root / "packed")
    for path in dense.glob("*token*"):
        shutil.copy(path, root / "packed")
    return {"dense": dense, "packed": root / "packed"}


def told(root: Path, *texts: str) -> str:
    """Everything below ``root``, and ``texts``."""
    files = [path.read_bytes().decode("utf-8", "replace") for path in root.rglob("*") if path.is_file()]
    return "\n".join([*files, *texts])


def called(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, *words: str
) -> tuple[int, str]:
    """Exit code of the command, and all that it printed and logged."""
    monkeypatch.setattr(sys, "argv", ["fp4", *words])
    # main() goes through typer's own handling of exceptions, which an exit code does not end.
    with caplog.at_level(logging.DEBUG), pytest.raises(SystemExit) as raised:
        cli.main()
    printed = capfd.readouterr()
    return int(raised.value.code or 0), printed.out + printed.err + caplog.text


COMMANDS = {
    "quantize": ["quantize", "{dense}", "out", "--scheme", "nvfp4a16", "--method", "rtn", "--rule", "abs_max"],
    "plan": ["quantize", "{dense}", "out", "--scheme", "nvfp4a16", "--method", "rtn", "--plan"],
    "convert": ["convert", "{packed}", "out", "--to", "modelopt"],
    "inspect": ["inspect", "{packed}"],
    "inspect as JSON": ["inspect", "{packed}", "--json"],
    "evaluate": ["evaluate", "{here}", "--data", "text.txt", "--window", "16", "--windows", "1", "--save"],
    "report": ["report", "{packed}", "--source", "{dense}", "--output", "report.html"],
}
SPELLINGS = {"apart": ["--token", TOKEN], "together": [f"--token={TOKEN}"], "FP4_TOKEN": [], "HF_TOKEN": []}


@pytest.mark.parametrize(
    ("command", "spelling"),
    [*((command, "apart") for command in COMMANDS), *(("quantize", spelling) for spelling in list(SPELLINGS)[1:])],
)
def test_no_token_is_written_or_printed(
    command: str,
    spelling: str,
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    save_text(tmp_path)
    if command == "evaluate":
        shutil.copytree(models["packed"], tmp_path / "here")
    if not SPELLINGS[spelling]:
        monkeypatch.setenv(spelling, TOKEN)
    words = [word.format(here="here", **models) for word in COMMANDS[command]]
    for _ in range(2):  # the second time what was written is in the way
        _, said = called(monkeypatch, capfd, caplog, *words, *SPELLINGS[spelling])
        assert "Traceback" not in said
        assert TOKEN not in told(tmp_path, said)
    if command in ("quantize", "convert"):
        assert (tmp_path / "out/model.safetensors").is_file()


def test_the_recorded_command_is_the_choice_without_the_token(
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FP4_METHOD", "rtn")
    monkeypatch.setenv("FP4_CACHE_DIR", str(tmp_path / "cache"))
    chosen = ["-s", "nvfp4a16", f"--token={TOKEN}", "--skip", "*.k_proj", "--skip=*.v_proj", "--overwrite"]
    code, said = called(monkeypatch, capfd, caplog, "quantize", str(models["dense"]), "my out", *chosen)
    assert code == 0, said
    recorded = json.loads((tmp_path / "my out/report.json").read_text())["command"]
    assert recorded == (
        f"fp4 quantize {models['dense']} 'my out' --scheme nvfp4a16 --skip '*.k_proj' --skip '*.v_proj' --method rtn "
        "--overwrite"
    )
    assert recorded in (tmp_path / "my out/README.md").read_text()


def test_the_call_from_python_is_recorded_without_the_token(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub-token", TOKEN])
    hub = HubOptions(token=TOKEN)
    assert TOKEN not in repr(hub)
    report = fp4.quantize(models["dense"], tmp_path / "out", "nvfp4a16", "rtn", rule="abs_max", hub=hub)
    assert report["command"].startswith("fp4.quantize(")
    Job(Request(models["dense"], tmp_path / "again", "nvfp4a16", "rtn", rule="abs_max", hub=hub)).run()
    assert TOKEN not in told(tmp_path)


def test_work_that_was_interrupted_holds_no_token(
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr("fp4.pipeline.job.build_report", fail)
    words = ["quantize", str(models["dense"]), "out", "--scheme", "nvfp4a16", "--method", "rtn", "--token", TOKEN]
    code, said = called(monkeypatch, capfd, caplog, *words)
    assert code == 3
    assert (tmp_path / "out.partial/request.json").is_file()
    assert TOKEN not in told(tmp_path, said)


def test_a_traceback_shows_no_token(models: dict[str, Path], tmp_path: Path) -> None:
    """An error that is fp4's own fault is shown with its traceback, but without the values of variables."""
    code = (
        "import fp4.pipeline\n"
        "def fail(self, *arguments): raise RuntimeError('a defect')\n"
        "fp4.pipeline.Job.run = fail\n"
        "from fp4.cli import main; main()"
    )
    words = ["quantize", str(models["dense"]), "out", "--scheme", "nvfp4a16", "--method", "rtn", "--token", TOKEN]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path)
    assert "a defect" in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert app.pretty_exceptions_show_locals is False  # the default of older releases of typer is True


# --- a hub that says no ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(models: dict[str, Path]) -> Iterator[Hub]:
    with serve({("owner/model", "main"): models["packed"]}, "another token") as running:
        yield running


# One process for all commands, because huggingface_hub reads HF_ENDPOINT when it is imported.
REFUSED = """
import json, sys
import fp4.cli
token, text = sys.argv[1:]
commands = [
    ["quantize", "owner/model", "out"], ["convert", "owner/model", "out", "--to", "modelopt"],
    ["inspect", "owner/model"],
    ["evaluate", "owner/model", "--data", text, "--window", "16"], ["report", "owner/model"],
]
codes = []
for command in commands:
    sys.argv = ["fp4", *command, "--token", token]
    try:
        fp4.cli.main()
    except SystemExit as error:
        codes.append(error.code)
print(json.dumps(codes))
"""


@pytest.mark.parametrize(
    "token", sampled([TOKEN, f"{TOKEN}\n", f"{TOKEN} two", f"{TOKEN}\u00e9", f"{TOKEN}\x01"], TOKEN, f"{TOKEN} two")
)
def test_errors_of_the_hub_do_not_show_the_token(token: str, hub: Hub, tmp_path: Path) -> None:
    """The HTTP client quotes the whole header where it refuses one, as it does for a token with a space."""
    home = tmp_path / "home"
    text = save_text(tmp_path)
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    hub.requests.clear()
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, token, str(text)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.stdout.splitlines()[-1] == "[2, 2, 2, 2, 2]", done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert TOKEN not in told(tmp_path, done.stdout, done.stderr)
    sent = {authorization for _, _, authorization, _ in hub.requests}
    if token.strip() == TOKEN:
        assert sent == {f"Bearer {TOKEN}"}
    else:
        assert not sent
        assert done.stderr.count(f"at position {len(TOKEN) + 1} of {len(token)}") == 5, done.stderr


def test_a_token_of_the_environment_is_checked_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN} two")
    for call in (lambda: inspect("owner/model"), lambda: convert("owner/model", tmp_path / "out", "modelopt")):
        with pytest.raises(ValueError, match="the hub's token has a space") as raised:
            call()
        assert TOKEN not in str(raised.value)


# --- .env ------------------------------------------------------------------------------------------------------------


def test_env_files_set_tokens_and_folders_alone(
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {**os.environ})
    (tmp_path / ".env").write_text(
        f"HF_ENDPOINT=http://127.0.0.1:9\nFP4_SCHEME=mxfp4a16\nHF_TOKEN={TOKEN}\nFP4_CACHE_DIR=cache\nPATH=/nowhere\n"
    )
    words = ["quantize", str(models["dense"]), "out", "--method", "rtn", "--scheme", "nvfp4a16"]
    code, said = called(monkeypatch, capfd, caplog, *words)
    assert code == 0, said
    assert json.loads((tmp_path / "out/report.json").read_text())["scheme"] == "nvfp4a16"
    assert "note: .env gave HF_TOKEN, FP4_CACHE_DIR\n" in said
    assert "note: .env names HF_ENDPOINT, FP4_SCHEME, not read from a file" in said
    (tmp_path / ".env").unlink()
    assert TOKEN not in told(tmp_path, said)
    assert "HF_ENDPOINT" not in os.environ
    assert os.environ["PATH"] != "/nowhere"


def test_a_scheme_of_an_env_file_changes_nothing(
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("FP4_SCHEME=mxfp4a16\nFP4_METHOD=magic\nFP4_FORMAT=modelopt\n")
    code, said = called(
        monkeypatch, capfd, caplog, "quantize", str(models["dense"]), "out", "--plan", "--method", "rtn"
    )
    assert code == 0, said
    assert "mxfp4" not in said.lower()


def test_env_files_are_read_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"FP4_TOKEN": "1"})
    path = tmp_path / ".env"
    path.write_text("# tokens\nFP4_TOKEN=2\nexport HF_TOKEN = 'a b' \n\nPATH=/nowhere\nOTHER\n")
    assert load_env_file(path) == [f"{path} gave HF_TOKEN"]
    assert dict(os.environ) == {"FP4_TOKEN": "1", "HF_TOKEN": "a b"}
    assert load_env_file(tmp_path / "absent") == []


def test_mistakes_in_env_files_are_named_without_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    path = tmp_path / ".env"
    for content in (f"HF_TOKEN{TOKEN}\n", f"HF_TOKEN:{TOKEN}=1\n", f"HF_TOKEN {TOKEN}\n"):
        path.write_text(content)
        assert load_env_file(path) == []
    path.write_text("\nFP4_TOKEN\n")
    with pytest.raises(ValueError, match=r"\.env, line 2: FP4_TOKEN has no value; expected NAME=value"):
        load_env_file(path)
    path.write_bytes(b"HF_TOKEN=\xff\n")
    with pytest.raises(ValueError, match="no text in UTF-8"):
        load_env_file(path)
    assert not {name for name in ALLOWED if "ENDPOINT" in name or "SCHEME" in name}
