"""Killed at any moment, the same command goes on and writes the same bytes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from marks import sampled
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
import fp4.pipeline
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


@pytest.mark.slow
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


@pytest.mark.parametrize("method", sampled(["rtn", "gptq", "autoround", "best"], "rtn", "gptq"))
def test_same_seed_same_bytes(method: str, tmp_path: Path) -> None:
    model, text = save_small("qwen2", tmp_path / "model"), save_text(tmp_path)
    options = {"iters": 3} if method == "autoround" else None
    for name in ("a", "b"):
        fp4.quantize(
            model, tmp_path / name, "nvfp4", method, text, samples=2, seq_len=32, seed=3, device="cpu", options=options
        )
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


@pytest.mark.slow
def test_a_recipe_has_one_seed_for_samples_and_method(tmp_path: Path) -> None:
    model, text = save_small("qwen2", tmp_path / "model"), save_text(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text.read_text()[i:]}) + "\n" for i in range(8)))
    recipe = tmp_path / "recipe.yaml"
    amounts = "{seed: 7, max_samples: 4, max_seq_len: 32, min_token_length: 2}"
    recipe.write_text(f"datasets:\n  - {{path: rows.jsonl}}\ncalibration: {amounts}\n")
    options: dict[str, object] = {"scheme": "nvfp4", "method": "autoround", "data": recipe, "device": "cpu"}
    report = fp4.quantize(model, tmp_path / "a", **options, options={"iters": 2})
    assert report["seed"] == 7
    assert "drawn with seed 7 " in report["data"]["description"]
    card = (tmp_path / "a" / "README.md").read_text()
    assert "| seed | 7 |" in card
    fp4.quantize(model, tmp_path / "b", **options, options={"iters": 2}, seed=7)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert fp4.quantize(model, tmp_path / "c", **options, options={"iters": 2}, seed=8)["seed"] == 8


def test_only_one_process_works_in_a_folder(tmp_path: Path) -> None:
    from fp4.checkpoint.io.publish import Staging

    first = Staging(tmp_path / "out", {"a": 1}, False)
    with pytest.raises(ValueError, match="another process is at work"):
        Staging(tmp_path / "out", {"a": 1}, False)
    first.release()
    assert Staging(tmp_path / "out", {"a": 1}, False).resumed


@pytest.fixture
def calibrated(tmp_path: Path) -> dict[str, object]:
    """Arguments of a job of three blocks."""
    save_small("llama", tmp_path / "model")
    settings: dict[str, object] = {"scheme": "nvfp4", "method": "gptq", "data": save_text(tmp_path), "device": "cpu"}
    return {"model": tmp_path / "model", "samples": 2, "seq_len": 32, **settings}


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Ctrl-C when block ``number`` is quantized for the first time; returns the blocks that are quantized."""
    from fp4.pipeline.calibrate import BlockCalibration

    computed: list[int] = []
    original = BlockCalibration._quantize

    def interrupted(self: BlockCalibration, at: int, *arguments: object) -> object:
        computed.append(at)
        if at == number and computed.count(number) == 1:
            raise KeyboardInterrupt
        return original(self, at, *arguments)

    monkeypatch.setattr(BlockCalibration, "_quantize", interrupted)
    return computed


@pytest.mark.parametrize(
    "change",
    [
        {"skip": ["layers.2.mlp.up_proj"]},
        {"overrides": {"layers.2.mlp.up_proj": "fp8_dynamic"}},
    ],
)
def test_what_is_asked_of_blocks_to_come_may_change(
    change: dict[str, object], calibrated: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = stop_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt, match=r"what is finished is kept in .*; the same command goes on from there"):
        fp4.quantize(out=tmp_path / "out", **calibrated)  # type: ignore[arg-type]
    report = fp4.quantize(out=tmp_path / "out", **calibrated, **change)  # type: ignore[arg-type]
    assert computed == [0, 1, 2, 2]
    assert report.get("skip") == change.get("skip", [])
    fp4.quantize(out=tmp_path / "whole", **calibrated, **change)  # type: ignore[arg-type]
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert (tmp_path / "out/config.json").read_bytes() == (tmp_path / "whole/config.json").read_bytes()


@pytest.mark.parametrize(
    "change", [{"skip": ["layers.1.mlp.up_proj"]}, {"rule": "abs_max"}, {"options": {"damping": 0.1}}]
)
def test_what_was_asked_of_finished_blocks_may_not(
    change: dict[str, object], calibrated: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = stop_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        fp4.quantize(out=tmp_path / "out", **calibrated)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"another request \(it differs in {next(iter(change))}\)"):
        fp4.quantize(out=tmp_path / "out", **calibrated, **change)  # type: ignore[arg-type]
    fp4.quantize(out=tmp_path / "out", **calibrated)  # type: ignore[arg-type]
    assert computed == [0, 1, 2, 2]


def test_of_nothing_finished_nothing_is_kept(
    calibrated: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt, match="nothing was finished yet, so nothing is kept"):
        fp4.quantize(out=tmp_path / "out", **calibrated)  # type: ignore[arg-type]
    assert not (tmp_path / "out.partial").exists()


def test_shards_that_are_finished_stay_when_others_are_planned_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    from fp4.pipeline.stream import StreamedRounding

    loaded = AutoModelForCausalLM.from_pretrained(save_small("llama", tmp_path / "small"))
    loaded.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    layer = "model.layers.2.mlp.down_proj"
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())["weight_map"]
    shard = tmp_path / "model" / index[f"{layer}.weight"]
    tensors = load_file(shard)
    tensors[f"{layer}.weight"][0, 0] = float("nan")
    save_file(tensors, shard, {"format": "pt"})
    written: list[str] = []
    original = StreamedRounding._write

    def write(self: StreamedRounding, pool: object, shard: Path) -> object:
        written.append(shard.name)
        return original(self, pool, shard)  # type: ignore[arg-type]

    monkeypatch.setattr(StreamedRounding, "_write", write)
    call = {"model": tmp_path / "model", "out": tmp_path / "out", "scheme": "mxfp4a16", "method": "rtn"}
    with pytest.raises(ValueError, match=rf"skip=\['{layer}'\]; what is finished is kept"):
        fp4.quantize(**call)  # type: ignore[arg-type]
    finished = {path.name for path in (tmp_path / "out.partial").glob("*.safetensors")}
    assert finished
    written.clear()
    fp4.quantize(**call, skip=[layer])  # type: ignore[arg-type]
    assert finished.isdisjoint(written)
    assert len(finished) + len(written) == len(set(index.values()))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """A folder with unfinished work, and the call that it is the work of."""
    folder = tmp_path_factory.mktemp("interrupted")
    model, text = save_small("llama", folder / "model"), save_text(folder)
    call: dict[str, object] = {
        "model": model, "out": folder / "out", "scheme": "nvfp4", "method": "gptq", "data": text, "samples": 2,
        "seq_len": 32, "device": "cpu",
    }  # fmt: skip

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("calibrating", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fp4.quantize(**call, progress=stop)
    return folder, call


# What each option is changed to, and what the refusal calls it where that is another name.
CHANGES: dict[str, tuple[object, str]] = {
    "scheme": ("nvfp4a16", "scheme"),
    "method": ("best", "method"),
    "options": ({"damping": 0.1}, "options"),
    "format": ("fp_quant", "format"),
    "rotation": ("hadamard64", "rotation"),
    "rule": ("abs_max", "rule"),
    "skip": (["down_proj"], "skip"),
    "only": (["down_proj"], "only"),
    "overrides": (["down_proj=keep"], "overrides"),
    "seed": (1, "seed"),
    "samples": (3, "samples"),
    "seq_len": (16, "seq_len"),
    "experts": ("routed", "experts"),
    "data": (None, "data"),
}


@pytest.mark.parametrize("option", CHANGES)
def test_work_under_another_option_is_not_gone_on_with(
    option: str, interrupted: tuple[Path, dict[str, object]]
) -> None:
    _, call = interrupted
    value, named = CHANGES[option]
    with pytest.raises(ValueError, match=rf"another request \(it differs in (\w+, )*{named}(, \w+)*\)"):
        fp4.quantize(**call | {option: value})


@pytest.mark.parametrize(("file", "named"), [("model/model.safetensors", "checkpoint"), ("text.txt", "data")])
def test_work_on_another_file_of_the_same_name_and_size_is_not_gone_on_with(
    file: str, named: str, interrupted: tuple[Path, dict[str, object]]
) -> None:
    folder, call = interrupted
    status = (folder / file).stat()
    os.utime(folder / file, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))
    with pytest.raises(ValueError, match=rf"another request \(it differs in {named}\)"):
        fp4.quantize(**call)
    os.utime(folder / file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_work_under_another_configuration_is_not_gone_on_with(interrupted: tuple[Path, dict[str, object]]) -> None:
    """The refusal leaves the folder to a later call at once, even while the error is held."""
    folder, call = interrupted
    path = folder / "model" / "config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"rms_norm_eps": 0.01}))
    with pytest.raises(ValueError, match=r"another request \(it differs in checkpoint\)") as held:
        fp4.quantize(**call)
    path.write_text(before)
    fp4.quantize(**call)
    assert held
    assert not (folder / "out.partial").exists()


def test_notes_of_earlier_versions_are_understood() -> None:
    """They end with the size of blocks."""
    name, scheme = "model.layers.0.mlp.up_proj", SCHEMES["nvfp4a8"].scheme
    layer = PlannedLayer(name, "nvfp4a8", scheme, 0, (32, 64), name, f"{name}.weight", (f"{name}.weight",))
    expected = LayerScheme(NVFP4.wide(32), "fp8", "identity", 0)
    assert _scheme(layer, ["fp8", "identity", 0, 32]) == _scheme(layer, ["fp8", "identity", 0]) == expected
