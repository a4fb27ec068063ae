"""Parts of the pipeline by themselves: batches, hidden states, rows of an embedding, files that are merged, limits."""

from __future__ import annotations

import importlib.metadata
import resource
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import save_small
from torch import Tensor, nn

from fp4.calibration.data import Samples
from fp4.checkpoint.io.headers import Checkpoint, read_header
from fp4.pipeline import build_model, merge_files, report, skeleton
from fp4.pipeline.block_inputs import hidden_of, output_of, same
from fp4.pipeline.hidden_states import HiddenStates
from fp4.pipeline.samples import batches_of
from fp4.pipeline.skeleton import Skeleton, find_blocks
from fp4.pipeline.stream import _ByteLimit
from fp4.pipeline.token_embeddings import reads_rows, rows_filled

# --- samples


def sizes(*lengths: int) -> list[tuple[int, ...]]:
    tokens = [torch.full((length,), number) for number, length in enumerate(lengths)]
    batches = batches_of(Samples(tokens, ""), len(lengths))
    assert torch.equal(torch.cat([batch.ids.flatten() for batch in batches]), torch.cat(tokens))  # in order
    return [tuple(batch.ids.shape) for batch in batches]


def test_batches_are_neighbours_of_one_length_up_to_1024_tokens() -> None:
    assert sizes(512, 512, 512) == [(2, 512), (1, 512)]
    assert sizes(513, 513) == [(1, 513), (1, 513)]
    assert sizes(*[256] * 5) == [(4, 256), (1, 256)]
    assert sizes(8, 8, 9, 8) == [(2, 8), (1, 9), (1, 8)]
    assert sizes(2048) == [(1, 2048)]


def test_tokens_must_be_in_the_vocabulary() -> None:
    assert len(batches_of(Samples([torch.tensor([0, 319])], ""), 320)) == 1
    with pytest.raises(ValueError, match="the tokenizer gives token 320, but the model knows only 320"):
        batches_of(Samples([torch.tensor([1, 2]), torch.tensor([320, 0])], ""), 320)


# --- hidden states


@pytest.mark.parametrize("keep", [True, False])
def test_hidden_states_are_a_sequence(keep: bool, tmp_path: Path) -> None:
    values = [torch.randn(2, 5, 8), torch.randn(1, 3, 8), torch.randn(1, 2, 8)]
    shapes = [tuple(value.shape) for value in values]
    states = HiddenStates(tmp_path / "h", shapes, torch.bfloat16, torch.device("cpu"), keep)
    assert states.nbytes == 2 * 8 * (10 + 3 + 2)
    for value in values:
        states.append(value)
        value.fill_(7)  # what is kept is a copy
    states.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["h"]
    assert len(states) == 3
    assert [state.shape for state in states] == [(2, 5, 8), (1, 3, 8), (1, 2, 8)]
    assert states[0].dtype == torch.bfloat16
    assert not any(bool((state == 7).any()) for state in states)
    assert torch.equal(states[-1], states[2])
    assert [torch.equal(*pair) for pair in zip(states[1:], (states[1], states[2]), strict=True)] == [True, True]
    with pytest.raises(IndexError):
        states[3]
    stored = HiddenStates(tmp_path / "h", shapes, torch.bfloat16, torch.device("cpu"), False)
    assert stored.complete()
    assert all(torch.equal(a, b) for a, b in zip(states, stored, strict=True))
    for path_bytes in (states.nbytes - 1, states.nbytes + 1):
        (tmp_path / "h").write_bytes(bytes(path_bytes))
        assert not stored.complete()
    states.remove()
    states.remove()
    assert not (tmp_path / "h").exists()


# --- rows of the token embedding


def test_an_embedding_holds_the_rows_of_the_tokens_alone(tmp_path: Path) -> None:
    table = torch.randn(20, 6).bfloat16()
    save_file({"first": torch.zeros(3), "table": table}, tmp_path / "model.safetensors")
    info = read_header(tmp_path / "model.safetensors").tensors["table"]
    embedding = nn.Embedding(20, 6, padding_idx=17, device="meta")
    before = embedding.weight
    assert reads_rows(embedding, info)
    assert not reads_rows(nn.Embedding(20, 6, max_norm=1.0), info)
    assert not reads_rows(nn.Embedding(21, 6), info)
    batches = [torch.tensor([[3, 17, 3]]), torch.tensor([[0, 19]])]
    with rows_filled(embedding, info, batches, torch.float32, torch.device("cpu")):
        assert torch.equal(embedding.weight, table[[0, 3, 17, 19]].float())
        assert not embedding.weight.requires_grad
        for batch in batches:
            assert torch.equal(embedding(batch), table[batch].float())
    assert embedding.weight is before
    assert embedding.padding_idx == 17
    with rows_filled(embedding, info, batches[:1], torch.float32, torch.device("cpu")):
        assert len(embedding.weight) == 2
        assert torch.equal(embedding(batches[0]), table[batches[0]].float())  # the hook of before is gone


# --- arguments of blocks


def test_arguments_are_the_same_by_value() -> None:
    one = torch.tensor([1.0, 2.0])
    alike = [
        (one, one.clone()),
        ((one, {"a": [one, None]}), (one.clone(), {"a": [one.clone(), None]})),
        ([1, "x", 2.5, True], [1, "x", 2.5, True]),
        (object, object),
    ]
    different = [
        (one, torch.tensor([1.0, 3.0])),
        (one, one.double()),
        (one, one[None]),
        (one, None),
        ({"a": one}, {"b": one}),
        ({"a": one}, {"a": one, "b": one}),
        ({"a": 1}, {"a": 2}),
        ([one], [one, one]),
        ((1, 2), (1, 3)),
        (1, 1.0),
        (1, True),
        (None, 0),
        (object(), "x"),
        ([1], 1),
        ([], {}),
        ({"a": 1}, [1]),
        (one, [one]),
    ]
    for a, b in alike:
        assert same(a, b)
    for a, b in different:
        assert not same(a, b)
        assert not same(b, a)


def test_hidden_states_come_first_or_by_name() -> None:
    hidden, other = torch.zeros(1), torch.ones(1)
    assert hidden_of((hidden, other), {"hidden_states": other}) is hidden
    assert hidden_of((), {"hidden_states": hidden}) is hidden
    for args, kwargs in (((), {"x": hidden}), ((None, hidden), {})):
        with pytest.raises(ValueError, match="take no hidden states as their first argument"):
            hidden_of(args, kwargs)
    assert output_of(hidden) is hidden
    assert output_of((hidden, other)) is hidden


# --- blocks of a decoder


def test_blocks_are_the_outermost_list_with_most_parameters() -> None:
    def layer(width: int, inner: int = 0) -> nn.Module:
        module = nn.Module()
        module.linear = nn.Linear(width, width)
        module.parts = nn.ModuleList(nn.Linear(width, width) for _ in range(inner))
        return module

    decoder = nn.Module()
    decoder.first = nn.ModuleList(layer(4) for _ in range(5))
    decoder.layers = nn.ModuleList(layer(16, inner=9) for _ in range(2))
    decoder.last = nn.ModuleList(nn.Identity() for _ in range(50))
    assert find_blocks(decoder) == ["layers.0", "layers.1"]
    assert find_blocks(decoder, "model.text") == ["model.text.layers.0", "model.text.layers.1"]
    del decoder.layers, decoder.first
    with pytest.raises(ValueError, match="has no list of blocks"):
        find_blocks(decoder)


def test_the_number_of_modules_is_limited() -> None:
    with build_model._few_modules(3):
        nn.Sequential(nn.Identity(), nn.Identity(), nn.Identity())
    with pytest.raises(ValueError, match=r"more than 3 modules \(3 of Sequential, ...\)"), build_model._few_modules(3):
        nn.Sequential(*(nn.Identity() for _ in range(4)))
    nn.Sequential(*(nn.Identity() for _ in range(4)))


# --- files


def test_merged_files_hold_no_more_than_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 100, 60 and 40 bytes, and 3 tensors of 64 bytes outside of them, in files of up to 200 bytes."""
    parts = {"a": torch.arange(25.0), "b": torch.arange(15.0), "c": torch.arange(10.0)}
    for name, tensor in parts.items():
        save_file({f"blocks.{name}": tensor}, tmp_path / f"part-{name}")
    rest = {f"rest.{number}": torch.full((16,), float(number)) for number in range(3)}
    source = tmp_path / "source"
    source.mkdir()
    save_file(rest | {"blocks.a": torch.zeros(25)}, source / "model.safetensors")
    checkpoint = SimpleNamespace(tensors=read_header(source / "model.safetensors").tensors)
    model = SimpleNamespace(blocks=["blocks"], keys_below=lambda name: [f"{name}.a"], checkpoint=checkpoint)
    monkeypatch.setattr(merge_files, "_SHARD_BYTES", 200)
    steps: list[tuple[str, int, int]] = []
    staging = SimpleNamespace(folder=tmp_path)
    files = [f"part-{name}" for name in parts]
    names = merge_files.assemble(model, staging, files, [], lambda *step: steps.append(step))
    assert names == [f"model-{number:05}-of-00002.safetensors" for number in (1, 2)]
    first, second = (load_file(tmp_path / name) for name in names)
    assert sorted(first) == ["blocks.a", "blocks.b", "blocks.c"]  # just 200 bytes
    assert sorted(second) == ["rest.0", "rest.1", "rest.2"]
    for name, tensor in (first | second).items():
        assert torch.equal(tensor, rest[name] if name in rest else parts[name[-1]])
    assert steps == [("writing", 200, 392), ("writing", 392, 392)]
    # What is there already is not written again, and one file has no number.
    (tmp_path / names[0]).write_bytes(b"")
    assert merge_files.assemble(model, staging, files, [], lambda *step: None) == names
    assert (tmp_path / names[0]).read_bytes() == b""
    monkeypatch.setattr(merge_files, "_SHARD_BYTES", 392)
    assert merge_files.assemble(model, staging, files, [], lambda *step: None) == ["model.safetensors"]
    assert len(load_file(tmp_path / "model.safetensors")) == 6


# --- limits and figures


def test_workers_wait_until_others_hold_less() -> None:
    limit, order = _ByteLimit(10), []
    entered, leave = threading.Event(), threading.Event()

    def hold(nbytes: int, name: str) -> None:
        with limit.taken(nbytes):
            order.append((name, limit.held))
            entered.set()
            leave.wait(30)

    second, third = (threading.Thread(target=hold, args=work) for work in ((7, "second"), (1, "third")))
    with limit.taken(3):
        second.start()
        assert entered.wait(30)  # ten fit
        third.start()
        third.join(0.05)
        assert order == [("second", 10)]
        entered.clear()
    assert entered.wait(30)
    assert order == [("second", 10), ("third", 8)]
    leave.set()
    second.join(30)
    third.join(30)
    assert limit.held == 0
    with limit.taken(11):  # alone, one may hold more
        assert limit.held == 11


def test_the_peak_is_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux counts kilobytes, macOS bytes."""
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5000))
    for platform, peak in (("linux", 5000 * 1024), ("darwin", 5000)):
        monkeypatch.setattr(sys, "platform", platform)
        assert report.peak_memory() == peak


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert report.versions()["torch"] == importlib.metadata.version("torch")

    def missing(name: str) -> str:
        raise report.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(report.importlib.metadata, "version", missing)
    assert set(report.versions()) == {"python", "fp4", "torch", "transformers"}
    assert report.versions()["fp4"] == "unknown"


# --- the skeleton


def test_a_part_is_filled_and_emptied(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_small("llama-tied", tmp_path / "model"))
    model = Skeleton(checkpoint, torch.float32)
    assert model.blocks == [f"model.layers.{number}" for number in range(3)]
    assert sorted(model.keys_outside()) == ["model.embed_tokens.weight", "model.norm.weight"]
    below = model.keys_below("model.layers.1")
    assert len(below) == 9
    assert all(key.startswith("model.layers.1.") for key in below)
    found = model.table()
    assert found is not None
    assert (found[0], found[1]) == (model.model.get_input_embeddings(), "model.embed_tokens.weight")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    with model.filled("model.layers.1", torch.device("cpu")) as block:
        for name, value in block.named_parameters():
            assert torch.equal(value, stored[f"model.layers.1.{name}"].float())
        replaced = nn.Linear(2, 2)
        linear = block.mlp.up_proj
        block.mlp.up_proj = replaced
    assert model.model.get_submodule("model.layers.1.mlp.up_proj") is linear
    assert all(value.is_meta for value in model.model.parameters())
    ids = torch.tensor([[5, 9]])
    with model.outside_filled(torch.device("cpu"), [ids]):
        filled = {name for name, value in model.model.named_parameters() if not value.is_meta}
        assert filled == {"model.embed_tokens.weight", "model.norm.weight"}
        rows: Tensor = model.decoder.embed_tokens(ids)
        assert torch.equal(rows, stored["model.embed_tokens.weight"][ids].float())
        assert not any(buffer.is_meta for buffer in model.decoder.rotary_emb.buffers())
    assert all(value.is_meta for value in (*model.model.parameters(), *model.model.buffers()))


@pytest.mark.parametrize(
    ("errors", "mismatched", "kind", "message"),
    [
        ({"a": "first\nlast"}, [], ValueError, "1 tensors do not fit the model: a: last$"),
        ({}, [("b", (2, 3), (3, 2))], ValueError, r"model: b: stored as \(2, 3\), the model has \(3, 2\)$"),
        ({"a": "last"}, [("b", (2,), (3,))], ValueError, "2 tensors do not fit the model: a: last; b: stored as"),
        ({"a": "bad", "b": "x\nCUDA out of memory: 5 bytes"}, [], MemoryError, "^CUDA out of memory: 5 bytes$"),
        ({}, [], None, ""),
    ],
)
def test_what_transformers_could_not_convert_is_named(
    errors: dict[str, str],
    mismatched: list[tuple[object, ...]],
    kind: type[Exception] | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Skeleton(Checkpoint.open(save_small("llama", tmp_path / "model")), torch.float32)
    found = SimpleNamespace(conversion_errors=errors, mismatched_keys=mismatched)
    monkeypatch.setattr(skeleton, "convert_and_load_state_dict_in_model", lambda *arguments: (found, None))
    with pytest.raises(kind, match=message) if kind else nullcontext():
        model.fill(model.keys_below("model.layers.0"), torch.device("cpu"))
