"""fp4.convert: values and bytes kept over every path between formats, nothing half written, hostile files refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fp4.checkpoint import codec_for
from fp4.checkpoint.files import INDEX_NAME, Checkpoint, ShardWriter, Spec, load, read_header
from fp4.checkpoint.layers import packed_layers
from fp4.convert import FORMATS, convert
from fp4.formats import dequantize


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_same_bytes(found: Path, expected: Path) -> None:
    a, b = tensors_of(found), tensors_of(expected)
    assert set(a) == set(b)
    for name in b:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].shape == b[name].shape, name
        assert a[name].reshape(-1).view(torch.uint8).equal(b[name].reshape(-1).view(torch.uint8)), name


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
    for to in FORMATS:
        if to not in holders:
            with pytest.raises(ValueError, match="holds only stacks" if to == "mxfp4" else why):
                convert(source, tmp_path / "refused", to)
            continue
        there = convert(source, tmp_path / to, to)
        assert (there.source_format, there.target_format) == (back, to)
        assert_same_values(tmp_path / to, source)
        convert(tmp_path / to, tmp_path / f"{to}-back", back)
        assert_same_bytes(tmp_path / f"{to}-back", source)
    assert {path.name for path in tmp_path.iterdir()} == {*holders, *(f"{to}-back" for to in holders)}


def logits_of(folder: Path, token_ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    import fp4

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert any(isinstance(module, fp4.FP4Linear) for module in model.modules())
    with torch.no_grad():
        logits: torch.Tensor = model(token_ids).logits
    return logits


@pytest.mark.parametrize("name", [name for name in HOLDERS if len(HOLDERS[name][0]) > 1 and "granite" not in name])
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


def test_what_fp4_writes_converts_to_every_format_and_back(packed: Path, tmp_path: Path) -> None:
    assert_same_values(packed, packed)
    previous = packed
    for to in ("modelopt", "compressed-tensors", "auto-round", "modelopt", "fp_quant"):
        folder = tmp_path / f"{previous.name}-{to}"
        convert(previous, folder, to)
        assert_same_values(folder, packed)
        previous = folder
    assert_same_bytes(previous, packed)


def test_refusals_come_before_anything_is_written(shared: Callable[[str], Path], tmp_path: Path) -> None:
    cases = [
        ("fpquant-nvfp", "modelopt", "14 of 14 layers cannot be converted to modelopt:\n.*rotated in groups of 16"),
        ("fpquant-mxfp-gptq", "compressed-tensors", r"global scale of 0\.33333"),
        ("modelopt-W4A8_NVFP4_FP8", "compressed-tensors", "activations are FP8"),
        ("modelopt-NVFP4", "compressed-tensors", "weight_global_scale .* cannot be stored exactly"),
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
    assert_same_bytes(tmp_path / "out", source)
    with pytest.raises(ValueError, match=r"stacks matrices \(4,\), for which compressed-tensors has no place"):
        convert(source, tmp_path / "bad", "compressed-tensors")


def sharded(source: Path, folder: Path, count: int = 3) -> Path:
    """``source`` with its tensors dealt out to shards one by one, so that layers are split over files."""
    shutil.copytree(source, folder)
    tensors = tensors_of(source)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    weight_map = {name: names[i % count] for i, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file, {"format": "pt"})
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_layers_split_over_shards(packed: Path, tmp_path: Path) -> None:
    source = sharded(packed, tmp_path / "source")
    result = convert(source, tmp_path / "out", "modelopt")
    assert (result.shards, result.layers) == (3, 14)
    assert_same_values(tmp_path / "out", packed)
    index = json.loads((tmp_path / "out" / INDEX_NAME).read_text())
    assert set(index["weight_map"]) == set(tensors_of(tmp_path / "out"))
    assert (tmp_path / "out/hf_quant_config.json").is_file()
    for path in (tmp_path / "out").glob("*.safetensors"):  # aligned, as safetensors itself writes them
        header = read_header(path)
        for info in header.tensors.values():
            assert (info.start - 8) % {"F32": 4, "BF16": 2}.get(info.dtype, 1) == 0
        assert header.metadata == {"format": "pt"}
    convert(tmp_path / "out", tmp_path / "back", "fp_quant")
    assert_same_bytes(tmp_path / "back", packed)


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


def test_a_full_disk_leaves_nothing_that_looks_like_a_model(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", full)
        with pytest.raises(OSError, match="No space"):
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
    with pytest.raises(ValueError, match="'gguf'; expected one of fp_quant"):
        convert(packed, tmp_path / "other", "gguf")


def test_every_format_name_is_offered() -> None:
    assert FORMATS == ("fp_quant", "compressed-tensors", "modelopt", "auto-round", "mxfp4")


# --- hostile files ---------------------------------------------------------------------------------------------------


def copy(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    return folder


def refuses(folder: Path, message: str) -> None:
    out = folder.parent / "out"
    with pytest.raises(ValueError, match=message):
        convert(folder, out, "modelopt")
    assert {path.name for path in folder.parent.iterdir()} == {folder.name}


def with_header(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    changed = change(header) or header
    encoded = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + raw[8 + length :])


def test_truncated_shard(packed: Path, tmp_path: Path) -> None:
    folder = copy(packed, tmp_path / "bad")
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    refuses(folder, "model.safetensors is truncated")
    os.truncate(path, 5)
    refuses(folder, "no complete safetensors file: 5 bytes")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../../etc/passwd.safetensors", "expected the name of a safetensors file beside it"),
        ("/etc/passwd", "expected the name of a safetensors file beside it"),
        ("..\\x.safetensors", "expected the name"),
        ("pytorch_model.bin", "expected the name"),
        ("model-00009.safetensors", "names model-00009.safetensors, which is missing"),
        (7, "no weight_map"),
    ],
)
def test_hostile_index(file: object, message: str, packed: Path, tmp_path: Path) -> None:
    folder = copy(packed, tmp_path / "bad")
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    refuses(folder, message)


def test_index_that_names_another_shard(packed: Path, tmp_path: Path) -> None:
    folder = sharded(packed, tmp_path / "bad")
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00003.safetensors"
    index["weight_map"]["lm_head.weight"] = "model-00002-of-00003.safetensors"
    (folder / INDEX_NAME).write_text(json.dumps(index))
    refuses(folder, "says that .* is in model-0000[12]-of-00003.safetensors, but it is not")


def test_pickles_are_not_read(packed: Path, tmp_path: Path) -> None:
    folder = copy(packed, tmp_path / "bad")
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")
    os.replace(folder / "pytorch_model.bin", folder / "model.safetensors")
    refuses(folder, "it looks like a pickle, which is never read")
    os.replace(folder / "model.safetensors", folder / "pytorch_model.bin")
    refuses(folder, "pytorch_model.bin is a pickle, which is never read")


Q = "model.layers.0.self_attn.q_proj."


def _set(name: str, **changes: object) -> Callable[[dict[str, object]], object]:
    def change(header: dict[str, object]) -> None:
        header[name] = {**header[name], **changes}  # type: ignore[dict-item]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set(Q + "qweight", dtype="I8"), "qweight is torch.int8"),
        (_set(Q + "qweight", dtype="F4X"), "dtype 'F4X'"),
        (_set(Q + "qweight", shape=[1 << 61, 1 << 61]), "needs .* bytes, but has 8192"),
        (_set(Q + "qweight", shape=[-128, -64]), "expected whole numbers"),
        (_set(Q + "qweight", shape=[64, 128]), "scales"),
        (_set(Q + "qweight", shape=[8192]), "expected a matrix"),
        (_set(Q + "qweight", data_offsets=[0, 8192]), "gap or overlap"),
        (_set(Q + "qweight", data_offsets=[1.5, 2]), "expected whole numbers"),
        (_set(Q + "qweight", data_offsets="ab"), "expected whole numbers"),
        (_set(Q + "qweight", data_offsets=[0]), "expected dtype, shape, offsets"),
        (lambda header: header.update({"x": 3}), "x is 3; expected dtype, shape, offsets"),
        (lambda header: b"[]", "a header that is list"),
        (lambda header: b"{" * 10000, "no valid JSON"),
        (lambda header: b'{"a":1,"a":2}', "a name occurs twice"),
    ],
)
def test_hostile_header(
    change: Callable[[dict[str, object]], object], message: str, packed: Path, tmp_path: Path
) -> None:
    folder = copy(packed, tmp_path / "bad")
    with_header(folder / "model.safetensors", change)
    refuses(folder, message)


def test_damaged_scales_are_found_while_writing(packed: Path, tmp_path: Path) -> None:
    folder = copy(packed, tmp_path / "bad")
    tensors = load_file(folder / "model.safetensors")
    tensors[Q + "scales"][3, 2] = 0x7F
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refuses(folder, f"{Q[:-1]}: scales: scales hold 1 NaN")


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"quantization_config": 3}', '{"quantization_config": {}}', "\xff"]
)
def test_hostile_config(content: str, packed: Path, tmp_path: Path) -> None:
    folder = copy(packed, tmp_path / "bad")
    (folder / "config.json").write_text(content, encoding="latin-1")
    refuses(folder, "config.json|quantization_config|quant_method")


def test_fuzzed_files_end_in_a_clear_error_or_in_a_model(packed: Path, tmp_path: Path) -> None:
    """Bytes flipped, cut and repeated anywhere in the header, the index and the configuration."""
    source = sharded(packed, tmp_path / "source", 2)
    rng = random.Random(0)
    outcomes = {"refused": 0, "converted": 0}
    for _ in range(150):
        folder = tmp_path / "bad"
        folder.mkdir()
        for path in source.iterdir():
            os.link(path, folder / path.name)
        victim = rng.choice([p for p in folder.iterdir() if p.suffix in (".json", ".safetensors")])
        raw = bytearray(victim.read_bytes())
        limit = min(len(raw), 8 + int.from_bytes(raw[:8], "little")) if victim.suffix == ".safetensors" else len(raw)
        for _ in range(rng.randint(1, 4)):
            position, kind = rng.randrange(min(limit, len(raw))), rng.randrange(3)
            if kind == 0:
                raw[position] = rng.randrange(256)
            elif kind == 1:
                del raw[position : position + rng.randint(1, 40)]
            else:
                raw[position:position] = raw[position : position + rng.randint(1, 40)]
        victim.unlink()
        victim.write_bytes(raw)
        try:
            convert(folder, tmp_path / "out", "compressed-tensors")
            outcomes["converted"] += 1
            Checkpoint.open(tmp_path / "out")
        except ValueError:
            outcomes["refused"] += 1
            assert not list(tmp_path.glob("*out*")) + list(tmp_path.glob(".*out*"))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.rmtree(folder)
    assert min(outcomes.values()) > 10, outcomes


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
