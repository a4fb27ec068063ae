"""Killed at any moment, the same command goes on and writes the same bytes."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from small_models import save_small, save_text

import fp4
from fp4.checkpoint import LayerScheme
from fp4.numerics.formats import NVFP4
from fp4.pipeline.calibrate import _scheme
from fp4.pipeline.plan import PlannedLayer
from fp4.scheme import SCHEMES

# Forks once a kill, before torch has threads. A child dies at its n-th audited event (opening, renaming, removing a
# file, and much else), as if by kill -9.
DRIVER = """
import json, os, signal, sys
import fp4
from transformers import AutoTokenizer

options, kills = json.loads(sys.argv[1]), json.loads(sys.argv[2])

def attempt(at):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate"):
            seen += 1
            if at is not None and seen == at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    status = 1
    try:
        fp4.quantize(**options)
        status = 0
    except BaseException as error:
        print(repr(error), file=sys.stderr)
    finally:
        if at is None:
            print(json.dumps({"events": seen}), flush=True)
        os._exit(status)

outcomes = []
for at in kills:
    if not os.path.exists(options["out"]):
        outcomes.append(attempt(at))
print(json.dumps({"killed": outcomes.count(9), "last": 0 if os.path.exists(options["out"]) else attempt(None)}))
"""


def drive(options: dict[str, object], kills: list[int]) -> list[dict[str, object]]:
    command = [sys.executable, "-c", DRIVER, json.dumps(options), json.dumps(kills)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines[-1]["last"] == 0, done.stderr
    return lines


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix == ".safetensors"}


@pytest.mark.parametrize(
    ("scheme", "method"), [("nvfp4a16", "rtn"), ("nvfp4", "gptq"), ("mxfp4", "best"), ("nvfp4", "autoround")]
)
def test_killed_at_random_points(scheme: str, method: str, tmp_path: Path) -> None:
    model = save_small("llama", tmp_path / "model")
    text = save_text(tmp_path)
    options: dict[str, object] = {
        "model": str(model), "scheme": scheme, "method": method, "data": str(text), "samples": 3, "seq_len": 32,
        "device": "cpu", "options": {"iters": 3} if method == "autoround" else None,
    }  # fmt: skip
    whole = tmp_path / "whole"
    events = drive(options | {"out": str(whole)}, [])[0]["events"]
    assert isinstance(events, int)
    out = tmp_path / "out"
    draw = random.Random(scheme + method)
    # Early ones, which leave little behind, and late ones, up to the last rename.
    points = sorted(draw.randrange(1, events // 4) for _ in range(4)) + [draw.randrange(1, events) for _ in range(6)]
    lines = drive(options | {"out": str(out)}, points)
    assert lines[-1]["killed"]
    assert weights(out) == weights(whole)
    assert (out / "config.json").read_bytes() == (whole / "config.json").read_bytes()
    assert not (tmp_path / "out.partial").exists()


def test_finished_blocks_are_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fp4.pipeline.calibrate import BlockCalibration

    model, text = save_small("llama", tmp_path / "model"), save_text(tmp_path)
    computed: list[int] = []
    original = BlockCalibration._quantize

    def interrupted(self: BlockCalibration, number: int, *arguments: object) -> object:
        computed.append(number)
        if number == 2 and computed.count(2) == 1:
            raise KeyboardInterrupt
        return original(self, number, *arguments)

    monkeypatch.setattr(BlockCalibration, "_quantize", interrupted)
    arguments = {"scheme": "nvfp4", "method": "gptq", "data": text, "samples": 2, "seq_len": 32, "device": "cpu"}
    with pytest.raises(KeyboardInterrupt):
        fp4.quantize(model, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
    fp4.quantize(model, tmp_path / "out", **arguments)
    assert computed == [0, 1, 2, 2]


@pytest.mark.parametrize("method", ["rtn", "gptq", "autoround", "best"])
def test_same_seed_same_bytes(method: str, tmp_path: Path) -> None:
    model, text = save_small("qwen2", tmp_path / "model"), save_text(tmp_path)
    options = {"iters": 3} if method == "autoround" else None
    for name in ("a", "b"):
        fp4.quantize(
            model, tmp_path / name, "nvfp4", method, text, samples=2, seq_len=32, seed=3, device="cpu", options=options
        )
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_only_one_process_works_in_a_folder(tmp_path: Path) -> None:
    from fp4.checkpoint.io.staging import Staging

    first = Staging(tmp_path / "out", {"a": 1}, False)
    with pytest.raises(ValueError, match="another process is at work"):
        Staging(tmp_path / "out", {"a": 1}, False)
    first.release()
    assert Staging(tmp_path / "out", {"a": 1}, False).resumed


def test_notes_of_earlier_versions_are_understood() -> None:
    """They end with the size of blocks."""
    name, scheme = "model.layers.0.mlp.up_proj", SCHEMES["nvfp4a8"].scheme
    layer = PlannedLayer(name, "nvfp4a8", scheme, 0, (32, 64), name, f"{name}.weight", (f"{name}.weight",))
    expected = LayerScheme(NVFP4.wide(32), "fp8", "identity", 0)
    assert _scheme(layer, ["fp8", "identity", 0, 32]) == _scheme(layer, ["fp8", "identity", 0]) == expected
