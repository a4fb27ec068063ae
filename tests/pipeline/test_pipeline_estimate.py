"""Memory and disk that a job is said to need, and the memory that it may use: figures worked out from shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import planned
from moe import make_moe
from small_models import save_small, save_text

from fp4.pipeline import estimate, memory_budget
from fp4.pipeline.memory_budget import Memory

# A Llama of three blocks: q and o, k and v, gate and up and down; two norms; embedding, head and a last norm.
ATTENTION, MLP = 2 * 128 * 128 + 2 * 64 * 128, 3 * 256 * 128
WEIGHTS = 3 * (ATTENTION + MLP)
NORMS, TABLE = 2 * 128, 320 * 128
KEPT = 2 * (3 * NORMS + 2 * TABLE + 128)  # bytes, in bfloat16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small("llama", tmp_path_factory.mktemp("model"), hidden_size=128, intermediate_size=256)


def estimated(model: Path, scheme: str, method: str, **options: Any) -> estimate.Estimate:
    return planned(model, scheme, method, save_text(model), device="cpu", **options).needs


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def test_streaming_holds_the_largest_groups_of_all_threads_and_of_one_more(model: Path) -> None:
    """q, k and v share a global scale and are held together, as are gate and up; and three tenths are added.

    No more is held than twice the largest tensor, which is the embedding.
    """
    written = KEPT + WEIGHTS * 4.5 / 8
    found = estimated(model, "nvfp4a16", "rtn", skip=["*.mlp.*"])
    assert found.memory == int(1.3 * min(3 * 2 * (128 + 64 + 64) * 128, 2 * 2 * TABLE)) == int(1.3 * 2 * 2 * TABLE)
    assert found.bits_per_weight == 4.5
    # One block has only q, k and v left, so three threads hold that and two single layers of the others.
    only = ["*.0.self_attn.*", "*.1.self_attn.o_proj", "*.2.self_attn.k_proj"]
    held = 2 * ((128 + 64 + 64) * 128 + 128 * 128 + 128 * 128)
    assert held < 2 * 2 * TABLE
    assert estimated(model, "nvfp4a16", "rtn", only=only).memory == int(1.3 * held)
    found = estimated(model, "nvfp4a16", "rtn")
    assert (found.written, found.disk, found.tokens) == (written, written, 0)


def test_bits_are_the_mean_over_weights(model: Path) -> None:
    found = estimated(model, "nvfp4a16", "rtn", overrides=["*.mlp.*=mxfp4a16"])
    assert found.bits_per_weight == pytest.approx((4.5 * ATTENTION + 4.25 * MLP) / (ATTENTION + MLP))
    assert found.written == KEPT + 3 * (4.5 * ATTENTION + 4.25 * MLP) / 8
    assert estimated(model, "fp8_dynamic", "rtn").bits_per_weight == 8


@pytest.mark.parametrize(("method", "share", "kinds"), [("rtn", 1.5, 1), ("gptq", 1.7, 1), ("autoround", 10.5, 2)])
def test_calibration_holds_a_block_and_hidden_states(method: str, share: float, kinds: int, model: Path) -> None:
    """Hidden states before and after a block, from the quantized prefix and for AutoRound from the original one too.

    In memory they stay where they may take half of it; on disk there is the output twice, and they.
    """
    hidden = 4 * 16 * 128 * 4  # four samples of 16 tokens
    block = int(share * (4 * (ATTENTION + MLP + NORMS) + (1 << 25)))
    written = KEPT + WEIGHTS * 4.5 / 8
    few = {"samples": 4, "seq_len": 16}
    found = estimated(model, "nvfp4", method, **few)
    assert (found.tokens, found.written) == (64, written)
    assert found.memory == block + 2 * kinds * hidden
    assert found.disk == 2 * written + 2 * kinds * hidden
    assert estimated(model, "nvfp4", method, **few, max_memory={"cpu": 8 * hidden}).memory == found.memory
    tight = estimated(model, "nvfp4", method, **few, max_memory={"cpu": 8 * hidden - 2})
    assert (tight.memory, tight.disk) == (block, found.disk)


def test_the_largest_block_counts_and_recipes_have_a_default_amount(tmp_path: Path) -> None:
    make_moe("deepseek_v3").save_pretrained(tmp_path / "model")  # its first block is dense, the second has experts
    job = planned(tmp_path / "model", "nvfp4", "gptq", device="cpu")
    blocks = [sum(value.numel() for value in layer.parameters()) for layer in job.skeleton.decoder.layers]
    assert blocks[1] > blocks[0]
    found = job.needs
    assert found.tokens == 128 * 512
    assert found.memory == int(1.7 * (4 * blocks[1] + (1 << 25))) + 2 * found.tokens * 128 * 4


def test_outside_the_blocks_are_a_norm_and_the_rows_of_the_tokens(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = planned(model, "nvfp4", "rtn", save_text(model), device="cpu")
    for tokens, rows in ((8, 8), (100_000, 320)):
        assert estimate._outside(job.skeleton, tokens) == 4 * (128 + rows * 128)
    monkeypatch.setattr(estimate, "_outside", lambda skeleton, tokens: 10**9 + tokens)
    assert estimated(model, "nvfp4", "rtn", samples=4, seq_len=16).memory == 10**9 + 64


def test_stacks_of_experts_are_gathered_for_one_block(tmp_path: Path) -> None:
    """Codes of gate, up and down of eight experts, 128 by 128 each, beside what threads hold."""
    make_moe("gpt_oss").save_pretrained(tmp_path / "model")
    found = estimated(tmp_path / "model", "mxfp4a16", "rtn", format="mxfp4")
    held = 2 * 3 * 128 * 128  # three experts' matrices
    assert found.memory == int(1.3 * held) + 8 * 3 * 128 * 128 // 2


# --- limits


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_budget, "get_max_memory", lambda: {"cpu": 1000, 0: 500, 1: 700})


def test_four_fifths_of_what_is_free_may_be_used(free: None) -> None:
    assert Memory.of(None, "cpu") == Memory(torch.device("cpu"), 0, 800)
    assert Memory.of("cpu:2KiB", "cpu") == Memory.of({"CPU ": 2048}, "cpu") == Memory(torch.device("cpu"), 0, 2048)
    # The meta device stands for a GPU here: anything that is no CPU.
    assert Memory.of(None, "meta") == Memory(torch.device("meta"), 400, 800)
    assert Memory.of(" gpu: 1KB,cpu:3KB", "meta") == Memory(torch.device("meta"), 1000, 3000)
    assert Memory.of(None, "meta:1") == Memory(torch.device("meta:1"), 560, 800)


def test_hidden_states_may_take_half_of_what_computes() -> None:
    cpu, gpu = Memory(torch.device("cpu"), 16, 800), Memory(torch.device("meta"), 16, 800)
    assert (cpu.allowed, gpu.allowed) == (800, 16)
    assert [cpu.keeps(size) for size in (100, 101)] == [True, False]
    assert [gpu.keeps(size) for size in (2, 3)] == [True, False]


def test_blocks_compute_in_float32_on_a_cpu() -> None:
    assert Memory(torch.device("cpu"), 0, 8).compute_dtype(torch.bfloat16) == torch.float32
    assert Memory(torch.device("meta"), 8, 8).compute_dtype(torch.bfloat16) == torch.bfloat16


@pytest.mark.parametrize("asked", ["gpu", "cpu:", "cpu:many", {"disk": 5}, "cpu:1GiB,disk:5GiB"])
def test_other_limits_are_refused(asked: Any, free: None) -> None:
    with pytest.raises(ValueError, match="expected gpu or cpu and a size"):
        Memory.of(asked, "meta")


def test_devices_that_are_not_there_are_refused(free: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="device is 'warp', which cannot be used"):
        Memory.of(None, "warp")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match="max_memory names gpu, but this machine has none"):
        Memory.of("gpu:1GiB", "cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert Memory.of("gpu:1GiB", "cpu").gpu == 0
