"""Calibration data: recipes, formatters, plain files, and how every mistake is named."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import CHAT_TEMPLATE, TEXT, tokenizer

from fp4.calibration.data import Samples, from_recipe, load_samples
from fp4.calibration.formatters import detect, formatter
from fp4.calibration.recipe import Amounts, DatasetRecipe, Recipe, read_recipe


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sentences(count: int, words: int = 12) -> list[dict[str, object]]:
    return [{"text": " ".join(f"w{i}x{j}" for j in range(words))} for i in range(count)]


def decoded(samples: Samples) -> list[str]:
    made = tokenizer()
    return [made.decode(sample) for sample in samples.tokens]


# --- plain text


def test_plain_text_is_taken_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    samples = load_samples(path, tokenizer(), 3, 50)
    ids = tokenizer()(TEXT, add_special_tokens=False).input_ids
    assert [sample.tolist() for sample in samples.tokens] == [ids[:50], ids[50:100], ids[100:150]]
    assert samples.description == "the first 3 x 50 tokens of text.txt"
    assert not samples.warnings


def test_short_text_warns_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("x" * 130)
    samples = load_samples(path, tokenizer(), 9, 50)
    assert [len(sample) for sample in samples.tokens] == [50, 50]
    assert "130 tokens" in samples.warnings[0]
    path.write_text("short")
    assert [len(sample) for sample in load_samples(path, tokenizer(), 9, 50).tokens] == [5]


@pytest.mark.parametrize("content", ["", "x"])
def test_empty_text_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(content)
    with pytest.raises(ValueError, match=r"text.txt holds \d tokens"):
        load_samples(tmp_path / "text.txt", tokenizer())


def test_default_text_works_offline() -> None:
    samples = load_samples(None, tokenizer(), 4, 64)
    assert len(samples.tokens) == 4
    assert "comes with fp4" in samples.description


# --- recipes


def test_recipe_mixes_datasets_by_weight(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"aaaa {i} " * 8} for i in range(100)])
    write_jsonl(tmp_path / "b.jsonl", [{"question": f"bbbb {i} " * 8, "answer": "yes"} for i in range(100)])
    (tmp_path / "recipe.yaml").write_text(
        "datasets:\n"
        "  - path: a.jsonl\n"
        "    weight: 3\n"
        "  - path: b.jsonl\n"
        "    formatter: prompt_answer\n"
        "calibration: {max_samples: 40, max_seq_len: 24, seed: 1, min_token_length: 4, oversample_ratio: 1}\n"
    )
    samples = load_samples(tmp_path / "recipe.yaml", tokenizer())
    texts = decoded(samples)
    assert len(texts) == 40
    assert sum("aaaa" in text for text in texts) == 30
    assert all(len(sample) == 24 for sample in samples.tokens)
    again = load_samples(tmp_path / "recipe.yaml", tokenizer())
    assert samples.sha256 == again.sha256
    assert samples.sha256 != load_samples(tmp_path / "recipe.yaml", tokenizer(), seed=2).sha256
    assert len(load_samples(tmp_path / "recipe.yaml", tokenizer(), samples=10).tokens) == 10


def test_oversampling_makes_up_for_short_rows(tmp_path: Path) -> None:
    rows = [row for pair in zip(sentences(60), [{"text": "no"}] * 60, strict=True) for row in pair]
    write_jsonl(tmp_path / "a.jsonl", rows)
    recipe = "datasets: [{path: a.jsonl}]\ncalibration: {max_samples: 30, min_token_length: 8, oversample_ratio: %s}\n"
    (tmp_path / "few.yaml").write_text(recipe % 1)
    few = load_samples(tmp_path / "few.yaml", tokenizer())
    assert 0 < len(few.tokens) < 30
    assert "30 were asked for" in few.warnings[0]
    (tmp_path / "enough.yaml").write_text(recipe % 3)
    enough = load_samples(tmp_path / "enough.yaml", tokenizer())
    assert len(enough.tokens) == 30
    assert not enough.warnings


def test_streaming_gives_samples(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", sentences(50))
    (tmp_path / "r.yaml").write_text("datasets: [{path: a.jsonl, streaming: true}]\ncalibration: {max_samples: 8}\n")
    assert len(load_samples(tmp_path / "r.yaml", tokenizer()).tokens) == 8


def test_files_and_folders_without_a_recipe(tmp_path: Path) -> None:
    import datasets

    made = datasets.Dataset.from_list(sentences(20))
    write_jsonl(tmp_path / "rows.jsonl", sentences(20))
    made.to_parquet(tmp_path / "rows.parquet")
    made.save_to_disk(str(tmp_path / "saved"))
    expected = set(decoded(load_samples(tmp_path / "rows.jsonl", tokenizer(), 30)))
    assert len(expected) == 20
    for name in ("rows.parquet", "saved"):
        assert set(decoded(load_samples(tmp_path / name, tokenizer(), 30))) == expected


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "arrow", "txt"])
def test_files_of_every_kind_in_a_recipe(kind: str, tmp_path: Path) -> None:
    import datasets

    made = datasets.Dataset.from_list(sentences(12))
    if kind == "txt":
        (tmp_path / "rows.txt").write_text("\n\n".join(str(row["text"]) for row in sentences(12)))
    elif kind == "arrow":
        made.save_to_disk(str(tmp_path / "saved"))
        next((tmp_path / "saved").glob("*.arrow")).rename(tmp_path / "rows.arrow")
    else:
        write = {"csv": made.to_csv, "parquet": made.to_parquet}.get(kind, made.to_json)
        write(str(tmp_path / f"rows.{kind}"))
    (tmp_path / "r.yaml").write_text(f"datasets: [{{path: rows.{kind}}}]\n")
    samples = load_samples(tmp_path / "r.yaml", tokenizer())
    assert sorted(decoded(samples)) == sorted(str(row["text"]) for row in sentences(12))
    assert "12 samples" in samples.warnings[0]


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_split_is_chosen_and_a_wrong_one_named(streaming: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder/train.jsonl", [{"text": "training " * 4}] * 9)
    write_jsonl(tmp_path / "folder/test.jsonl", [{"text": "testing " * 4}] * 9)
    recipe = "datasets: [{path: folder, split: %s, streaming: %s}]\ncalibration: {max_samples: 4}\n"
    for split, word in (("test", "testing"), ("train", "training")):
        (tmp_path / "r.yaml").write_text(recipe % (split, streaming))
        assert all(text.startswith(word) for text in decoded(load_samples(tmp_path / "r.yaml", tokenizer())))
    (tmp_path / "r.yaml").write_text(recipe % ("tests", streaming))
    with pytest.raises(ValueError, match=r"no split 'tests'; its splits are .*train"):
        load_samples(tmp_path / "r.yaml", tokenizer())


def test_what_is_kept_is_the_beginning_of_one_random_order(tmp_path: Path) -> None:
    """Trimmed to exactly ``max_samples``, fewer are the first of more where the rows that are drawn are the same."""
    write_jsonl(tmp_path / "a.jsonl", sentences(40))
    recipe = "datasets: [{path: a.jsonl}]\ncalibration: {max_samples: %d, oversample_ratio: %g, seed: 7}\n"
    found = []
    for count, ratio in ((30, 1), (20, 1.5), (6, 5)):
        (tmp_path / "r.yaml").write_text(recipe % (count, ratio))
        found.append(decoded(load_samples(tmp_path / "r.yaml", tokenizer())))
        assert len(found[-1]) == count
    assert found[1] == found[0][:20]
    assert found[2] == found[0][:6]
    assert found[0] != sorted(found[0])


def test_no_sample_is_long_enough(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "hi"}] * 5)
    with pytest.raises(ValueError, match=r"gave no sample of at least 16 tokens"):
        load_samples(tmp_path / "a.jsonl", tokenizer())


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("datasets: []\n", ["line 1, datasets"]),
        ("data: []\n", ["line 1, data: there is no such key", "datasets: field required"]),
        ("datasets:\n  - path: x\n    wieght: 2\n", ["line 3, datasets[0].wieght: there is no such key"]),
        ("datasets:\n  - split: train\n", ["line 2, datasets[0].path: field required"]),
        (
            "datasets:\n  - path: x\n  - path: y\n    weight: -1\n",
            ["line 4, datasets[1].weight", "greater than 0", "-1"],
        ),
        ("datasets:\n  - path: x\n    formatter: alpaca\n", ["line 3, datasets[0].formatter", "raw_text", "alpaca"]),
        ("datasets: [{path: x}]\ncalibration:\n  max_samples: many\n", ["line 3, calibration.max_samples", "many"]),
        ("datasets: [\n", ["no valid YAML", "line 2"]),
        ("- path: x\n", ["expected a mapping"]),
    ],
)
def test_mistakes_in_a_recipe_are_named(text: str, messages: list[str], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"recipe\.yaml") as raised:
        read_recipe(path)
    for message in messages:
        assert message in str(raised.value)


def test_all_mistakes_are_listed_at_once(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("datasets:\n  - path: x\n    weight: 0\n    streaming: perhaps\ncalibration: {max_seq_len: 1}\n")
    with pytest.raises(ValueError, match="3 mistakes"):
        read_recipe(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("absent.yaml", "is no file"),
        ("absent.jsonl", "no file or folder"),
        ("absent.txt", "cannot be read"),
        ("./absent", "no file or folder"),
        ("file.zip", "expected one of"),
    ],
)
def test_what_cannot_be_found(data: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        load_samples(data, tokenizer())


def test_wrong_column_names_what_there_is(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", sentences(3))
    (tmp_path / "r.yaml").write_text("datasets: [{path: a.jsonl, columns: body, formatter: raw_text}]\n")
    with pytest.raises(ValueError, match=r"datasets\[0\] \(a.jsonl\): it has no column 'body'; its columns are text"):
        load_samples(tmp_path / "r.yaml", tokenizer())


def test_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"a.parquet\): it cannot be loaded"):
        load_samples(tmp_path / "a.parquet", tokenizer())


# --- formatters

CHAT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]
SHARE = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello."}]


@pytest.mark.parametrize(
    ("row", "name", "text"),
    [
        ({"text": "abc", "id": 1}, "raw_text", "abc"),
        ({"whatever": "abc"}, "raw_text", "abc"),
        ({"question": "1+1?", "answer": "2"}, "prompt_answer", "1+1?\n2"),
        ({"instruction": "Say hi", "output": "hi"}, "prompt_answer", "Say hi\nhi"),
        ({"messages": CHAT}, "chat_completion", "<user> Hello?\n<assistant> Hello.\n"),
        ({"conversations": SHARE}, "sharegpt", "<user> Hello?\n<assistant> Hello.\n"),
    ],
)
def test_formatters_are_detected(row: dict[str, object], name: str, text: str) -> None:
    assert detect(row) == name
    assert formatter(name, None, row, tokenizer())(row) == text


def test_columns_choose_what_is_read() -> None:
    row = {"q": "1+1?", "a": "2", "more": "x", "turns": CHAT}
    assert formatter("prompt_answer", {"prompt": "q", "answer": "a"}, row, None)(row) == "1+1?\n2"
    assert formatter("raw_text", ["q", "more"], row, None)(row) == "1+1?\nx"
    assert formatter("chat_completion", "turns", row, tokenizer())(row) == "<user> Hello?\n<assistant> Hello.\n"


def test_chat_needs_a_template() -> None:
    with pytest.raises(ValueError, match="needs the tokenizer's chat template"):
        formatter("chat_completion", None, {"messages": CHAT}, tokenizer(chat_template=None))
    assert tokenizer().chat_template == CHAT_TEMPLATE


def test_rows_that_fit_nothing() -> None:
    with pytest.raises(ValueError, match="no formatter fits its columns"):
        detect({"a": 1, "b": 2})


def test_chats_get_no_second_beginning(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "chat.jsonl", [{"messages": CHAT * 3}] * 4)
    first = load_samples(tmp_path / "chat.jsonl", tokenizer(), 2).tokens[0]
    assert isinstance(first, torch.Tensor)
    assert tokenizer().decode(first) == "<user> Hello?\n<assistant> Hello.\n" * 3


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALLS = [
    {"role": "user", "content": "What is 1 + 2, as a function would have it?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": "3"},
]
# As Qwen's and Llama's do it: null is taken, arguments are an object.
TOOL_TEMPLATE = (
    "{% if tools %}[{% for tool in tools %}{{ tool.function.name }}{% endfor %}]{% endif %}"
    "{% for message in messages %}<{{ message.role }}>"
    "{% if message.content is not none %}{{ message.content }}{% endif %}"
    "{% for call in message.tool_calls %}{{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor %}"
    "{% endfor %}"
)
# As Gemma's does it.
NO_SYSTEM = (
    "{% for message in messages %}{% if message.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{{ message.content }}{% endfor %}"
)


def test_rows_of_tool_calls(tmp_path: Path) -> None:
    rows = [{"messages": CHAT * 3}, {"messages": CALLS, "tools": TOOLS}]
    path = write_jsonl(tmp_path / "calls.jsonl", rows)
    found = set(decoded(load_samples(path, tokenizer(TOOL_TEMPLATE), 2)))
    assert found == {
        "<user>Hello?<assistant>Hello." * 3,
        '[add]<user>What is 1 + 2, as a function would have it?<assistant>add({"a": 1, "b": 2})<tool>3',
    }


def test_null_becomes_empty_only_where_the_template_does_not_take_it() -> None:
    template = "{% for m in messages %}{{ m.content + '|' }}{{ m.tool_calls[0].id if m.tool_calls }}{% endfor %}"
    row = {"messages": CALLS}
    text = formatter("chat_completion", None, row, tokenizer(template))(row)
    assert text == "What is 1 + 2, as a function would have it?||13|"


def test_parts_of_text_are_read_as_their_text() -> None:
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "?"}]
    row = {"messages": [{"role": "user", "content": parts}]}
    assert formatter("chat_completion", None, row, tokenizer())(row) == "<user> Hello?\n"


@pytest.mark.parametrize(
    ("template", "turns", "reason"),
    [
        (
            CHAT_TEMPLATE,
            CALLS,
            "a turn calls a tool and says nothing, and the chat template has no place for tool calls",
        ),
        (NO_SYSTEM, [{"role": "system", "content": "Be kind."}], "the chat template refuses it: System role not supp"),
        (
            CHAT_TEMPLATE,
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "turn 0 (user) has a part of type 'image_url'; calibration reads parts of type 'text' alone",
        ),
        (CHAT_TEMPLATE, [{"role": "user", "content": None}], "turn 0 (user) has neither content nor tool calls"),
        ("{{ messages[0].content + 1 }}", CHAT, "the chat template refuses it: can only concatenate str"),
    ],
)
def test_a_row_that_the_template_rejects_is_named(
    template: str, turns: list[dict[str, object]], reason: str, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": CHAT}, {"messages": turns}])
    if template.startswith("{{"):
        path = write_jsonl(path, [{"messages": turns}])
    if "image_url" not in reason:  # datasets takes no empty line beside values of mixed types
        path.write_text("\n" + path.read_text())
    line = len(path.read_text().splitlines())
    with pytest.raises(ValueError, match=re.escape(f"datasets[0] ({path}): line {line}: {reason}")) as raised:
        load_samples(path, tokenizer(template), 2)
    assert "\n" not in str(raised.value)


def test_rows_of_other_files_have_numbers(tmp_path: Path) -> None:
    import datasets

    rows = [{"messages": CHAT}, {"messages": [{"role": "system", "content": "x"}, *CHAT]}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "chat.parquet")
    with pytest.raises(ValueError, match=r"chat\.parquet\): row 1 \(counted from 0\): the chat template refuses it"):
        load_samples(tmp_path / "chat.parquet", tokenizer(NO_SYSTEM), 2)
    write_jsonl(tmp_path / "chat.jsonl", rows[1:])
    (tmp_path / "r.yaml").write_text("datasets: [{path: chat.jsonl, streaming: true}]\n")
    with pytest.raises(ValueError, match=r"the row \{'messages': .*\.\.\.: the chat template refuses it"):
        load_samples(tmp_path / "r.yaml", tokenizer(NO_SYSTEM), 2)


@pytest.mark.parametrize(
    ("line", "reason"), [('{"text": }', "is no valid JSON: Expecting value"), ("[1, 2]", "holds list; expected an obj")]
)
def test_a_damaged_line_is_named(line: str, reason: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", sentences(2))
    path.write_text(path.read_text() + "\n" + line + "\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl\): line 4 {reason}"):
        load_samples(path, tokenizer())


def test_an_empty_line_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}, {"text": ["x"]}])
    path.write_text("\n" + path.read_text())
    with pytest.raises(ValueError, match=r"a\.jsonl\): line 1 is empty"):
        load_samples(path, tokenizer())


# --- amounts, to the sample and to the token


class Letters:
    """Every letter a token of its own number, a 1 before them where special tokens are asked for."""

    chat_template = CHAT_TEMPLATE

    def __call__(self, text: str, add_special_tokens: bool, **kwargs: Any) -> Any:
        assert kwargs == {"return_tensors": "pt", "verbose": False}
        numbers = [1] * add_special_tokens + [ord(letter) for letter in text]
        return type("Encoding", (), {"input_ids": torch.tensor([numbers])})

    def apply_chat_template(self, turns: list[dict[str, str]], tools: object, tokenize: bool) -> str:
        assert not tokenize
        return "".join(f"[{turn['role']}: {turn['content']}]" for turn in turns)


def drawn(path: Path, rows: list[dict[str, object]], dataset: dict[str, Any], **amounts: Any) -> list[str]:
    """The texts of the samples that a recipe gives, without the special token."""
    write_jsonl(path / "rows.jsonl", rows)
    recipe = Recipe(datasets=[DatasetRecipe(path="rows.jsonl", **dataset)], calibration=Amounts(**amounts))
    found = from_recipe(recipe, Letters(), path).tokens
    assert all(sample.dtype == torch.int64 and sample.dim() == 1 for sample in found)
    return ["".join(map(chr, sample[sample != 1].tolist())) for sample in found]


def test_samples_are_cut_and_the_shortest_that_is_kept_is_as_long_as_asked(tmp_path: Path) -> None:
    rows = [{"text": letter * length} for letter, length in (("a", 4), ("b", 5), ("c", 6), ("d", 9), ("e", 0))]
    # One token more than letters: 5, 6, 7, 10 and none.
    found = drawn(tmp_path, rows, {}, min_token_length=6, max_seq_len=7)
    assert sorted(found) == ["b" * 5, "c" * 6, "d" * 6]
    assert sorted(drawn(tmp_path, rows, {}, min_token_length=1, max_seq_len=2)) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("formatter", ["raw_text", "prompt_answer", "chat_completion", "sharegpt"])
def test_only_what_has_no_template_begins_with_a_special_token(formatter: str, tmp_path: Path) -> None:
    row = {"text": "abc", "prompt": "d", "answer": "e", "messages": CHAT, "conversations": SHARE}
    write_jsonl(tmp_path / "rows.jsonl", [row])
    dataset = DatasetRecipe(path="rows.jsonl", formatter=formatter)
    recipe = Recipe(datasets=[dataset], calibration=Amounts(min_token_length=1))
    (sample,) = from_recipe(recipe, Letters(), tmp_path).tokens
    assert (sample[0] == 1) == (formatter in ("raw_text", "prompt_answer"))


def test_plain_text_has_no_special_tokens(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abcdefg")
    assert [sample.tolist() for sample in load_samples(tmp_path / "text.txt", Letters(), 9, 3).tokens] == [
        [97, 98, 99],
        [100, 101, 102],
    ]
    whole = load_samples(tmp_path / "text.txt", Letters(), 2, 3)
    assert not whole.warnings
    assert (len(whole.tokens), whole.count) == (2, 6)
    assert load_samples(tmp_path / "text.txt", Letters(), 3, 3).warnings == [
        "text.txt holds 7 tokens: 2 samples of 3 tokens, 3 of 3 were asked for"
    ]
    assert load_samples(tmp_path / "text.txt", Letters(), 1, 8).warnings == [
        "text.txt holds 7 tokens: 1 samples of 7 tokens, 1 of 8 were asked for"
    ]
    (tmp_path / "two.txt").write_text("ab")
    assert load_samples(tmp_path / "two.txt", Letters(), 1, 8).tokens[0].tolist() == [97, 98]


def test_the_digest_is_of_lengths_and_tokens() -> None:
    samples = Samples([torch.tensor([1, 2]), torch.tensor([300])], "two")
    stored = struct.pack("<Qqq", 2, 1, 2) + struct.pack("<Qq", 1, 300)
    assert samples.sha256 == hashlib.sha256(stored).hexdigest()
    assert samples.count == 3
    assert samples.sha256 != Samples([torch.tensor([1]), torch.tensor([2, 300])], "two").sha256


@pytest.mark.parametrize("streaming", [False, True])
def test_the_seed_chooses_rows_and_their_order(streaming: bool, tmp_path: Path) -> None:
    rows = [{"text": chr(97 + i) * 4} for i in range(20)]
    options = {"min_token_length": 1, "max_samples": 6, "oversample_ratio": 1}

    def chosen(seed: int) -> list[str]:
        return drawn(tmp_path, rows, {"streaming": streaming}, seed=seed, **options)

    found = [chosen(seed) for seed in range(3)]
    assert all(len(texts) == len(set(texts)) == 6 for texts in found)
    assert len({frozenset(texts) for texts in found}) == 3  # which rows
    assert all(texts != sorted(texts) for texts in found)
    assert found[1] == chosen(1)
    # Where all rows are taken their order alone is left to the seed, of each dataset and of all of them together.
    everything = [
        drawn(tmp_path, rows, {"streaming": streaming}, seed=seed, min_token_length=1, max_samples=20)
        for seed in range(2)
    ]
    assert everything[0] != everything[1]
    assert sorted(everything[0]) == sorted(everything[1]) == [row["text"] for row in rows]


def test_the_pool_is_shuffled_by_the_seed(tmp_path: Path) -> None:
    """Of two datasets with equal rows each, only the order of the pool depends on the seed."""
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name * 4}] * 8)

    def order(seed: int) -> str:
        amounts = Amounts(max_samples=16, min_token_length=1, oversample_ratio=1, seed=seed)
        recipe = Recipe(datasets=[DatasetRecipe(path=f"{name}.jsonl") for name in "ab"], calibration=amounts)
        return "".join(chr(sample[1]) for sample in from_recipe(recipe, Letters(), tmp_path).tokens)

    found = {order(seed) for seed in range(4)}
    assert len(found) == 4
    assert {"".join(sorted(letters)) for letters in found} == {"a" * 8 + "b" * 8}
    assert "aaaaaaaabbbbbbbb" not in found


@pytest.mark.parametrize(
    ("weights", "ratio", "counts"),
    [([3, 1], 1, [9, 3]), ([1, 1], 1, [6, 6]), ([2, 1], 1.5, [12, 6]), ([1, 10], 1, [2, 11])],
)
def test_of_each_dataset_so_many_rows_are_drawn(
    weights: list[float], ratio: float, counts: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shares of twelve, times the ratio, rounded up."""
    from fp4.calibration import data

    wanted: list[int] = []
    rows = data._rows
    monkeypatch.setattr(
        data, "_rows", lambda dataset, count, *rest: wanted.append(count) or rows(dataset, count, *rest)
    )
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name * 4}] * 20)
    listed = [DatasetRecipe(path=f"{name}.jsonl", weight=weight) for name, weight in zip("ab", weights, strict=True)]
    amounts = Amounts(max_samples=12, min_token_length=1, oversample_ratio=ratio)
    samples = from_recipe(Recipe(datasets=listed, calibration=amounts), Letters(), tmp_path)
    assert wanted == counts
    assert len(samples.tokens) == 12
    assert not samples.warnings
    assert samples.description == "12 samples of at most 512 tokens, drawn with seed 0 from a.jsonl, b.jsonl"


def test_arguments_take_the_place_of_what_the_recipe_says(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", sentences(20))
    (tmp_path / "r.yaml").write_text(
        "datasets: [{path: a.jsonl}]\ncalibration: {max_samples: 7, max_seq_len: 30, seed: 5, min_token_length: 3}\n"
    )
    assert (
        "7 samples of at most 30 tokens, drawn with seed 5" in load_samples(tmp_path / "r.yaml", Letters()).description
    )
    found = load_samples(tmp_path / "r.yaml", Letters(), 4, 20, 6)
    assert "4 samples of at most 20 tokens, drawn with seed 6" in found.description
    assert [len(sample) for sample in found.tokens] == [20] * 4
    assert "drawn with seed 0" in load_samples(tmp_path / "r.yaml", Letters(), seed=0).description
    assert "drawn with seed 3" in load_samples(tmp_path / "a.jsonl", Letters(), seed=3).description


def test_defaults_of_a_recipe() -> None:
    recipe = Recipe(datasets=[DatasetRecipe(path="x")])
    assert recipe.calibration.model_dump() == {
        "max_samples": 128,
        "max_seq_len": 512,
        "seed": 0,
        "min_token_length": 16,
        "oversample_ratio": 1.5,
    }
    assert recipe.datasets[0].model_dump() == {
        "path": "x",
        "name": None,
        "split": "train",
        "weight": 1.0,
        "streaming": False,
        "columns": None,
        "formatter": None,
        "images": None,
    }


@pytest.mark.parametrize(
    "amounts",
    [
        {"max_samples": 0},
        {"max_seq_len": 1},
        {"seed": -1},
        {"min_token_length": 0},
        {"oversample_ratio": 0.99},
        {"oversample_ratio": float("inf")},
        {"samples": 3},
    ],
    ids=str,
)
def test_amounts_out_of_range(amounts: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(amounts))):
        Amounts(**amounts)
    least = {"max_samples": 1, "max_seq_len": 2, "seed": 0, "min_token_length": 1, "oversample_ratio": 1}
    assert Amounts(**least).model_dump() == least


@pytest.mark.parametrize("weight", [0, -1, float("inf"), float("nan")])
def test_weights_are_positive_numbers(weight: float) -> None:
    with pytest.raises(ValueError, match="weight"):
        DatasetRecipe(path="x", weight=weight)


@pytest.mark.parametrize(
    ("role", "said"),
    [
        ("human", "user"),
        ("User", "user"),
        ("gpt", "assistant"),
        ("assistant", "assistant"),
        ("model", "assistant"),
        ("chatgpt", "assistant"),
        ("bot", "assistant"),
        ("system", "system"),
        ("tool", "tool"),
        ("function", "tool"),
        ("observation", "tool"),
        ("Narrator", "Narrator"),
    ],
)
def test_roles_are_those_of_templates(role: str, said: str) -> None:
    row = {"conversations": [{"from": role, "value": "x"}], "messages": [{"role": role, "content": "y"}]}
    assert formatter("sharegpt", None, row, Letters())(row) == f"[{said}: x]"
    assert formatter("chat_completion", None, row, Letters())(row) == f"[{said}: y]"


def test_columns_are_found_in_the_order_of_their_names() -> None:
    for names in (
        ("text", "content", "document", "body", "article", "story", "code"),
        ("prompt", "question", "instruction", "query", "problem", "input"),
        ("answer", "response", "output", "completion", "chosen", "solution", "target"),
    ):
        for first, second in itertools.pairwise(names):
            row = {second: "later", first: "earlier", "prompt_": 3, "text_": 4}
            if "text" in names:
                assert formatter("raw_text", None, row, None)(row) == "earlier"
            elif "prompt" in names:
                row |= {"target": "a"}
                assert formatter("prompt_answer", None, row, None)(row) == "earlier\na"
            else:
                row |= {"input": "q"}
                assert formatter("prompt_answer", None, row, None)(row) == "q\nearlier"


def test_text_is_joined_by_lines_without_what_is_empty() -> None:
    row = {"title": "T", "text": None, "body": "", "end": "E", "number": 7}
    assert formatter("raw_text", ["title", "text", "body", "end", "number"], row, None)(row) == "T\nE\n7"
    assert formatter("raw_text", {"a": "end", "b": "title"}, row, None)(row) == "E\nT"
    assert formatter("raw_text", "end", row, None)(row) == "E"
    assert formatter("prompt_answer", ["end", "title"], row, None)(row) == "E\nT"


def test_what_a_row_is_taken_for() -> None:
    both = {"messages": CHAT, "conversations": SHARE, "prompt": "a", "answer": "b", "text": "c"}
    assert detect(both) == "chat_completion"
    assert detect(both | {"messages": []}) == "sharegpt"
    assert detect(both | {"messages": [], "conversations": "no list"}) == "prompt_answer"
    assert detect({"prompt": "a", "answer": 1, "text": "c"}) == "raw_text"
    assert detect({"prompt": 1, "answer": "b", "text": "c"}) == "raw_text"
    assert detect({"anything": "c", "number": 1}) == "raw_text"
    assert detect({"turns": [{"role": "user", "content": "x", "more": 1}]}) == "chat_completion"
    for row in ({"a": "x", "b": "y"}, {"turns": [{"role": "user"}]}, {"turns": [{"from": "human"}]}, {"n": 1}):
        with pytest.raises(ValueError, match="no formatter fits its columns"):
            detect(row)


@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [
        ("raw_text", None, "finds no column of text among a, b, n"),
        ("raw_text", ["a", "c"], "no column 'c'; its columns are a, b, n"),
        ("prompt_answer", None, "finds no columns of prompt and answer among a, b, n"),
        ("prompt_answer", {"prompt": "a"}, "needs the columns 'prompt' and 'answer', found prompt"),
        ("prompt_answer", {"prompt": "a", "answer": "b", "more": "n"}, "found prompt, answer, more"),
        ("prompt_answer", {"prompt": "a", "answer": "c"}, "no column 'c'"),
        ("prompt_answer", {"prompt": "c", "answer": "a"}, "no column 'c'"),
        ("prompt_answer", "a", "needs two columns, found 'a'"),
        ("prompt_answer", ["a", "b", "n"], "needs two columns"),
        ("chat_completion", None, "finds no column of turns among a, b, n"),
        ("sharegpt", ["a", "b"], r"sharegpt reads one column, the turns; found \['a', 'b'\]"),
        ("sharegpt", "c", "no column 'c'"),
    ],
)
def test_columns_that_do_not_fit(name: str, columns: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        formatter(name, columns, {"a": "x", "b": "y", "n": 1}, Letters())


def test_turns_are_found_by_the_usual_names() -> None:
    for name, columns in (
        ("chat_completion", ("messages", "conversation", "chat")),
        ("sharegpt", ("conversations", "conversation")),
    ):
        turns = CHAT if name == "chat_completion" else SHARE
        for column in columns:
            row = {column: turns}
            assert formatter(name, None, row, Letters())(row) == "[user: Hello?][assistant: Hello.]"
            row = {"other": turns}
            assert formatter(name, {"turns": "other"}, row, Letters())(row) == "[user: Hello?][assistant: Hello.]"


def test_a_row_of_another_form_is_named(tmp_path: Path) -> None:
    assert drawn(tmp_path, [{"messages": CHAT}] * 4, {}, min_token_length=1)
    recipe = Recipe(datasets=[DatasetRecipe(path="rows.jsonl", formatter="sharegpt", columns="messages")])
    with pytest.raises(
        ValueError, match=r"datasets\[0\] \(rows.jsonl\): line [1-4] does not have the form of sharegpt"
    ):
        from_recipe(recipe, Letters(), tmp_path)
