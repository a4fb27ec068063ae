"""Progress where there is no terminal, and how ``fp4.quantize`` shows it."""

from __future__ import annotations

import inspect
import io
import os
import subprocess
import sys
import threading
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small_models import save_small
from typer.main import get_command

import fp4
from fp4.cli import app
from fp4.pipeline import Request, job
from fp4.progress import Lines, shown


class Clock:
    """Seconds that pass when the test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_line_says_share_done_and_time_left() -> None:
    written: list[str] = []
    clock = Clock()
    lines = Lines(written.append, clock)
    lines.tell()
    assert written == []  # nothing has begun
    lines("loading", 0, 0)
    clock.now = 60
    lines.tell()
    lines("calibrating", 10, 30)  # an earlier run did ten
    lines.tell()
    clock.now = 660
    lines("calibrating", 15, 30)
    lines.tell()
    clock.now = 2460
    lines("calibrating", 30, 30)
    lines("calibrating", 30, 30)
    lines.tell()
    assert written == [
        "loading: for 60 s",
        "calibrating: 33%, time left not known yet",
        "calibrating: 50%, about 30 min left",
        "calibrating: 100%, in 40 min",
    ]


class Told(io.StringIO):
    """A file that says when it has a line."""

    def __init__(self) -> None:
        super().__init__()
        self.has_line = threading.Event()

    def write(self, text: str) -> int:
        written = super().write(text)
        if "\n" in self.getvalue():
            self.has_line.set()
        return written


def test_a_file_gets_plain_lines_while_a_step_takes_long() -> None:
    file = Told()
    stage = "calibrating " + "x" * 100
    with shown(Console(file=file, width=80), interval=0.01) as progress:
        progress(stage, 3, 4)
        assert file.has_line.wait(60)  # without another call
    assert file.getvalue().splitlines()[0] == f"{stage}: 75%, time left not known yet"


def test_a_terminal_gets_bars() -> None:
    file = io.StringIO()
    with shown(Console(file=file, force_terminal=True, width=80)) as progress:
        progress("reading", 0, 0)
        progress("rounding", 2, 4)
    assert "rounding" in file.getvalue()
    assert "50%" in file.getvalue()
    assert "reading" not in file.getvalue().splitlines()[-1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small("llama", tmp_path_factory.mktemp("models") / "model")


RTN: dict[str, Any] = {"scheme": "nvfp4a16", "method": "rtn"}


def test_quantize_shows_progress_unless_told_not_to(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fp4.quantize(model, tmp_path / "shown", **RTN)
    assert "rounding: 100%, in " in capsys.readouterr().err
    fp4.quantize(model, tmp_path / "hidden", **RTN, progress=False)
    captured = capsys.readouterr()
    assert "rounding" not in captured.out + captured.err
    calls = []
    fp4.quantize(model, tmp_path / "called", **RTN, progress=lambda *call: calls.append(call))
    assert calls[-1][0] == "rounding"
    assert calls[-1][1] == calls[-1][2] > 0
    captured = capsys.readouterr()
    assert "rounding" not in captured.out + captured.err


def test_the_report_names_what_was_chosen(model: Path, tmp_path: Path) -> None:
    report = fp4.quantize(model, tmp_path / "o'ut", **RTN, skip=["*.o_proj"], progress=False)
    out = str(tmp_path / "o'ut")
    assert report["command"].startswith(f"fp4.quantize({str(model)!r}, {out!r}, ")
    assert "scheme='nvfp4a16', method='rtn', skip=['*.o_proj'])" in report["command"]


def test_options_of_quantize_are_spelled_out() -> None:
    parameters = inspect.signature(fp4.quantize).parameters
    assert all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    assert parameters == inspect.signature(Request).parameters
    assert list(parameters)[:5] == ["model", "out", "scheme", "method", "data"]
    assert parameters["format"].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["scheme"].default == "nvfp4"


def test_every_option_is_described_once_for_python_and_the_command_line() -> None:
    texts = {option.name: option.metadata["help"] for option in fields(Request)}
    arguments = inspect.getdoc(fp4.quantize)
    assert arguments is not None
    for name, text in texts.items():
        assert f"    {name}: {text}\n" in arguments
    helps = {option.name: str(getattr(option, "help", None)) for option in get_command(app).commands["quantize"].params}
    spelled = {"overrides": "override", "options": "option"}
    of_python = {"hub", "command", "progress"}
    for name, text in texts.items():
        if name not in of_python:
            assert text in helps[spelled.get(name, name)]


def test_a_misspelled_option_names_the_nearest(model: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"quantize\(\) has no option 'sampels' \(did you mean samples\?\)"):
        fp4.quantize(model, tmp_path / "out", sampels=3)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"method gptq has no option dampnig; .*\(did you mean damping\?\)"):
        fp4.quantize(model, tmp_path / "out", method="gptq", options={"dampnig": 1})
    with pytest.raises(ValueError, match=r"\(did you mean nvfp4\?\)"):
        job.quantize(model, tmp_path / "out", "nvpf4")
    with pytest.raises(ValueError, match=r"method is 'gtpq'; .*\(did you mean gptq\?\)"):
        fp4.quantize(model, tmp_path / "out", method="gtpq")


def test_tables_in_a_file_are_not_wrapped() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-m", "fp4", "schemes"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if "nvfp4a8" in line)
    assert "FP8 activations under one calibrated scale a tensor." in row
    assert "| TensorRT-LLM on Blackwell; here any GPU and CPU, weight-only, or emulated |" in " ".join(
        row.replace("│", "|").split()
    )
