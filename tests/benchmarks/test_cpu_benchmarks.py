"""The CPU benchmarks without measuring: readings that cannot be true end a run, and like is compared with like."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import cpu_experts  # noqa: E402  (of the folder above)
import cpu_fp8  # noqa: E402
import cpu_generate  # noqa: E402
import cpu_linear  # noqa: E402
import cpu_summary  # noqa: E402
import default_scheme  # noqa: E402
import measure  # noqa: E402

GB = 10**9


def linear_case(read_gbs: float, nvfp4: float = 1.0, m: int = 1) -> dict[str, Any]:
    """1 GB of packed weights, which NVFP4 takes ``nvfp4`` seconds for and all others 10."""
    seconds = dict.fromkeys(
        [f"fp4 {fmt} {act}" for fmt in ("nvfp4", "mxfp4") for act in ("w4a16", "w4a4")] + ["torch bf16", "torch fp32"],
        10.0,
    )
    seconds |= {"read": 1.0, "fp4 nvfp4 w4a16": nvfp4}
    return {
        "n": 4, "k": 8, "m": m, "seconds": seconds, "bytes": {"nvfp4": GB, "mxfp4": GB}, "read_gbs": read_gbs,
    }  # fmt: skip


def test_readings_that_agree_pass() -> None:
    measure.refuse_broken([("a", 30.0), ("b", 22.6)], {})
    measure.refuse_broken([], {})
    cpu_linear.check([linear_case(1.01), linear_case(1.3, m=8)], [])


@pytest.mark.parametrize(
    ("readings", "above_one", "says"),
    [
        ({"a": 30.0, "b": 22.4}, {}, "read at 22.4 GB/s beside b and at 30.0 beside a"),
        ({"a": 36.0, "b": 67.0, "c": 40.0}, {}, "expected at most a third"),
        ({"a": 30.0}, {"fp4 x": 1.01, "fp4 y": 1.19}, "fp4 y read 1.19 times as fast as memory"),
    ],
)
def test_readings_that_cannot_be_true_are_an_error(
    readings: dict[str, float], above_one: dict[str, float], says: str
) -> None:
    with pytest.raises(SystemExit, match="broken measurement: ") as error:
        measure.refuse_broken(list(readings.items()), above_one)
    assert says in str(error.value)
    assert error.value.code  # a text: the process ends with 1


def test_a_share_is_above_one_where_more_is_read_than_memory_gives() -> None:
    # 2 GB in 1 s of 1.9 GB/s; 1 GB in 1 s of it.
    assert measure.shares_above_one({"a": 2 * GB, "b": GB}, {"a": 1.0, "b": 1.0, "c": 0.0}, 1.9) == {
        "a": pytest.approx(2 / 1.9)
    }


@pytest.mark.parametrize(
    ("linear", "quantization"),
    [
        ([linear_case(1.0, nvfp4=0.9)], []),
        ([linear_case(30.0), linear_case(41.0)], []),
        # 2 bytes of each of 32 weights in 1 s of 60 bytes/s.
        ([], [{"n": 4, "k": 8, "seconds": {"read": 1.0, "nvfp4": 1.0, "mxfp4": 2.0}, "read_gbs": 60e-9}]),
    ],
)
def test_linear_refuses_it(linear: list[dict[str, Any]], quantization: list[dict[str, Any]]) -> None:
    with pytest.raises(SystemExit, match="broken measurement"):
        cpu_linear.check(linear, quantization)


def test_ordinary_and_large_pages_are_not_compared() -> None:
    ordinary = {"n": 4, "k": 8, "seconds": {"read": 1.0, "nvfp4": 100.0}, "read_gbs": 1.2}
    cpu_linear.check([linear_case(2.0)], [ordinary])


def test_a_broken_run_saves_nothing_and_ends_with_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cases = iter([linear_case(30.0), linear_case(67.0)])
    monkeypatch.setattr(cpu_linear, "isa", lambda: "avx2")
    monkeypatch.setattr(cpu_linear, "measure_case", lambda *arguments: next(cases))
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    options = ["--part", "linear", "--shapes", "4x8", "--rows", "1", "1", "--save", "run"]
    monkeypatch.setattr(sys, "argv", ["cpu_linear.py", *options])
    with pytest.raises(SystemExit, match=r"30.0 GB/s .* 67.0"):
        cpu_linear.main()
    assert not list(tmp_path.iterdir())
    cases = iter([linear_case(30.0), linear_case(31.0)])
    cpu_linear.main()
    assert len(list(tmp_path.iterdir())) == 2


def test_fp8_and_experts_refuse_it() -> None:
    fp8 = {"n": 4, "k": 8, "m": 1, "bytes": GB, "read_gbs": 1.0}
    fp8["seconds"] = {"w8a16": 0.9, "w8a8": 2.0, "torch bf16": 1.0, "torch fp32": 1.0}
    with pytest.raises(SystemExit, match=r"w8a16, 4x8, M = 1 read 1\.11 times"):
        cpu_fp8.check([fp8])
    one_gb_a_second = cpu_experts.ELEMENTS * 4.5 / 8 / GB
    experts = {"tokens": 1, "seconds": {"read": 1.0, "fp4 nvfp4 w4a4": one_gb_a_second}, "read_gbs": 1.001}
    cpu_experts.check([experts])
    with pytest.raises(SystemExit, match=r"fp4 nvfp4 w4a4, 1 token read 1\.11 times"):
        cpu_experts.check([experts | {"read_gbs": 0.9}])
    with pytest.raises(SystemExit, match="beside 256 tokens"):
        cpu_experts.check([experts, experts | {"tokens": 256, "read_gbs": 2.0}])


def shaped(**seconds: float) -> dict[str, Any]:
    named = {name.replace("_", " "): each for name, each in seconds.items()}
    return {"seconds": named, "bytes": {"fp4 nvfp4": GB}, "readings": [["a", 5.0], ["b", 6.0]], "read_gbs": 6.0}


def test_decoding_compares_like_with_like() -> None:
    case = shaped(fp4_nvfp4=1.0, fp4_nvfp4_compiled=0.5, bf16=3.0, bf16_compiled=1.0, fp32=6.0)
    cpu_generate.check(case)
    ratios = list(cpu_summary.decoding_ratios(case["seconds"]))
    of = {(name.rsplit(", ")[-1], against): ratio for name, against, _, ratio in ratios}
    assert of["eager", "x bf16, eager"] == 3.0
    assert of["compiled", "x bf16, compiled"] == 2.0  # not 6, which compiled beside eager would be
    assert of["eager", "x fp32, eager"] == 6.0
    assert of["compiled", "x fp32, compiled"] is None
    assert "2.00 (>= 3: 33% short) | not measured" in cpu_generate.shaped_table(case)
    with pytest.raises(SystemExit, match=r"fp4 nvfp4 read 1\.67 times"):
        cpu_generate.check(shaped(fp4_nvfp4=0.1))


def test_compiled_models_have_compiled_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    def decoders_of(decoders: Mapping[str, object], turns: int, tokens: int) -> dict[str, float]:
        return dict.fromkeys(decoders, 1.0)

    config = cpu_generate.shaped_config(1)
    config.update({"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4})
    config.update({"num_key_value_heads": 4, "head_dim": 16})
    monkeypatch.setattr(cpu_generate, "shaped_config", lambda layers: config)
    monkeypatch.setattr(cpu_generate, "take_turns", decoders_of)
    monkeypatch.setattr(cpu_generate, "read_bandwidth", lambda: 10.0)
    monkeypatch.setattr(cpu_generate.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(cpu_generate, "quantized", lambda model, fmt, head=False: copy.deepcopy(model))
    case = cpu_generate.measure_shaped(["nvfp4"], True, 1, 1, 2, Path())
    eager = {"fp4 nvfp4", "fp4 nvfp4, head too", "bf16", "fp32"}
    assert set(case["seconds"]) == eager | {name + " compiled" for name in eager}
    # Of the parameters all but the embedding.
    assert case["bytes"]["bf16 compiled"] == 2 * (64 * (128 + 64 * (4 + 3)) + 3 * 64)


def test_experts_are_compared_with_the_fastest_of_both_dtypes() -> None:
    seconds = {"read": 1.0, "fp4 nvfp4": 1.0, "bf16 eager": 6.0, "fp32 eager": 4.0, "fp32 grouped_mm": 5.0}
    assert cpu_experts.fastest_stock(seconds) == ("bf16, fp32", 4.0)
    assert cpu_experts.fastest_stock({"fp4 nvfp4": 1.0, "bf16 eager": 6.0}) == ("bf16", 6.0)
    (ratio,) = cpu_summary.experts_ratios({"tokens": 1, "seconds": seconds})
    assert ratio == ("experts, 1 token, eager", "x fastest of bf16, fp32", 3.0, 4.0)


def test_the_summary_has_a_table_for_each_kind_of_cpu_and_refuses_broken_results() -> None:
    def result(hardware: str, read_gbs: float | None) -> dict[str, Any]:
        case = linear_case(0.0) | {"read_gbs": read_gbs}
        return {"machine": {"hardware": hardware, "date": "2026-11-22"}, "linear": [case]}

    printed = cpu_summary.summaries([result("EPYC (avx2)", 1.25), result("EPYC (avx512f)", None)])
    first, second = printed.split("## EPYC (avx512f)")
    assert "EPYC (avx2)" in first
    assert "0.08 to 0.80" in first
    assert "share of read bandwidth | 0.85     | not measured" in second
    with pytest.raises(SystemExit, match="broken measurement"):
        cpu_summary.summaries([result("EPYC (avx2)", 0.9)])


def test_the_results_that_are_kept_are_not_broken() -> None:
    printed = cpu_summary.summaries([json.loads(file.read_text()) for file in cpu_summary.FILES])
    assert (measure.RESULTS / "cpu_summary.md").read_text() == f"# CPU targets\n\n{printed}"


def test_the_kind_of_cpu_is_read_from_its_flags() -> None:
    assert measure.features("flags\t\t: fpu avx2 avx512f avx512_bf16 sse") == "avx2, avx512f, avx512_bf16"
    assert measure.features("Features\t: fp asimd bf16") == "asimd, bf16"
    assert measure.features("model name: x") == ""


def test_defaults_are_chosen_on_one_text_and_reported_on_another(capsys: pytest.CaptureFixture[str]) -> None:
    """What is best on the text that is reported is not looked at."""
    asked: list[tuple[str, str, str]] = []

    class Model:
        def perplexity(self, scheme: Any, text: str, windows: int) -> float:
            asked.append((text, scheme.weight_rule, scheme.activations))
            best = "abs_max" if text == "chosen.txt" else "mse"
            return 10.0 if scheme.weight_rule == best else 20.0

    chosen = default_scheme.search([Model()], default_scheme.NVFP4, ("chosen.txt", "reported.txt"), 1, 2, 2, 3)
    assert [scheme.weight_rule for scheme in chosen] == ["abs_max", "abs_max"]
    assert [scheme.activations for scheme in chosen] == ["fp4", "model"]
    first = next(i for i, (text, _, _) in enumerate(asked) if text == "reported.txt")
    assert {text for text, _, _ in asked[first:]} == {"reported.txt"}
    printed = capsys.readouterr().out
    assert "nvfp4, chosen, then fp4's defaults: 2 windows of reported.txt" in printed
    assert "| nvfp4 | none | mse | abs_max | 10.00 |" in printed.split("reported.txt")[1]


def test_fp4s_defaults_are_those_that_are_reported() -> None:
    w4a4, weight_only = default_scheme.defaults_of(default_scheme.MXFP4)
    assert (w4a4.weight_rule, w4a4.rotation, w4a4.group_size, w4a4.activation_rule) == ("mse", "hadamard", 64, "even")
    assert (weight_only.weight_rule, weight_only.rotation) == ("even", "identity")
    assert [s.activations for s in default_scheme.defaults_of(default_scheme.NVFP4)] == ["fp4", "model"]


def test_the_same_text_twice_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("the same")
    options = ["model", "--choose-on", str(tmp_path / "a.txt"), "--report-on", str(tmp_path / "b.txt")]
    monkeypatch.setattr(sys, "argv", ["default_scheme.py", *options])
    with pytest.raises(SystemExit):
        default_scheme.main()
    assert "hold the same text" in capsys.readouterr().err
