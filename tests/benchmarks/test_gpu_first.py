"""The first run on a GPU, tried without one: every check is written down, whatever a kernel does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_first  # noqa: E402  (of the folder above)

from fp4.backends import BACKENDS  # noqa: E402

CPU = torch.device("cpu")


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_all_steps(tmp_path: Path) -> None:
    results = tmp_path / "first.jsonl"
    command = [sys.executable, str(BENCHMARKS / "gpu_first.py"), "--device", "cpu", "--results", str(results)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    about, *lines = lines_of(results)
    assert about["backends"]["reference"] == "available"
    assert {line["step"] for line in lines} == set(gpu_first.STEPS)
    assert {line["outcome"] for line in lines} == {"ok", "not tried: there is no GPU"}
    assert "0 of" in results.with_suffix(".md").read_text()


@pytest.mark.parametrize("step", ["operators", "numerics", "repeat", "small_shapes"])
def test_checks_find_what_is_wrong(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend whose results change from call to call and are off by a hundredth."""
    only = next(name for name, backend in BACKENDS.items() if not backend.unavailable() and name != "scaled_mm")
    checks = list(gpu_first.CHECKS[step](CPU, gpu_first.SIZES["cpu"], only))
    assert len({name for name, _ in checks}) == len(checks) >= 4
    right, count = gpu_first.Case.run, 0

    def drifting(self: gpu_first.Case, x: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return right(self, x) * (1 + count / 64)

    with torch.inference_mode():
        assert [find() for _, find in checks] == [None] * len(checks)
        monkeypatch.setattr(gpu_first.Case, "run", drifting)
        found = [find() for name, find in checks if "experts" not in name and "quantized by" not in name]
    assert found
    assert all(found)


def test_a_fault_is_written_and_the_other_checks_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> str:
        raise RuntimeError("an illegal memory access")

    def checks(*_: object) -> Iterator[tuple[str, Any]]:
        yield "first", fails
        yield "second", lambda: None
        yield "third", lambda: "3 of 4 results"
        yield "fourth", lambda: "not tried: no GPU"
        yield "fifth", lambda: "measured: 1 us"

    results = tmp_path / "first.jsonl"
    results.write_text('{"hardware": "none"}\n')
    monkeypatch.setitem(gpu_first.CHECKS, "operators", checks)
    assert gpu_first.run_step("operators", CPU, "reference", results) == gpu_first.FAULTS
    outcomes = ["RuntimeError: an illegal memory access", "ok", "3 of 4 results", "not tried: no GPU", "measured: 1 us"]
    assert [line["outcome"] for line in lines_of(results)[1:]] == outcomes
    assert "2 of 5 checks found a fault" in gpu_first.table_of(results)


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("import os; os.abort()", "ended with -6"),
        ("raise ValueError", "ended with 1"),
        ("while True: pass", "did not end"),
    ],
)
def test_a_process_that_dies_or_hangs_costs_one_step(
    code: str, outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "first.jsonl"
    results.write_text('{"hardware": "none"}\n')
    monkeypatch.setattr(gpu_first, "itself", lambda *_: [sys.executable, "-c", code])
    monkeypatch.setitem(gpu_first.STEPS, "numerics", 2)
    assert not gpu_first.run("numerics", CPU, "triton", results)
    (line,) = lines_of(results)[1:]
    assert line["check"] == "triton, the process"
    assert line["outcome"].startswith(outcome)
    assert outcome in results.with_suffix(".md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_one_sentence() -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu_first.py")]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("nothing to measure: ")
