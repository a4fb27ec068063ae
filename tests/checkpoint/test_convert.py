"""fp4.checkpoint.convert: values and bytes kept over every path between formats, and nothing half written."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comparing import assert_same_files
from conftest import make_llama
from safetensors.torch import load_file, save_file
from shards import assert_index_fits, sharded, tensors_of

from fp4.checkpoint import CODECS, codec_for
from fp4.checkpoint.convert import convert
from fp4.checkpoint.io.headers import INDEX_NAME, Checkpoint, load, read_header
from fp4.checkpoint.io.shards import ShardWriter, Spec
from fp4.checkpoint.layers import packed_layers
from fp4.errors import OptionError
from fp4.numerics.formats import dequantize


def values_of(folder: Path) -> dict[str, torch.Tensor]:
    """Dequantized weights in the rotated basis, float32, by layer."""
    checkpoint = Checkpoint.open(folder)
    codec = codec_for(checkpoint.quantization_config() or {}, checkpoint.dtype)
    values = {}
    for layer, infos in packed_layers(codec, checkpoint.tensors).items():
        scheme = codec.scheme(layer)
        assert scheme is not None
        values[layer] = dequantize(*codec.read({s: load(i) for s, i in infos.items()}, scheme).weight)
    return values


def assert_same_values(found: Path, expected: Path) -> None:
    a, b = values_of(found), values_of(expected)
    assert set(a) == set(b)
    assert all(torch.equal(a[layer], b[layer]) for layer in b)


# What holds a fixture exactly, and why the others do not: r(otation), g(lobal scale of the other convention), f(p8).
ALL = ("fp_quant", "compressed-tensors", "modelopt", "auto-round")
REASONS = {
    "r": "rotated in groups of",
    "g": "cannot be stored exactly|global scale of",
    "f": "activations are FP8|it is fp8_dynamic",
}
HOLDERS: dict[str, tuple[tuple[str, ...], str]] = {
    "autoround-MXFP4": (ALL, ""),
    "autoround-NVFP4": (("fp_quant", "compressed-tensors", "auto-round"), "g"),
    "autoround-NVFP4-autoroundfmt": (("fp_quant", "compressed-tensors", "auto-round"), "g"),
    "autoround-NVFP4-iters50": (("fp_quant", "compressed-tensors", "auto-round"), "g"),
    "fpquant-mxfp-gptq": (("fp_quant",), "rg"),
    "fpquant-nvfp": (("fp_quant", "compressed-tensors"), "r"),
    "llmcompressor-FP8_DYNAMIC": (("fp_quant", "compressed-tensors", "modelopt"), "f"),
    "llmcompressor-FP8_DYNAMIC-granitemoehybrid": (("fp_quant", "compressed-tensors", "modelopt"), "f"),
    "llmcompressor-MXFP4": (ALL, ""),
    "llmcompressor-NVFP4": (("fp_quant", "compressed-tensors", "auto-round"), "g"),
    "llmcompressor-NVFP4-gptq": (("fp_quant", "compressed-tensors", "auto-round"), "g"),
    "llmcompressor-NVFP4-qwen3moe": (("fp_quant", "compressed-tensors", "auto-round"), "g"),
    "llmcompressor-NVFP4A16": (("fp_quant", "compressed-tensors", "auto-round"), "g"),
    "modelopt-MXFP4": (ALL, ""),
    "modelopt-NVFP4": (("modelopt",), "g"),
    "modelopt-NVFP4-qwen3moe": (("modelopt",), "g"),
    "modelopt-W4A16_NVFP4": (("modelopt",), "g"),
    "modelopt-W4A8_NVFP4_FP8": (("modelopt",), "f"),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_every_way_there_and_back_is_byte_exact_or_refused(
    name: str, shared: Callable[[str], Path], tmp_path: Path
) -> None:
    source = shared(f"fixtures/{name}")
    holders, reasons = HOLDERS[name]
    back = codec_for(Checkpoint.open(source).quantization_config() or {}).name
    assert back in holders
    why = "|".join(REASONS[reason] for reason in reasons)
    for to in CODECS:
        if to not in holders:
            with pytest.raises(ValueError, match="holds only stacks" if to == "mxfp4" else why):
                convert(source, tmp_path / "refused", to)
            continue
        there = convert(source, tmp_path / to, to)
        assert (there.source_format, there.target_format) == (back, to)
        assert_same_values(tmp_path / to, source)
        convert(tmp_path / to, tmp_path / f"{to}-back", back)
        assert_same_files(tmp_path / f"{to}-back", source)
    assert {path.name for path in tmp_path.iterdir()} == {*holders, *(f"{to}-back" for to in holders)}


def logits_of(folder: Path, token_ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    import fp4

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert any(isinstance(module, fp4.FP4Linear) for module in model.modules())
    with torch.no_grad():
        logits: torch.Tensor = model(token_ids).logits
    return logits


@pytest.mark.parametrize("name", [name for name in HOLDERS if len(HOLDERS[name][0]) > 1])
def test_logits_never_change(name: str, shared: Callable[[str], Path], token_ids: torch.Tensor, tmp_path: Path) -> None:
    source = shared(f"fixtures/{name}")
    expected = logits_of(source, token_ids)
    back = codec_for(Checkpoint.open(source).quantization_config() or {}).name
    for to in HOLDERS[name][0]:
        if to != back:
            convert(source, tmp_path / to, to)
            assert torch.equal(logits_of(tmp_path / to, token_ids), expected), to


@pytest.fixture(scope="module")
def packed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small Llama in NVFP4 W4A16 as fp4 itself writes it: with global scales that are powers of two."""
    from transformers import AutoModelForCausalLM

    from fp4 import FPQuantConfig

    config = FPQuantConfig("nvfp4", activation_dtype="model")
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config, dtype=torch.bfloat16)
    path = tmp_path_factory.mktemp("packed")
    model.save_pretrained(path)
    return path


def test_what_fp4_writes_converts_to_every_format_and_back(
    packed: Path, token_ids: torch.Tensor, tmp_path: Path
) -> None:
    expected = logits_of(packed, token_ids)
    previous = packed
    for to in ("modelopt", "compressed-tensors", "auto-round", "modelopt", "fp_quant"):
        folder = tmp_path / f"{previous.name}-{to}"
        convert(previous, folder, to)
        assert_same_values(folder, packed)
        assert torch.equal(logits_of(folder, token_ids), expected), to
        previous = folder
    assert_same_files(previous, packed)


def test_refusals_come_before_anything_is_written(shared: Callable[[str], Path], tmp_path: Path) -> None:
    cases = [
        ("fpquant-nvfp", "modelopt", "14 of 14 layers cannot be converted to modelopt:\n.*rotated in groups of 16"),
        ("fpquant-mxfp-gptq", "compressed-tensors", r"global scale of 0\.33333"),
        ("modelopt-W4A8_NVFP4_FP8", "compressed-tensors", "activations are FP8"),
        ("modelopt-NVFP4", "compressed-tensors", "input_global_scale .* cannot be stored exactly"),
        ("llmcompressor-NVFP4", "mxfp4", "holds only stacks of experts"),
        (
            "llmcompressor-FP8_DYNAMIC",
            "auto-round",
            "it is fp8_dynamic; auto-round has a place for FP4",
        ),
        ("llmcompressor-FP8_DYNAMIC", "mxfp4", "it is one matrix in fp8_dynamic; mxfp4 holds only stacks"),
        ("torchao-MXFP4", "modelopt", "quant_method is 'torchao'"),
        ("source-llama", "modelopt", "is not quantized"),
    ]
    for name, to, message in cases:
        with pytest.raises(ValueError, match=message):
            convert(shared(f"fixtures/{name}"), tmp_path / "out", to)
        assert not list(tmp_path.iterdir())


def test_a_refusal_to_round_leads_with_the_remedy(shared: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(OptionError) as raised:
        convert(shared("fixtures/llmcompressor-NVFP4"), tmp_path / "out", "modelopt")
    said = raised.value.on_command_line()
    assert said.startswith(
        "modelopt holds the global scales of 14 of 14 layers only rounded; accept that with --allow-rounding, which "
        "costs at most one unit in the last place of the float32 product of block and global scale "
        "(model.layers.0.mlp.down_proj first: input_scale 0.00103"
    )
    assert "\n" not in said
    assert "accept that with allow_rounding=True, which" in str(raised.value)
    convert(shared("fixtures/llmcompressor-NVFP4"), tmp_path / "out", "modelopt", allow_rounding=True)
    with pytest.raises(ValueError, match=r"out exists; name another folder, or replace it with overwrite=True$"):
        convert(shared("fixtures/llmcompressor-NVFP4"), tmp_path / "out", "modelopt", allow_rounding=True)


def test_rounding_is_only_by_permission_and_one_ulp(shared: Callable[[str], Path], tmp_path: Path) -> None:
    source = shared("fixtures/modelopt-NVFP4")
    convert(source, tmp_path / "out", "compressed-tensors", allow_rounding=True)
    before, after = values_of(source), values_of(tmp_path / "out")
    for layer, values in before.items():
        steps = (values.view(torch.int32) - after[layer].view(torch.int32)).abs()
        assert steps.max() <= 2  # of the effective scale 1, rounded once more in the product


def test_weight_only_drops_the_activations(shared: Callable[[str], Path], tmp_path: Path) -> None:
    result = convert(shared("fixtures/llmcompressor-NVFP4"), tmp_path / "out", "compressed-tensors", weight_only=True)
    assert result.notes == ["activations stay unquantized (weight-only was asked for)"]
    assert not any("input_global_scale" in name for name in tensors_of(tmp_path / "out"))
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["input_activations"] is None


def test_gpt_oss_experts_come_back(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    generator = torch.Generator().manual_seed(0)
    stack = "model.layers.0.mlp.experts.down_proj"
    tensors = {
        f"{stack}_blocks": torch.randint(0, 256, (4, 32, 2, 16), dtype=torch.uint8, generator=generator),
        f"{stack}_scales": torch.randint(100, 140, (4, 32, 2), dtype=torch.uint8, generator=generator),
        f"{stack}_bias": torch.randn(4, 32),
        "model.norm.weight": torch.randn(64),
    }
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = {"dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm"]}}
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "out", "mxfp4")
    assert_same_files(tmp_path / "out", source)
    with pytest.raises(ValueError, match=r"stacks matrices \(4,\), for which compressed-tensors has no place"):
        convert(source, tmp_path / "bad", "compressed-tensors")


def test_layers_split_over_shards(packed: Path, tmp_path: Path) -> None:
    source = sharded(packed, tmp_path / "source")
    result = convert(source, tmp_path / "out", "modelopt")
    assert (result.shards, result.layers) == (3, 14)
    assert_same_values(tmp_path / "out", packed)
    assert_index_fits(tmp_path / "out")
    assert (tmp_path / "out/hf_quant_config.json").is_file()
    for path in (tmp_path / "out").glob("*.safetensors"):  # aligned, as safetensors itself writes them
        header = read_header(path)
        for info in header.tensors.values():
            assert (info.start - 8) % {"F32": 4, "BF16": 2}.get(info.dtype, 1) == 0
        assert header.metadata == {"format": "pt"}
    convert(tmp_path / "out", tmp_path / "back", "fp_quant")
    assert_same_files(tmp_path / "back", packed)


def test_an_interrupted_conversion_goes_on(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = sharded(packed, tmp_path / "source")
    done: list[tuple[int, int]] = []

    def interrupt(position: int, total: int) -> None:
        done.append((position, total))
        if position > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", "modelopt", progress=interrupt)
    assert not (tmp_path / "out").exists()
    assert done == sorted(done)
    assert done[0][0] == 0
    assert convert(source, tmp_path / "out", "modelopt").resumed_shards >= 1
    assert_same_values(tmp_path / "out", packed)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


CONVERT = """
import os, re, signal, sys
from pathlib import Path
from fp4.checkpoint.convert import convert

def status(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

def progress(done, total):
    if sys.argv[3] == "die" and done > 0.6 * total:
        os.kill(os.getpid(), signal.SIGKILL)

before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the most so far was while importing
result = convert(sys.argv[1], sys.argv[2], "modelopt", progress=progress)
print(result.resumed_shards, status("VmHWM") - before)
"""


def in_a_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", CONVERT, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells a process its largest memory")
def test_a_killed_conversion_goes_on_to_the_same_bytes_within_little_memory(packed: Path, tmp_path: Path) -> None:
    source = sharded(packed, tmp_path / "source")
    # The scales of one layer are what is read whole: its codes, and tensors that are not quantized, pass in pieces.
    tensors = {"large.weight": torch.zeros(5 << 20, 8, dtype=torch.bfloat16)}
    index = json.loads((source / INDEX_NAME).read_text())
    index["weight_map"]["large.weight"] = "model-large.safetensors"
    save_file(tensors, source / "model-large.safetensors", {"format": "pt"})
    (source / INDEX_NAME).write_text(json.dumps(index))
    whole = in_a_process(source, tmp_path / "whole", "live")
    assert whole.returncode == 0, whole.stderr[-2000:]
    resumed, grown = map(int, whole.stdout.split())
    assert resumed == 0
    assert grown < 20e6 < (source / "model-large.safetensors").stat().st_size

    assert in_a_process(source, tmp_path / "out", "die").returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    again = in_a_process(source, tmp_path / "out", "live")
    assert again.returncode == 0, again.stderr[-2000:]
    assert int(again.stdout.split()[0]) > 0
    content = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("out", "whole")]
    assert content[0] == content[1]
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out", "whole"}


def test_a_full_disk_leaves_nothing_that_looks_like_a_model(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", full)
        with pytest.raises(OSError, match=r"the disk of .*out.partial is full; make room; nothing was finished yet"):
            convert(packed, tmp_path / "out", "modelopt")
    assert not (tmp_path / "out").exists()
    convert(packed, tmp_path / "out", "modelopt")
    assert_same_values(tmp_path / "out", packed)


def test_an_existing_target_is_replaced_only_on_request(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old.txt").write_text("old")
    with pytest.raises(ValueError, match="exists"):
        convert(packed, tmp_path / "out", "modelopt")
    convert(packed, tmp_path / "out", "modelopt", overwrite=True)
    assert not (tmp_path / "out/old.txt").exists()
    with pytest.raises(ValueError, match="the source itself"):
        convert(tmp_path / "out", tmp_path / "out", "modelopt", overwrite=True)
    with pytest.raises(ValueError, match="'gguf'; expected one of compressed-tensors"):
        convert(packed, tmp_path / "other", "gguf")


def test_what_an_interrupted_conversion_with_other_options_left_is_not_taken(
    shared: Callable[[str], Path], tmp_path: Path
) -> None:
    source = sharded(shared("fixtures/llmcompressor-NVFP4"), tmp_path / "source")

    def interrupt(position: int, total: int) -> None:
        if position > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", "fp_quant", progress=interrupt)
    with pytest.raises(ValueError, match=r"another request \(it differs in weight_only\)"):
        convert(source, tmp_path / "out", "fp_quant", weight_only=True)
    result = convert(source, tmp_path / "out", "fp_quant", weight_only=True, overwrite=True)
    assert result.resumed_shards == 0
    # FP-Quant's format says by a third that a file has no scale of its inputs.
    scales = [tensor for name, tensor in tensors_of(tmp_path / "out").items() if name.endswith("act_global_scale")]
    assert len(scales) == 14


@pytest.mark.parametrize(
    ("to", "key"), [("compressed-tensors", "ignore"), ("modelopt", "ignore"), ("fp_quant", "modules_to_not_convert")]
)
@pytest.mark.parametrize("tied", [False, True])
def test_every_layer_that_is_not_packed_is_named(tied: bool, to: str, key: str, tmp_path: Path) -> None:
    """A head that is tied to the embedding has no tensor of its own, and is kept all the same."""
    from transformers import AutoModelForCausalLM

    from fp4 import FPQuantConfig

    make_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "dense")
    config = FPQuantConfig("nvfp4", activation_dtype="model", modules_to_not_convert=["lm_head", "o_proj"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "packed")
    result = convert(tmp_path / "packed", tmp_path / "out", to)
    found = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"][key]
    heads = ["lm_head", "model.embed_tokens"]
    assert found == sorted([*heads, *(f"model.layers.{block}.self_attn.o_proj" for block in range(2))])
    assert (result.layers, result.kept) == (12, 4)


def test_every_format_name_is_offered() -> None:
    assert tuple(CODECS) == ("compressed-tensors", "fp_quant", "modelopt", "auto-round", "mxfp4")


def test_unfinished_work_for_another_request_is_replaced_only_on_request(packed: Path, tmp_path: Path) -> None:
    source = sharded(packed, tmp_path / "source")

    def interrupt(position: int, total: int) -> None:
        if position > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"finished is kept in .*out\.partial; the same command goes on"):
        convert(source, tmp_path / "out", "modelopt", progress=interrupt)
    with pytest.raises(OptionError, match=r"holds unfinished work for another request \(it differs in to\)"):
        convert(source, tmp_path / "out", "compressed-tensors")
    result = convert(source, tmp_path / "out", "compressed-tensors", overwrite=True)
    assert result.resumed_shards == 0
    assert_same_values(tmp_path / "out", packed)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_a_shard_is_as_planned_or_not_there(tmp_path: Path) -> None:
    path, specs = tmp_path / "x.safetensors", {"a": Spec("F32", (2,)), "b": Spec("U8", (3,))}
    with pytest.raises(RuntimeError, match="without b"), ShardWriter(path, specs, {}) as file:  # noqa: PT012
        with pytest.raises(ValueError, match="a turned out as"):
            file.write("a", torch.zeros(3))
        file.write("a", torch.ones(2))
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt), ShardWriter(path, specs, {}):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with ShardWriter(path, specs, {}) as file:
        file.write("a", torch.ones(2))
        file.write("b", torch.arange(3, dtype=torch.uint8))
    assert load_file(path)["b"].tolist() == [0, 1, 2]
    assert list(tmp_path.iterdir()) == [path]


def test_hub_id(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, object] = {}

    def snapshot(repo: str, **options: object) -> str:
        asked.update({"repo": repo} | options)
        return str(packed)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    convert("owner/model", tmp_path / "out", "modelopt", revision="v1", token="t")
    assert (asked["repo"], asked["revision"], asked["token"]) == ("owner/model", "v1", "t")
    assert "*.bin" not in asked["allow_patterns"]  # type: ignore[operator]
    assert_same_values(tmp_path / "out", packed)
