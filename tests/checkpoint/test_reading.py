"""Headers, indices, fields of configurations and names of layers: read from dictionaries and bytes made by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from fp4.checkpoint import CODECS
from fp4.checkpoint.contradictions import contradictions, refuse_endless, tokenizer_problem
from fp4.checkpoint.expert_names import names_on_disk, stacks_on_disk
from fp4.checkpoint.formats import config_fields
from fp4.checkpoint.fusing import fused_groups
from fp4.checkpoint.io import headers, hub
from fp4.checkpoint.io.headers import Checkpoint, TensorInfo, load, parse_header, read_header
from fp4.checkpoint.layers import dense_matrices, other_quantized, packed_layers, peek

HERE = Path("model.safetensors")


def info(*shape: int, dtype: str = "BF16") -> TensorInfo:
    return TensorInfo(HERE, dtype, shape, 0, 0)


# --- which layers are fused, and what experts are called


def test_fused_layers_are_siblings_of_one_group() -> None:
    names = [
        "a.q_proj",
        "b.q_proj",
        "a.k_proj",
        "a.gate_proj",
        "a.o_proj",
        "b.up_proj",
        "c.w3",
        "c.w2",
        "c.w1",
        "v_proj",
    ]
    assert fused_groups(names) == [["a.q_proj", "a.k_proj"], ["c.w3", "c.w1"]]
    assert fused_groups(["q_proj", "v_proj"]) == [["q_proj", "v_proj"]]
    assert fused_groups(["a.in_proj_b", "a.in_proj_qkv", "a.in_proj_a"]) == [["a.in_proj_b", "a.in_proj_a"]]


LAYOUT: Any = SimpleNamespace(
    projections={"gate_up_proj": (4, 2), "down_proj": (2, 2)},
    parts=lambda projection: ("gate_proj", "up_proj") if projection == "gate_up_proj" else ("down_proj",),
)


def merged(sources: list[str], target: str, **options: Any) -> WeightConverter:
    return WeightConverter(sources, target, operations=[MergeModulelist(dim=0), Concatenate(dim=1)], **options)


def test_experts_are_called_what_their_conversion_merges() -> None:
    gate_up = merged(["experts.*.w1.weight", "experts.*.w3.weight"], "experts.gate_up_proj")
    down = merged(["experts.*.w2.weight"], "experts.down_proj")
    assert names_on_disk("layers.0.experts", LAYOUT, [gate_up, down]) == {
        "gate_proj": "w1",
        "up_proj": "w3",
        "down_proj": "w2",
    }
    own = {name: name for name in ("gate_proj", "up_proj", "down_proj")}
    others = [
        WeightRenaming("experts.w2.weight", "experts.down_proj"),
        WeightConverter(["experts.*.w2.weight"], "experts.down_proj", operations=[Concatenate(dim=0)]),
        merged(["experts.*.w1.weight"], "experts.gate_up_proj"),  # one of the two parts
        merged(["experts.w2.weight"], "experts.down_proj"),  # not by expert
        merged(["experts.*.w2.weight"], "mixture.down_proj"),
        merged(["experts.*.w2.weight"], "experts.other_proj"),
    ]
    for conversion in others:
        assert names_on_disk("layers.0.experts", LAYOUT, [conversion]) == own
    assert names_on_disk("layers.0.experts", LAYOUT, [*others, down])["down_proj"] == "w2"


def test_stacks_are_called_what_a_renaming_says() -> None:
    renamings = [
        WeightRenaming("experts.output_linear.weight", "experts.down_proj"),
        WeightRenaming("experts.bias", "experts.gate_up_proj"),
        merged(["experts.*.w1.weight"], "experts.gate_up_proj"),
    ]
    assert stacks_on_disk("layers.0.experts", LAYOUT, renamings) == {"down_proj": "layers.0.experts.output_linear"}
    assert stacks_on_disk("layers.0.other", LAYOUT, renamings) == {}


# --- which tensors belong to packed layers


def test_tensors_are_grouped_by_layer() -> None:
    codec = CODECS["compressed-tensors"].writer()
    tensors = {
        "a.weight_packed": info(4, 8, dtype="U8"),
        "a.weight_scale": info(4, 1, dtype="F8_E4M3"),
        "a.bias": info(4),
        "b.weight": info(4, 16),
        "b.weight_scale": info(4, 1),
        "norm.weight": info(16),
        "c.weight": info(4, 16, dtype="F8_E5M2"),
        "d.qweight": info(4, 2, dtype="I32"),
    }
    packed = packed_layers(codec, tensors)
    assert packed == {"a": {f".{name}": tensors[f"a.{name}"] for name in ("weight_packed", "weight_scale")}}
    assert dense_matrices(tensors, packed) == ["b", "c"]
    assert dense_matrices({"a.weight": info(4, 4), "b.weight": info(4, 4, 4)}, {"a": {}}) == ["b"]
    assert other_quantized(tensors, packed) == ["c", "d"]
    assert other_quantized(tensors, {}) == ["a", "c", "d"]


def test_only_small_tensors_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {
        "a.weight_packed": torch.full((4, 16), 0x21, dtype=torch.uint8),
        "a.weight_scale": torch.full((4, 2), 2.0).to(torch.float8_e4m3fn),
        "a.weight_global_scale": torch.tensor([4.0]),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    found = read_header(tmp_path / "model.safetensors").tensors
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    group = {"targets": ["Linear"], "weights": weights, "format": "nvfp4-pack-quantized"}
    config = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": {"group_0": group},
    }
    codec = CODECS["compressed-tensors"](config)
    infos = {name.removeprefix("a"): entry for name, entry in found.items()}
    for scales in (False, True):
        stored, scheme = peek(codec, "a", infos, scales)
        assert str(scheme) == "nvfp4a16"
        assert stored.weight.codes.is_meta
        assert stored.weight.scales.is_meta is not scales
        assert float(stored.weight.global_scale) == 1 / 4
    monkeypatch.setattr("fp4.checkpoint.layers._LARGEST", 7)
    assert peek(codec, "a", infos, True)[0].weight.scales.is_meta  # eight bytes
    codec = CODECS["compressed-tensors"](config | {"ignore": ["a"]})
    with pytest.raises(ValueError, match="it is packed, but the configuration says that it is not quantized"):
        peek(codec, "a", infos)


# --- fields of configurations


FIELDS = {
    "dictionary": ({"a": 1}, {}, [[], 5, "x"], "a dictionary"),
    "dictionaries": ({"a": {}}, {}, [{"a": 1}, [], "x"], "a dictionary"),
    "entries": ([{"a": 1}, {}], [], [[1], {}, "x"], "a list of dictionaries"),
    "names": (["a", "b"], [], [[1], {}, "x"], "a list of strings"),
}


@pytest.mark.parametrize("kind", FIELDS)
def test_fields_have_the_type_that_is_asked_for(kind: str) -> None:
    good, empty, bad, expected = FIELDS[kind]
    read = getattr(config_fields, kind)
    assert read({"key": good}, "key") == good
    assert read({"key": empty}, "key") == read({"key": None}, "key") == read({}, "key") == empty
    for value in bad:
        with pytest.raises(ValueError, match=f"quantization_config has key = .*; expected {expected}"):
            read({"key": value}, "key")


def test_tuples_are_lists_and_whole_numbers_are_positive() -> None:
    assert config_fields.names({"key": ("a", "b")}, "key") == ["a", "b"]
    assert config_fields.entries({"key": ({"a": 1},)}, "key") == [{"a": 1}]
    assert config_fields.whole({"key": 3}, "key", 7) == 3
    for content in ({}, {"key": None}, {"key": 0}):
        assert config_fields.whole(content, "key", 7) == 7
    for value in (-1, True, 1.5, "3", [2]):
        with pytest.raises(ValueError, match="expected a positive whole number"):
            config_fields.whole({"key": value}, "key", 7)
    with pytest.raises(ValueError, match="a list of strings") as error:
        config_fields.names({"key": "x" * 500}, "key")
    assert "x" * 100 + ";" in str(error.value)
    assert "x" * 101 not in str(error.value)


# --- headers


def header(entries: object) -> bytes:
    return json.dumps(entries).encode()


def entry(start: int, end: int, *shape: int, dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def test_a_header_says_where_tensors_are() -> None:
    raw = header({"b": entry(4, 10, 3, dtype="F16"), "a": entry(0, 4, 2, 2), "none": entry(10, 10, 0, 5)})
    found = parse_header(raw, HERE, 8 + len(raw) + 10)
    start = 8 + len(raw)
    assert found.tensors["a"] == TensorInfo(HERE, "U8", (2, 2), start, start + 4)
    assert found.tensors["b"] == TensorInfo(HERE, "F16", (3,), start + 4, start + 10)
    assert (found.tensors["b"].nbytes, found.tensors["none"].nbytes) == (6, 0)
    assert found.metadata == {}
    raw = header({"__metadata__": {"format": "pt", "count": 3}})
    assert parse_header(raw, HERE, None).metadata == {"format": "pt", "count": "3"}


@pytest.mark.parametrize(
    ("entries", "size", "message"),
    [
        ({"a": entry(0, 4, 4), "b": entry(5, 9, 4)}, 9, r"bytes of b start at \d+; expected \d+ \(gap or overlap\)"),
        ({"a": entry(0, 4, 4), "b": entry(3, 7, 4)}, 7, "gap or overlap"),
        ({"a": entry(1, 5, 4)}, 5, "gap or overlap"),
        ({"a": entry(0, 4, 4)}, 3, "is truncated"),
        ({"a": entry(0, 4, 4)}, 5, "is followed by bytes that belong to no tensor"),
        ({"a": entry(0, 4, 5)}, 4, r"a \(U8 \[5\]\) needs 5 bytes, but has 4"),
        ({"a": entry(0, 4, 3)}, 4, "needs 3 bytes, but has 4"),
        ({"a": entry(0, 1, *[1] * 65)}, 1, "at most 64 axes"),
        ({"a": entry(0, 4, -4)}, 4, "expected whole numbers"),
        ({"a": entry(0, 4, 2**62)}, 4, "expected whole numbers"),
        ({"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, 1, "expected whole numbers"),
        ({"a": {"dtype": "U8", "shape": 4, "data_offsets": [0, 4]}}, 4, "expected whole numbers"),
        ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4, 5]}}, 4, "expected dtype, shape, offsets"),
        ({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, 4, "expected dtype, shape, offsets"),
        ({"a": entry(0, 4, 4, dtype="U3")}, 4, "a has dtype 'U3'; known are F64"),
        ({"__metadata__": [1]}, 0, "has metadata that is list"),
        ([], 0, "has a header that is list"),
    ],
)
def test_a_header_that_contradicts_itself(entries: object, size: int, message: str) -> None:
    raw = header(entries)
    with pytest.raises(ValueError, match=message):
        parse_header(raw, HERE, 8 + len(raw) + size)


def test_what_a_header_may_be() -> None:
    assert parse_header(header({"a": entry(0, 1, *[1] * 64)}), HERE, None).tensors["a"].shape == (1,) * 64
    with pytest.raises(ValueError, match="a name occurs twice"):
        parse_header(b'{"a": 1, "a": 2}', HERE, None)
    with pytest.raises(ValueError, match="is no valid JSON"):
        parse_header(b"{", HERE, None)


def test_a_file_must_be_as_long_as_it_says(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    raw = header({"a": entry(0, 4, 4)})
    good = len(raw).to_bytes(8, "little") + raw + b"1234"
    path.write_bytes(good)
    assert bytes(load(read_header(path).tensors["a"]).tolist()) == b"1234"
    cases = {
        b"": "0 bytes, header of 0",
        good[:7]: "7 bytes",
        good[: 7 + len(raw)]: f"header of {len(raw)}",  # a byte of the header is missing
        (len(good) - 7).to_bytes(8, "little") + good[8:]: "is no complete safetensors file",
        b"PK" + good: "it looks like a pickle, which is never read",
        b"\x80\x02" + good: "it looks like a pickle, which is never read",
    }
    for content, message in cases.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_header(path)
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(ValueError, match="is truncated"):
        read_header(path)


def test_large_tensors_are_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a": torch.arange(300, dtype=torch.int32).view(3, 100), "b": torch.zeros(0, 4), "c": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "model.safetensors")
    for large in (1200, 1201):
        monkeypatch.setattr(headers, "_LARGE", large)
        assert isinstance(headers._memory(1200), bytearray) == (large == 1201)
        for name, found in read_header(tmp_path / "model.safetensors").tensors.items():
            assert torch.equal(load(found), tensors[name])
            assert load(found).dtype == tensors[name].dtype
    found = read_header(tmp_path / "model.safetensors").tensors["a"]
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.safetensors ended while it was read"):
        load(found)


# --- folders


def checkpoint(config: dict[str, Any], folder: Path = Path()) -> Checkpoint:
    return Checkpoint(folder, config, [], {}, {})


def test_the_dtype_of_a_checkpoint() -> None:
    for name in ("bfloat16", "float16", "float32"):
        for config in ({"dtype": name}, {"torch_dtype": f"torch.{name}"}, {"dtype": name, "torch_dtype": "float64"}):
            assert checkpoint(config).dtype == getattr(torch, name)
    assert checkpoint({}).dtype == torch.float32


def test_where_a_configuration_of_quantization_stands(tmp_path: Path) -> None:
    inner, outer = {"quant_method": "inner"}, {"quant_method": "outer"}
    nested = {"text_config": {"quantization_config": inner}}
    assert checkpoint(nested, tmp_path).quantization_config() == inner
    assert checkpoint(nested | {"quantization_config": outer}, tmp_path).quantization_config() == outer
    assert checkpoint({"text_config": 5}, tmp_path).quantization_config() is None
    with pytest.raises(ValueError, match="quantization_config is list; expected an object"):
        checkpoint({"quantization_config": []}, tmp_path).quantization_config()


def test_shards_are_those_of_the_index(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors", {"format": "pt"})
    assert list(Checkpoint.open(tmp_path).tensors) == ["a"]
    save_file({"b": torch.zeros(2)}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"has 2 safetensors files but no model\.safetensors\.index\.json"):
        Checkpoint.open(tmp_path)
    index = tmp_path / headers.INDEX_NAME
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    found = Checkpoint.open(tmp_path)
    assert (list(found.tensors), found.shards) == (["a"], [tmp_path / "one.safetensors"])
    assert found.metadata == {tmp_path / "one.safetensors": {"format": "pt"}}
    index.write_text(json.dumps({"weight_map": {"a": "two.safetensors"}}))
    with pytest.raises(ValueError, match=r"says that a is in two\.safetensors, but it is not"):
        Checkpoint.open(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "c": "one.safetensors"}}))
    with pytest.raises(ValueError, match=r"says that c is in one\.safetensors, but it is not"):
        Checkpoint.open(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "three.safetensors"}}))
    with pytest.raises(ValueError, match=r"names three\.safetensors, which is missing"):
        Checkpoint.open(tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / "two.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    with pytest.raises(ValueError, match=r"a is in both one\.safetensors and two\.safetensors"):
        Checkpoint.open(tmp_path)


# --- contradictions


def model(blocks: int = 2, rows: int = 10, columns: int = 8, **more: TensorInfo) -> dict[str, TensorInfo]:
    tensors = {f"model.layers.{number}.mlp.weight": info(8, 8) for number in range(blocks)}
    return tensors | {"model.embed_tokens.weight": info(rows, columns)} | more


CONFIG = {"num_hidden_layers": 2, "vocab_size": 10, "hidden_size": 8}


def test_what_agrees() -> None:
    for config in (CONFIG, {"text_config": CONFIG, "num_hidden_layers": 7}, CONFIG | {"embedding_size": 6}, {}):
        assert contradictions(config, model(columns=6 if "embedding_size" in config else 8)) == []
    assert contradictions(CONFIG, model(rows=11)) == []
    assert contradictions(CONFIG | {"num_nextn_predict_layers": 1}, model(blocks=3)) == []
    encoder = {f"vision.layers.{number}.weight": info(8, 8) for number in range(5)}
    assert contradictions(CONFIG, model() | encoder) == []
    # Of a packed or second embedding nothing is said, nor of two lists of blocks.
    assert contradictions(CONFIG, model(rows=5) | {"model.embed_tokens.weight": info(5, 4, dtype="U8")}) == []
    assert contradictions(CONFIG, model(rows=5) | {"other.wte.weight": info(6, 4)}) == []
    assert contradictions(CONFIG, model(blocks=5) | {"other.layers.0.weight": info(8, 8)}) == []


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (CONFIG, model(rows=12), "vocab_size is 10, but model.embed_tokens.weight has 12 rows"),
        (CONFIG, model(rows=9), "vocab_size is 10, but model.embed_tokens.weight has 9 rows"),
        (CONFIG, model(columns=9), "hidden_size is 8, but model.embed_tokens.weight has 9 columns"),
        (CONFIG, model(blocks=1), r"num_hidden_layers is 2, but the checkpoint has 1 blocks \(model.layers.\*\)"),
        (CONFIG, model(blocks=3), "num_hidden_layers is 2, but the checkpoint has 3 blocks"),
        (CONFIG | {"num_nextn_predict_layers": 1}, model(blocks=4), "has 4 blocks"),
        ({"text_config": CONFIG}, model(blocks=3), "num_hidden_layers is 2"),
    ],
)
def test_what_contradicts(config: Mapping[str, Any], tensors: dict[str, TensorInfo], message: str) -> None:
    (found,) = contradictions(config, tensors)
    assert re.search(message, found)


def test_more_layers_than_tensors_are_refused() -> None:
    refuse_endless({"num_hidden_layers": 1000}, 5)
    refuse_endless({"num_hidden_layers": 2000, "layers": "many", "vocab_size": 10**9}, 2000)
    for config, where in (
        ({"num_hidden_layers": 1001}, "num_hidden_layers is 1001"),
        ({"vision_config": {"depth": 1e9}}, r"vision_config.depth is 1000000000.0"),
        ({"a": {"b": {"c": {"d": {"e": {"n_layer": 5000}}}}}}, "a.b.c.d.e.n_layer is 5000"),
        ({"first_k_dense_replace": 1001}, "first_k_dense_replace is 1001"),
    ):
        with pytest.raises(ValueError, match=f"config.json says {where}, but the checkpoint has 5 tensors"):
            refuse_endless(config, 5)
        assert len(contradictions(config, {str(number): info(1) for number in range(5)})) == 1


def test_a_tokenizer_that_cannot_be_read(tmp_path: Path) -> None:
    assert tokenizer_problem(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{" + " " * 300)
    problem = tokenizer_problem(tmp_path)
    assert problem is not None
    assert problem.startswith(f"{tmp_path / 'tokenizer.json'} cannot be read: ")
    assert problem.endswith("; take it from the original again")


# --- the hub


def test_what_can_only_be_a_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for name in ("gpt2", "owner/name", "own.er/na-me"):
        assert hub.is_hub_id(name)
    for name in ("here", "a/b/c", "./owner", "/owner", "~/owner", "owner/", Path("owner/name")):
        assert not hub.is_hub_id(name)
    assert hub.local_folder("./here") == Path("here")


def test_tokens_are_checked_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"token": "hf_stored"}
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: found["token"])
    assert hub.checked_token(" hf_given\n") == "hf_given"
    assert hub.checked_token("  ") is None
    for token in (None, True, False):
        assert hub.checked_token(token) is token
    with pytest.raises(ValueError, match="a space or a character beyond ASCII at position 3 of 7") as error:
        hub.checked_token("ab cdef")
    assert "cdef" not in str(error.value)
    found["token"] = "abc\x7f"
    for token in (None, True):
        with pytest.raises(ValueError, match="at position 4 of 4"):
            hub.checked_token(token)
    assert hub.checked_token(False) is False
    assert hub.checked_token("good") == "good"


def test_a_model_of_the_hub_is_downloaded_without_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def download(repo: str, **options: Any) -> str:
        asked.append((repo, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    folder = hub.local_folder("owner/name", revision="dev", token="hf_given", cache_dir="cache")
    assert folder == tmp_path
    ((repo, options),) = asked
    patterns = options.pop("allow_patterns")
    assert (repo, options) == ("owner/name", {"revision": "dev", "token": "hf_given", "cache_dir": "cache"})
    assert "*.safetensors" in patterns
    assert not [pattern for pattern in patterns if pattern.endswith((".bin", ".pt", ".py", "*"))]


def test_of_a_model_of_the_hub_headers_alone_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two shards one is in the cache; the other is opened at its revision, and no more than its header is read."""
    source, cache = tmp_path / "source", tmp_path / "cache"
    source.mkdir()
    cache.mkdir()
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    save_file({"a": torch.zeros(2)}, cache / "model-1.safetensors")
    save_file({"b": torch.zeros(1000)}, source / "model-2.safetensors")
    small = {"config.json": {"dtype": "bfloat16"}, headers.INDEX_NAME: {"weight_map": weight_map}}
    opened: list[Any] = []
    seen: dict[str, list[Any]] = {"info": [], "download": [], "filesystem": []}

    def model_info(repo: str, **options: Any) -> Any:
        seen["info"].append((repo, options))
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in (*small, "x.safetensors")])

    def download(repo: str, name: str, **options: Any) -> str:
        seen["download"].append((repo, options))
        (cache / name).write_text(json.dumps(small[name]))
        return str(cache / name)

    class Filesystem:
        def __init__(self, **options: Any) -> None:
            seen["filesystem"].append(options)

        def open(self, path: str, mode: str, **options: Any) -> Any:
            seen["filesystem"].append((path, mode))
            file = (source / path.rpartition("/")[2]).open(mode)
            opened.append(file)
            size = (source / path.rpartition("/")[2]).stat().st_size

            class Remote:
                def __enter__(self) -> Any:
                    return SimpleNamespace(read=file.read, size=size)

                def __exit__(self, *error: object) -> None:
                    opened.append(file.tell())
                    file.close()

            return Remote()

    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", Filesystem)
    found, readable = hub.open_headers("owner/name", revision="dev", token="hf_given", cache_dir="there")
    assert not readable
    assert (found.folder, found.dtype, sorted(found.tensors)) == (cache, torch.bfloat16, ["a", "b"])
    assert found.tensors["b"].shape == (1000,)
    assert opened[1] == found.tensors["b"].start  # and no further
    options = {"revision": "dev", "token": "hf_given"}
    assert seen["info"] == [("owner/name", options)]
    assert seen["download"] == [("owner/name", options | {"cache_dir": "there"})] * 2
    assert seen["filesystem"] == [{"token": "hf_given"}, ("owner/name@dev/model-2.safetensors", "rb")]
    hub.open_headers("owner/name")
    assert seen["filesystem"][-1] == ("owner/name/model-2.safetensors", "rb")

    weight_map["c"] = "model-2.safetensors"
    with pytest.raises(ValueError, match=r"says that c is in model-2\.safetensors, but it is not"):
        hub.open_headers("owner/name")
    (source / "model-2.safetensors").write_bytes(((100 << 20) + 1).to_bytes(8, "little"))
    with pytest.raises(ValueError, match="is no safetensors file: its header would be 104857601 bytes"):
        hub.open_headers("owner/name")
    del small["config.json"]
    with pytest.raises(ValueError, match=r"owner/name has no config\.json"):
        hub.open_headers("owner/name")

    def refuse(repo: str, **options: Any) -> Any:
        raise OSError("  first\n\n second\nthird")

    monkeypatch.setattr(huggingface_hub, "model_info", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    for call in (hub.open_headers, hub.local_folder):
        with pytest.raises(ValueError, match=r"owner/name is no folder .* did not give it: first second$"):
            call("owner/name")
    assert str(hub._not_found("a", RuntimeError("b"))) == "a is no folder here, and the hub cannot be reached: b"


def test_a_folder_can_be_read_whole(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    found, readable = hub.open_headers(tmp_path)
    assert readable
    assert list(found.tensors) == ["a"]
