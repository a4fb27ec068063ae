"""The time that a job is said to take: what it grows with, whatever this machine's speed is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jobs import planned
from small_models import save_small, save_text

from fp4.pipeline import duration


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small("llama", tmp_path_factory.mktemp("model"), hidden_size=128, intermediate_size=256)


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of a billion operations and a billion bytes a second, where nothing but products and copies counts."""
    monkeypatch.setattr(duration, "_flops", lambda device: 1e9)
    monkeypatch.setattr(duration, "_method_time", lambda *arguments: 0.0)
    monkeypatch.setattr(duration, "_copying", lambda checkpoint, written: written / 1e9)


def seconds(model: Path, method: str = "gptq", scheme: str = "nvfp4", **options: Any) -> float:
    settings: dict[str, Any] = {"samples": 4, "seq_len": 64, "device": "cpu"}
    return planned(model, scheme, method, save_text(model), **(settings | options)).duration()


def test_time_is_that_of_the_whole_job(model: Path, rates: None) -> None:
    weights = 3 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256)
    forward = 2 * 256 * weights / 1e9
    found = {method: seconds(model, method) for method in ("rtn", "gptq", "best", "autoround")}
    assert found["rtn"] > 2 * forward
    assert found["rtn"] < found["gptq"] < found["best"] < found["autoround"]


def test_time_grows_with_tokens_and_steps(model: Path, rates: None) -> None:
    assert seconds(model, samples=8) > 1.5 * seconds(model)
    steps = [seconds(model, "autoround", options={"iters": iters}) for iters in (10, 20)]
    assert 1.5 < steps[1] / steps[0] < 2


def test_what_a_method_takes_beside_products_counts(model: Path, rates: None, monkeypatch: pytest.MonkeyPatch) -> None:
    before = seconds(model)
    monkeypatch.setattr(duration, "_method_time", lambda *arguments: 1e-3)
    weights = 3 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256)
    assert seconds(model) - before == pytest.approx(1e-3 * weights)


@pytest.mark.parametrize(("method", "scheme"), [("rtn", "nvfp4a16"), ("gptq", "nvfp4"), ("autoround", "mxfp4")])
def test_rates_of_this_machine_are_measured(method: str, scheme: str, model: Path) -> None:
    assert 0 < seconds(model, method, scheme) < 3600
