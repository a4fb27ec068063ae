"""The time that a job is said to take: what it grows with, whatever this machine's speed is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jobs import planned
from small_models import save_small, save_text

from fp4.checkpoint.io.headers import Checkpoint
from fp4.methods import METHODS, Block
from fp4.methods.autoround import AutoRoundOptions
from fp4.methods.gptq import GPTQOptions
from fp4.pipeline import duration
from fp4.scheme import SCHEMES


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


# Of each of three blocks: rows and columns of q, k, v, o, gate, up, down; k and v read what q does, up what gate does.
SHAPES = [(128, 128), (64, 128), (64, 128), (128, 128), (256, 128), (256, 128), (128, 256)]
WEIGHTS = 3 * sum(rows * columns for rows, columns in SHAPES)
# A sweep over all columns of a layer, and for each input its second moments and their factorisation.
SWEEP = 3 * sum(rows * columns**2 for rows, columns in SHAPES)
MOMENTS = 3 * sum(256 * columns**2 + columns**3 for columns in (128, 128, 128, 256))
STEP = 3 * 2 * 1024 * WEIGHTS  # forward, and backward to inputs and weights
PASS = 2 * 256 * WEIGHTS  # of four samples of 64 tokens


@pytest.mark.parametrize(
    ("method", "options", "products"),
    [
        ("rtn", {}, (3 + 1) * PASS),
        ("gptq", {}, (2.5 + 1) * PASS + SWEEP + MOMENTS),
        ("best", {}, (2.5 + 1) * PASS + 5 * SWEEP + MOMENTS),
        ("autoround", {"iters": 10}, (3 + 2) * PASS + 10 * STEP),  # the original prefix is computed as well
        ("autoround", {"iters": 0}, (3 + 1) * PASS),
    ],
)
def test_time_is_that_of_all_products_and_of_copying_twice(
    method: str, options: dict[str, int], products: float, model: Path, rates: None
) -> None:
    """What is beside products takes three tenths of them."""
    written = planned(model, "nvfp4", method, save_text(model), device="cpu").needs.written
    assert seconds(model, method, options=options) == pytest.approx((1.3 * products + 2 * written) / 1e9)


def test_what_a_method_takes_beside_products_counts(model: Path, rates: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By scheme, and nothing for FP8."""
    before = seconds(model, overrides=["k_proj=nvfp4a16", "v_proj=fp8_dynamic"])
    times = {"fp4": 1e-3, "model": 7e-3}
    monkeypatch.setattr(duration, "_method_time", lambda method, options, scheme, *more: times[scheme.activations])
    small = 3 * 64 * 128
    expected = 1e-3 * (WEIGHTS - 2 * small) + 7e-3 * small
    assert seconds(model, overrides=["k_proj=nvfp4a16", "v_proj=fp8_dynamic"]) - before == pytest.approx(expected)


def test_streaming_takes_the_rounding_of_every_scheme_and_copying(
    model: Path, rates: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {"nvfp4": 1e-3, "mxfp4": 7e-3}
    monkeypatch.setattr(duration, "_rounding_time", lambda scheme: times[scheme.format.name])
    small, overrides = 3 * 64 * 128, ["k_proj=mxfp4a16"]
    written = planned(model, "nvfp4a16", "rtn", overrides=overrides).needs.written
    expected = 1e-3 * (WEIGHTS - small) + 7e-3 * small + written / 1e9
    assert seconds(model, "rtn", "nvfp4a16", overrides=overrides) == pytest.approx(expected)


# --- rates, by a clock that shows what it is told to


class Clock:
    """Stands for ``time``: every interval between two looks lasts as long as the next entry says."""

    def __init__(self, *intervals: float) -> None:
        self.now, self.left, self.looks = 0.0, list(intervals), 0

    def perf_counter(self) -> float:
        if self.looks % 2:
            self.now += self.left.pop(0)
        self.looks += 1
        return self.now


def test_a_method_is_timed_on_one_layer_without_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first run of a minute, then two of four and of three seconds: the faster counts."""
    seen: list[tuple[Block, Any]] = []

    def run(block: Block, options: Any) -> dict[str, Any]:
        seen.append((block, options))
        return {}

    method = dataclasses.replace(METHODS["autoround"], run=run)
    options, scheme = AutoRoundOptions(iters=20), SCHEMES["nvfp4"].scheme
    steps = 2 * 3 * 1024 * 1024 * 512 + 4 * 3 * 2 * 1024 * 1024 * 512  # three passes, and four steps
    for share, left in ((0.5, 1.5), (2.0, 0.0)):  # of the time that the products take; none is left in the second case
        monkeypatch.setattr(duration, "time", Clock(60.0, 4.0, 3.0))
        rate = steps / (3.0 * share)
        found = duration._method_time(method, options, scheme, torch.device("cpu"), rate)
        assert found == pytest.approx(20 / 4 * left / (1024 * 512))
    block, few = seen[-1]
    assert len(seen) == 2 * 3
    assert few == AutoRoundOptions(iters=4)
    assert block.layers == {"0": scheme}
    assert block.linear("0").weight.shape == (1024, 512)
    (hidden,), (original,) = block.inputs, block.originals
    assert hidden.shape == original.shape == (1, 1024, 512)
    assert torch.equal(block.run(hidden, 0), block.module(hidden))
    monkeypatch.setattr(duration, "time", Clock(60.0, 4.0, 3.0))
    method = dataclasses.replace(METHODS["gptq"], run=run)
    # Of GPTQ the passes, the sweep, the second moments and their factorisation; they take one second of the three.
    products = 5 * 1024 * 1024 * 512 + 1024 * 512**2 + 1024 * 512**2 + 512**3
    found = duration._method_time(method, GPTQOptions(), scheme, torch.device("cpu"), products)
    assert found == pytest.approx(2.0 / (1024 * 512))


def test_rounding_is_timed_without_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    rotations: list[str] = []
    monkeypatch.setattr(duration, "time", Clock(5.0, 3.0, 4.0))
    monkeypatch.setattr(duration, "round_to_nearest", lambda weight, scheme: rotations.append(scheme.rotation))
    scheme = dataclasses.replace(SCHEMES["mxfp4"].scheme, rotation="hadamard", group_size=64)
    assert duration._rounding_time(scheme) == pytest.approx(3.0 / (1024 * 512))
    assert rotations == ["identity"] * 3


def test_copying_is_as_fast_as_reading(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor, an embedding of 320 tokens, is read in two seconds, or the first 1000 bytes of it."""
    checkpoint = Checkpoint.open(model)
    assert max(info.nbytes for info in checkpoint.tensors.values()) == 320 * 128 * 2
    stored = 2 * (WEIGHTS + 2 * 320 * 128 + 7 * 128)
    for limit, read in ((32 << 20, 320 * 128 * 2), (1000, 1000)):
        monkeypatch.setattr(duration, "time", Clock(2.0))
        monkeypatch.setattr(duration, "_READ", limit)
        assert duration._copying(checkpoint, 12345) == pytest.approx((stored + 12345) * 2.0 / read)


def test_operations_are_counted_for_a_tenth_of_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks of the clock at 0, 0.04, 0.08 and 0.12 seconds, after which two products are divided by 0.16."""
    looks = iter([0.0, 0.04, 0.08, 0.12, 0.16])
    monkeypatch.setattr(duration, "time", SimpleNamespace(perf_counter=lambda: next(looks)))
    assert duration._flops(torch.device("cpu")) == pytest.approx(2 * 2 * 1024**3 / 0.16)


@pytest.mark.parametrize(("method", "scheme"), [("rtn", "nvfp4a16"), ("gptq", "nvfp4"), ("autoround", "mxfp4")])
def test_rates_of_this_machine_are_measured(method: str, scheme: str, model: Path) -> None:
    assert 0 < seconds(model, method, scheme) < 3600
