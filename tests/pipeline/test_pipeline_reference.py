"""What the pipeline computes, writes and reports, against Transformers' own model with naive quantized layers in it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import naive_model as naive
import pytest
import torch
from comparing import packed_experts
from moe import make_moe
from safetensors.torch import load_file, save_file
from shards import assert_index_fits, sharded
from small_models import save_small, save_text, tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import fp4
from fp4.calibration.data import load_samples
from fp4.methods import METHODS, Block, LayerResult, Method
from fp4.pipeline import merge_files as assemble
from fp4.pipeline import stream as rounding

BIASES = {"attention_bias": True, "mlp_bias": True}
PARTS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three blocks whose layers all have biases, in bfloat16."""
    return save_small("llama", tmp_path_factory.mktemp("model"), **BIASES)


def dense_model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def batches(text: Path, samples: int, seq_len: int) -> list[Tensor]:
    """The samples as the pipeline runs them: at most 1024 tokens at once."""
    tokens = torch.stack(load_samples(text, tokenizer(), samples, seq_len).tokens)
    return list(tokens.split(1024 // seq_len))


def inputs_of(model: PreTrainedModel, block: int, ids: list[Tensor]) -> dict[str, list[Tensor]]:
    """What each layer of a block reads, batch by batch."""
    seen: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    hooks = [
        model.get_submodule(f"model.layers.{block}.{part}").register_forward_pre_hook(
            lambda module, args, part=part: seen[part].append(args[0])
        )
        for part in PARTS
    ]
    with torch.no_grad():
        for batch in ids:
            model(batch)
    for hook in hooks:
        hook.remove()
    return seen


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


@dataclass(frozen=True)
class Stored:
    """What a layer of a scheme makes of its input, and where the default checkpoint format has the scale for that.

    Attributes:
        input_scale: from the largest magnitude of a layer's input.
    """

    stored_input_scale: Callable[[dict[str, Tensor], str], float]
    input_scale: Callable[[float], float]
    read: Callable[[Tensor, float], Tensor]


STORED = {
    "nvfp4": Stored(
        lambda tensors, layer: 1 / float(tensors[f"{layer}.input_global_scale"]),
        naive.power_of_two_scale,
        naive.nvfp4,
    ),
    "nvfp4a8": Stored(
        lambda tensors, layer: float(tensors[f"{layer}.input_scale"]),
        lambda amax: float(torch.tensor(amax, dtype=torch.float32) / 448),
        naive.fp8,
    ),
}


@pytest.mark.parametrize("scheme", STORED)
def test_input_scales_and_errors_are_those_of_the_dense_block_behind_quantized_ones(
    scheme: str, model: Path, text: Path, tmp_path: Path
) -> None:
    """640 tokens in one batch, the first 512 of which are measured for the report."""
    how, ids = STORED[scheme], batches(text, 20, 32)
    report = fp4.quantize(model, tmp_path / "out", scheme, "rtn", text, samples=20, seq_len=32, device="cpu")
    rows = {row["name"]: row for row in report["layers"]}
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    reference, dense = dense_model(model), dense_model(model)
    moved = 0.0
    for block in range(3):
        seen, unquantized = inputs_of(reference, block, ids), inputs_of(dense, block, ids)
        for part in PARTS:
            layer = f"model.layers.{block}.{part}"
            scale = how.stored_input_scale(tensors, layer)
            assert scale == how.input_scale(max(float(x.abs().max()) for x in seen[part])), layer
            linear, weight = reference.get_submodule(layer), naive.stored_weight(tensors, layer)
            x = seen[part][0].flatten(0, 1)[:512]
            exact = x @ linear.weight.T
            error = distance(how.read(x, scale) @ weight.T, exact)
            assert rows[layer]["output_error"] == pytest.approx(error, rel=1e-5), layer
            other = unquantized[part][0].flatten(0, 1)[:512]
            from_dense = distance(how.read(other, scale) @ weight.T, other @ linear.weight.T)
            moved = max(moved, abs(from_dense / error - 1))
            naive.computes(linear, weight, lambda x, scale=scale: how.read(x, scale))
    assert moved > 1e-3, "the errors behind dense blocks are others, a hundred times further off than is allowed"


# --- what a method is given


@dataclass(frozen=True)
class SpyOptions:
    """Whether the method that notes what it is given asks for originals."""

    originals: bool = True


class Spy:
    """A method that notes what it is given, changes the block in ways that show, and rounds to nearest."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inputs: list[list[Tensor]] = []
        self.originals: list[list[Tensor]] = []
        method = Method(
            name="spy", run=self.run, options=SpyOptions, cost="nothing", needs_data=True, memory=2.0, passes=1,
            needs_originals=lambda options: options.originals,
        )  # fmt: skip
        monkeypatch.setitem(METHODS, "spy", method)

    def run(self, block: Block, options: SpyOptions) -> dict[str, LayerResult]:
        self.inputs.append([hidden.clone() for hidden in block.inputs])
        self.originals.append([hidden.clone() for hidden in block.originals])
        for name, parameter in block.module.named_parameters():
            if name.endswith(("layernorm.weight", "bias")):
                parameter.data.mul_(0.5)
        return METHODS["rtn"].run(block, METHODS["rtn"].options())


def test_a_method_sees_the_quantized_prefix_and_the_original_one(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Originals are the hidden states of the dense model, whatever a method did to blocks; inputs are those that the
    written checkpoint computes. 34 samples of 32 tokens are two batches."""
    spy, ids = Spy(monkeypatch), batches(text, 34, 32)
    assert [len(batch) for batch in ids] == [32, 2]
    fp4.quantize(model, tmp_path / "out", "nvfp4", "spy", text, samples=34, seq_len=32, device="cpu")
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    reference, dense = dense_model(model), dense_model(model)
    for name, parameter in reference.named_parameters():
        if name in after:
            halved = ".layers." in name
            assert after[name].dtype == before[name].dtype == torch.bfloat16
            assert torch.equal(after[name], before[name] / 2 if halved else before[name]), name
            parameter.data.copy_(after[name])
    how = STORED["nvfp4"]
    for layer in (f"model.layers.{block}.{part}" for block in range(3) for part in PARTS):
        scale = how.stored_input_scale(after, layer)
        naive.computes(
            reference.get_submodule(layer), naive.stored_weight(after, layer), lambda x, scale=scale: how.read(x, scale)
        )
    with torch.no_grad():
        for index, batch in enumerate(ids):
            meant = dense(batch, output_hidden_states=True).hidden_states
            quantized = reference(batch, output_hidden_states=True).hidden_states
            for block in range(3):
                torch.testing.assert_close(spy.originals[block][index], meant[block], rtol=1e-5, atol=1e-5)
                assert distance(spy.inputs[block][index], quantized[block]) < 1e-5
                assert block == 0 or distance(quantized[block], meant[block]) > 1e-2


@pytest.mark.parametrize("stopped_at", [1, 2])
def test_a_resumed_job_gives_a_method_the_same_hidden_states(
    stopped_at: int, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch)
    options = {"samples": 34, "seq_len": 32, "device": "cpu"}
    fp4.quantize(model, tmp_path / "whole", "nvfp4", "spy", text, **options)
    whole = spy.inputs, spy.originals
    spy.inputs, spy.originals = [], []

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("calibrating", stopped_at):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fp4.quantize(model, tmp_path / "out", "nvfp4", "spy", text, progress=stop, **options)
    assert len(spy.inputs) == stopped_at
    fp4.quantize(model, tmp_path / "out", "nvfp4", "spy", text, **options)
    for found, expected in zip((spy.inputs, spy.originals), whole, strict=True):
        assert len(found) == 3, "every block once"
        assert all(
            torch.equal(*pair) for pairs in zip(found, expected, strict=True) for pair in zip(*pairs, strict=True)
        )
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


# --- what a block costs


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every forward pass of a decoder block."""
    counted: list[int] = []
    original = LlamaDecoderLayer.forward

    def forward(self: LlamaDecoderLayer, *args: Any, **kwargs: Any) -> Any:
        counted.append(len(counted))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    return counted


def without_and_with_originals(spy: Spy, forwards: list[int], **options: Any) -> tuple[int, int]:
    counts = []
    for originals in (False, True):
        forwards.clear()
        fp4.quantize(
            method="spy", options={"originals": originals}, **options | {"out": f"{options['out']}{originals}"}
        )
        counts.append(len(forwards))
    return counts[0], counts[1]


def test_originals_are_computed_only_for_a_method_that_reads_them(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forwards: list[int]
) -> None:
    """Two batches through three blocks, the last of which feeds nothing: one pass for the form of results, one a block
    for the report, and for each kind of hidden states two batches through two blocks."""
    spy = Spy(monkeypatch)
    counts = without_and_with_originals(
        spy, forwards, model=model, out=tmp_path / "out", scheme="nvfp4a16", data=text, samples=34, seq_len=32,
        device="cpu",
    )  # fmt: skip
    assert counts == (1 + 3 + 2 * 2, 1 + 3 + 2 * (2 * 2))
    assert [len(originals) for originals in spy.originals] == [0, 0, 0, 2, 2, 2]
    found = [(tmp_path / f"out{originals}" / "model.safetensors").read_bytes() for originals in (False, True)]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("method", "options", "asks"),
    [
        ("rtn", {}, False),
        ("gptq", {}, False),
        ("best", {}, False),
        ("autoround", {"iters": 2}, True),
        ("autoround", {"iters": 0}, False),
    ],
)
def test_methods_ask_for_originals_where_these_change_their_result(
    method: str, options: dict[str, Any], asks: bool, model: Path, text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Other originals give other bytes exactly where a method says that it needs them."""
    found = METHODS[method]
    assert found.needs_originals(found.options(**options)) == asks
    written = []
    for factor in (1.0, 1.5):

        def run(block: Block, chosen: Any, factor: float = factor) -> dict[str, LayerResult]:
            block.originals = [factor * hidden for hidden in block.originals]
            return found.run(block, chosen)

        changed = dataclasses.replace(found, run=run, needs_originals=lambda options: True)
        monkeypatch.setitem(METHODS, method, changed)
        fp4.quantize(
            model, tmp_path / str(factor), "nvfp4", method, text, options=options, samples=4, seq_len=32, device="cpu"
        )
        written.append((tmp_path / str(factor) / "model.safetensors").read_bytes())
    assert (written[0] != written[1]) == asks


@pytest.mark.parametrize(("scheme", "scales"), [("nvfp4a16", 0), ("nvfp4", 1)])
def test_gptq_runs_a_block_as_often_as_it_must(
    scheme: str, scales: int, model: Path, text: Path, tmp_path: Path, forwards: list[int]
) -> None:
    """Of two batches: one for the order of layers, both for static input scales where there are such, both for each of
    the four stages (q k v, o, gate up, down), one for the report, and both for the next block where there is one."""
    fp4.quantize(model, tmp_path / "out", scheme, "gptq", text, samples=34, seq_len=32, device="cpu")
    assert len(forwards) == 1 + 3 * (1 + 2 * scales + 2 * 4 + 1) + 2 * 2


# --- global scales that are shared


def amax_of(folder: Path, layers: list[str]) -> float:
    tensors = load_file(folder / "model.safetensors")
    return max(float(tensors[f"{layer}.weight"].float().abs().max()) for layer in layers)


@pytest.fixture(scope="module")
def uneven(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a large k_proj and up_proj, neither of them the first of its group nor both the last."""
    folder = tmp_path_factory.mktemp("uneven")
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("k_proj.weight", "up_proj.weight")):
            tensor.mul_(8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("scheme", "method"),
    [("nvfp4a16", "rtn"), *(("nvfp4", method) for method in ("rtn", "gptq", "autoround", "best", None))],
)
def test_the_global_scale_of_fused_layers_is_that_of_the_largest(
    scheme: str, method: str | None, uneven: Path, text: Path, tmp_path: Path
) -> None:
    """``None`` stands for quantizing while loading."""
    if method is None:
        config = fp4.FPQuantConfig(checkpoint_format="compressed-tensors", activation_dtype="model")
        loaded = AutoModelForCausalLM.from_pretrained(uneven, dtype=torch.bfloat16, quantization_config=config)
        loaded.save_pretrained(tmp_path / "out")
    else:
        options = {"autoround": {"iters": 2}, "best": {"alpha": None}}.get(method)
        few = {"samples": 2, "seq_len": 32, "device": "cpu"}
        fp4.quantize(uneven, tmp_path / "out", scheme, method, text, options=options, **few)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for block in range(3):
        for group in (PARTS[:3], PARTS[3:4], PARTS[4:6], PARTS[6:]):
            layers = [f"model.layers.{block}.{part}" for part in group]
            expected = naive.power_of_two_scale(amax_of(uneven, layers))
            assert [1 / float(tensors[f"{layer}.weight_global_scale"]) for layer in layers] == [expected] * len(layers)
            inputs = [tensors[name] for layer in layers if (name := f"{layer}.input_global_scale") in tensors]
            assert len(inputs) == (len(layers) if scheme == "nvfp4" and method else 0)
            assert all(torch.equal(scale, inputs[0]) for scale in inputs), "they read the same"
        first = naive.power_of_two_scale(amax_of(uneven, [f"model.layers.{block}.self_attn.q_proj"]))
        assert first < 1 / float(tensors[f"model.layers.{block}.self_attn.q_proj.weight_global_scale"])


# --- the report


def test_rows_of_the_report_by_hand(model: Path, tmp_path: Path) -> None:
    report = fp4.quantize(model, tmp_path / "out", "nvfp4a16", "rtn", rule="mse")
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    names = [name for name, module in dense_model(model).named_modules() if isinstance(module, nn.Linear)]
    assert [row["name"] for row in report["layers"]] == [name for name in names if name != "lm_head"]
    for row in report["layers"]:
        weight = before[f"{row['name']}.weight"].float()
        values = naive.stored_weight(after, row["name"])
        scale = 1 / float(after[f"{row['name']}.weight_global_scale"])
        limit = 6 * (after[f"{row['name']}.weight_scale"].double() * scale).float().repeat_interleave(16, dim=1)
        assert row["shape"] == list(weight.shape)
        assert row["block"] == int(row["name"].split(".")[2])
        assert (row["scheme"], row["bits_per_weight"], row["rotation"]) == ("nvfp4a16", 4.5, None)
        assert (row["scale_rule"], row["output_error"]) == ("mse", None)
        assert row["weight_snr_db"] == pytest.approx(-20 * math.log10(distance(values, weight)), rel=1e-5)
        assert row["clipped"] == pytest.approx(float((weight.abs() > limit).float().mean()))
        assert row["zero"] == pytest.approx(float((values == 0).float().mean()))
    assert any(row["clipped"] not in (0, row["zero"]) for row in report["layers"])
    assert report["kept"] == [{"name": "lm_head", "dtype": "BF16", "shape": [320, 64], "reason": "output embedding"}]


@pytest.mark.parametrize(
    ("scheme", "format", "listed"),
    [
        ("nvfp4a16", "compressed-tensors", lambda config: config["ignore"]),
        ("nvfp4", "compressed-tensors", lambda config: config["ignore"]),
        ("nvfp4a16", "modelopt", lambda config: config["ignore"]),
        ("nvfp4a16", "fp_quant", lambda config: config["modules_to_not_convert"]),
        ("nvfp4a16", "auto-round", lambda config: [name for name, own in config["extra_config"].items()]),
    ],
)
def test_layers_are_reported_in_the_order_of_the_model_and_kept_ones_are_listed(
    scheme: str, format: str, listed: Callable[[dict[str, Any]], list[str]], model: Path, text: Path, tmp_path: Path
) -> None:
    """Of three files that layers are dealt out to one by one, so that none has them in the model's order."""
    source = sharded(model, tmp_path / "model")
    few = {"samples": 2, "seq_len": 32, "device": "cpu"}
    report = fp4.quantize(source, tmp_path / "out", scheme, "rtn", text, format=format, skip=["*.1.mlp.*"], **few)
    linears = [name for name, module in dense_model(model).named_modules() if isinstance(module, nn.Linear)]
    kept = [name for name in linears if ".1.mlp." in name or name == "lm_head"]
    assert [row["name"] for row in report["layers"]] == [name for name in linears if name not in kept]
    assert [row["name"] for row in report["kept"]] == kept
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    # auto-round names the blocks that it quantizes, and the head is in none of them.
    assert sorted(listed(config)) == sorted(name for name in kept if format != "auto-round" or name != "lm_head")


@pytest.mark.parametrize("scheme", ["nvfp4a16", "nvfp4"])
def test_the_index_says_where_each_tensor_is_and_how_large_all_are(
    scheme: str, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assemble, "_SHARD_BYTES", 50_000)
    source = sharded(model, tmp_path / "model")
    fp4.quantize(source, tmp_path / "out", scheme, "rtn", text, samples=2, seq_len=32, device="cpu")
    assert_index_fits(tmp_path / "out")


def test_a_tied_head_is_kept_and_not_stored_twice(text: Path, tmp_path: Path) -> None:
    source = save_small("llama-tied", tmp_path / "model")
    for scheme in ("nvfp4a16", "nvfp4"):
        report = fp4.quantize(source, tmp_path / scheme, scheme, "rtn", text, samples=2, seq_len=32, device="cpu")
        assert [(row["name"], row["shape"]) for row in report["kept"]] == [("lm_head", [320, 64])]
        tensors = load_file(tmp_path / scheme / "model.safetensors")
        assert "lm_head.weight" not in tensors
        assert torch.equal(
            tensors["model.embed_tokens.weight"], load_file(source / "model.safetensors")["model.embed_tokens.weight"]
        )
        config = json.loads((tmp_path / scheme / "config.json").read_text())["quantization_config"]
        assert config["ignore"] == ["lm_head"]


def test_statistics_of_a_large_weight_are_of_rows_spread_over_it(tmp_path: Path) -> None:
    """128 x 1024 elements are four times as many as are looked at: every fourth row."""
    source = save_small("llama", tmp_path / "model", hidden_size=128, intermediate_size=1024, num_hidden_layers=1)
    report = fp4.quantize(source, tmp_path / "out", "nvfp4a16", "rtn")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    for row in (row for row in report["layers"] if "mlp" in row["name"]):
        weight = before[f"{row['name']}.weight"].float()[::4]
        values = naive.stored_weight(after, row["name"])[::4]
        assert row["weight_snr_db"] == pytest.approx(-20 * math.log10(distance(values, weight)), rel=1e-5)


def test_only_layers_of_one_scheme_share_a_global_scale(uneven: Path, text: Path, tmp_path: Path) -> None:
    few = {"samples": 2, "seq_len": 32, "device": "cpu"}
    fp4.quantize(uneven, tmp_path / "out", "nvfp4a16", "rtn", text, overrides=["k_proj=nvfp4"], **few)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for parts in (PARTS[0:3:2], PARTS[1:2]):
        layers = [f"model.layers.2.{part}" for part in parts]
        expected = naive.power_of_two_scale(amax_of(uneven, layers))
        assert [1 / float(tensors[f"{layer}.weight_global_scale"]) for layer in layers] == [expected] * len(layers)


def test_a_rotated_weight_is_rounded_some_rows_at_a_time_to_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest value is in the last rows of every weight."""
    source = tmp_path / "model"
    source.mkdir()
    for path in model.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            tensor[-1].mul_(8)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    written = []
    for elements in (1 << 22, 640):
        monkeypatch.setattr(rounding, "_TILE_ELEMENTS", elements)
        fp4.quantize(source, tmp_path / str(elements), "nvfp4a16", "rtn", rotation="hadamard16")
        written.append((tmp_path / str(elements) / "model.safetensors").read_bytes())
    assert written[0] == written[1]


def test_layers_are_rotated_in_the_largest_groups_that_divide_their_columns(tmp_path: Path) -> None:
    """down_proj reads 96 channels, gate and up write them."""
    source = save_small("llama", tmp_path / "model", intermediate_size=96, num_hidden_layers=1)
    report = fp4.quantize(source, tmp_path / "out", "mxfp4a16", "rtn", rotation="hadamard64", format="fp_quant")
    rotations = {row["name"].rpartition(".")[2]: row["rotation"] for row in report["layers"]}
    assert rotations.pop("down_proj") == "hadamard32"
    assert rotations.keys() >= {"gate_proj", "up_proj", "o_proj"}
    assert set(rotations.values()) == {"hadamard64"}
    # Groups narrower than a block would only mix what shares a scale, so such a layer is not rotated.
    source = save_small("llama", tmp_path / "narrow", intermediate_size=80, num_hidden_layers=1)
    report = fp4.quantize(source, tmp_path / "narrow-out", "nvfp4a16", "rtn", rotation="hadamard64")
    assert {row["rotation"] for row in report["layers"] if "down_proj" in row["name"]} == {"hadamard16"}


def test_experts_are_rotated_in_groups_that_fit_all_of_their_projections(tmp_path: Path) -> None:
    """They run with one group size: with 64 for gate and up, and 32 columns in down, they could not be loaded."""
    dense = make_moe("qwen3_moe", moe_intermediate_size=32)
    dense.save_pretrained(tmp_path / "model")
    report = fp4.quantize(tmp_path / "model", tmp_path / "out", "mxfp4", "rtn", format="fp_quant")
    of_experts = {row["rotation"] for row in report["layers"] if ".experts." in row["name"]}
    assert of_experts == {"hadamard32"}
    loaded, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert len(packed_experts(loaded)) == 2


# --- experts


def test_biases_of_experts_that_a_method_changed_are_written_in_their_places(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gpt-oss keeps biases of gate and up in one stack, in which they take turns."""
    Spy(monkeypatch)
    make_moe("gpt_oss").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    few = {"samples": 2, "seq_len": 16, "device": "cpu"}
    fp4.quantize(tmp_path / "model", tmp_path / "out", "nvfp4a16", "spy", text, **few)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    biases = [name for name in before if name.endswith("bias") and ".layers." in name]
    assert any("gate_up_proj_bias" in name for name in biases)
    for name in biases:
        assert after[name].dtype == before[name].dtype
        # A bias of the router is one of the block too, and halved with the others.
        assert torch.equal(after[name], before[name] / 2), name
