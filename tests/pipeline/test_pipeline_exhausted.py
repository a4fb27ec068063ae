"""Jobs that really run out: a file system that is full, and a process that may not have more memory.

Each attempt is the command line in a fork of one process that has the libraries loaded. Disks are small tmpfs, in a
mount namespace that goes with the process; memory ends by RLIMIT_DATA.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_models import save_small, save_text

import fp4

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory and small disks are Linux's here")

# Prints one line of JSON an attempt: its exit code and what it said, whether the output is there, what is left of the
# work, and which of the files there are not whole.
ATTEMPTS = """
import io, json, os, resource, subprocess, sys
from contextlib import redirect_stderr
from pathlib import Path
import torch
torch.set_num_threads(1)
import fp4
from fp4 import cli
from fp4.pipeline import calibrate as blocks
from safetensors import safe_open

arguments, out = json.loads(sys.argv[1]), Path(sys.argv[2])

def told():
    sys.argv = ["fp4", "quantize", *arguments]
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            cli.main()
        return 0, ""
    except SystemExit as stop:
        return stop.code or 0, " ".join(said.getvalue().split())

def attempt(before):
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        before()
        with os.fdopen(writing, "w") as tell:
            tell.write(json.dumps(told()))
        os._exit(0)
    os.close(writing)
    with open(reading) as answer:
        code, said = json.loads(answer.read() or '["killed", ""]')
    os.waitpid(pid, 0)
    partial = out.with_name(f"{out.name}.partial")
    left = sorted(path.name for path in partial.iterdir()) if partial.exists() else []
    broken = [name for name in left if name.endswith((".safetensors", ".json")) and not whole(partial / name)]
    print(json.dumps({"code": code, "said": said, "out": out.exists(), "left": left, "broken": broken}), flush=True)
    return code

def whole(path):
    try:
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            safe_open(path, "pt").keys()
        return True
    except Exception:
        return False
"""

# Memory ends at a moment that is chosen, for the one allocation there: what else runs then, and how fast, is no matter.
MEMORY = """
import contextlib, itertools
from fp4.checkpoint.io import headers as files

@contextlib.contextmanager
def no_more_memory():
    resource.setrlimit(resource.RLIMIT_DATA, (1 << 12, resource.RLIM_INFINITY))  # far below what is used
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

def full_at_tensor(number):
    original, asked = files._memory, itertools.count()
    def memory(nbytes):
        if nbytes < 1 << 20 or next(asked) != number:
            return original(nbytes)
        with no_more_memory():
            return original(nbytes)
    def patch():
        files._memory = memory
    return patch

def full_at_block_1():
    original = blocks.BlockCalibration._states
    def states(self, number, kind, hidden):
        if number == 2:
            with no_more_memory():
                torch.empty(64 << 20, dtype=torch.uint8)
        return original(self, number, kind, hidden)
    blocks.BlockCalibration._states = states

small, calibrates = sys.argv[3:]
fp4.quantize(small, f"{out}-warm", "nvfp4", "gptq", samples=2, seq_len=16, device="cpu")  # loads what is loaded late
for number in (0, 4, 8):
    attempt(full_at_tensor(number))
if calibrates == "True":
    attempt(full_at_block_1)
attempt(lambda: None)
"""

DISK = """
from fp4.pipeline import job
job.require_room = lambda out, needed: None  # others may fill the disk after it was looked at
disk, kept = sys.argv[3:]
mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", disk], capture_output=True, text=True)
if mounted.returncode:
    print(json.dumps({"skip": mounted.stderr.strip()}))
    sys.exit()
for pages in range(2, 1000, 12):
    subprocess.run(["mount", "-o", f"remount,size={4 * pages}k", disk], check=True)
    if not attempt(lambda: None):
        break
subprocess.run(["cp", "-r", str(out), kept], check=True)
"""

CALIBRATED = ["--samples", "3", "--seq-len", "32", "--device", "cpu"]


def lines_of(command: list[str]) -> list[dict[str, Any]]:
    # What is large is asked of the system and goes back to it: a limit holds for it, whatever was freed before.
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    if command[0] == "unshare" and done.stderr.startswith("unshare:"):
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if "skip" in lines[0]:
        pytest.skip(lines[0]["skip"])
    return lines


def arguments_of(model: Path, out: Path, scheme: str, method: str, text: Path) -> str:
    calibrated = ["--data", str(text), *CALIBRATED] if scheme == "nvfp4" else []
    return json.dumps([str(model), str(out), "--scheme", scheme, "--method", method, *calibrated])


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def quantize_at_once(model: Path, out: Path, scheme: str, method: str, text: Path) -> bytes:
    fp4.quantize(model, out, scheme, method, text, samples=3, seq_len=32, device="cpu")
    return weights(out)


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "method"), [("nvfp4a16", "rtn"), ("nvfp4", "rtn"), ("nvfp4", "gptq")])
def test_no_more_memory(scheme: str, method: str, tmp_path: Path) -> None:
    shape = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 2}
    model, small = save_small("llama", tmp_path / "model", **shape), save_small("llama", tmp_path / "small")
    out, text = tmp_path / "out", save_text(tmp_path)
    given = [arguments_of(model, out, scheme, method, text), str(out), str(small), str(scheme == "nvfp4")]
    *failed, last = lines_of([sys.executable, "-c", ATTEMPTS + MEMORY, *given])
    assert len(failed) == (4 if scheme == "nvfp4" else 3)
    for line in failed:
        assert line["code"] == 3, line
        assert "out of memory" in line["said"]
        kept = "what is finished is kept in" if line["left"] else "nothing was finished yet"
        assert f"fewer samples; {kept}" in line["said"]
        assert not line["out"]
        assert not line["broken"]
    if scheme == "nvfp4":
        assert "block-00000.json" in failed[-1]["left"]
        assert "block-00001.json" not in failed[-1]["left"]
    assert (last["code"], last["out"], last["left"]) == (0, True, [])
    assert weights(out) == quantize_at_once(model, tmp_path / "whole", scheme, method, text)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="there is no unshare, for mounts of one's own")
@pytest.mark.parametrize(("scheme", "method"), [("nvfp4a16", "rtn"), ("nvfp4", "gptq")])
def test_no_more_disk(scheme: str, method: str, tmp_path: Path) -> None:
    """The disk is larger at every attempt, until the job is done: so it is full at many moments of it."""
    model, text, disk = save_small("llama", tmp_path / "model"), save_text(tmp_path), tmp_path / "disk"
    disk.mkdir()
    given = [arguments_of(model, disk / "out", scheme, method, text), str(disk / "out"), str(disk)]
    command = ["unshare", "-rm", sys.executable, "-c", ATTEMPTS + DISK, *given, str(tmp_path / "out")]
    *failed, last = lines_of(command)
    assert len(failed) > 2
    for line in failed:
        assert line["code"] == 3, line
        assert "is full; make room" in line["said"]
        assert not line["out"]
        assert not line["broken"]
    if method == "gptq":
        assert any("block-00000.json" in line["left"] for line in failed)
    assert (last["code"], last["out"], last["left"]) == (0, True, [])
    assert weights(tmp_path / "out") == quantize_at_once(model, tmp_path / "whole", scheme, method, text)
