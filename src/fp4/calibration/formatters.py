"""From a row of a dataset to the text that a model would read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

_TEXT = ("text", "content", "document", "body", "article", "story", "code")
_PROMPT = ("prompt", "question", "instruction", "query", "problem", "input")
_ANSWER = ("answer", "response", "output", "completion", "chosen", "solution", "target")
_TURNS = {"chat_completion": ("messages", "conversation", "chat"), "sharegpt": ("conversations", "conversation")}
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


def detect(row: Row) -> str:
    """Name of the formatter that fits a row. ValueError listing its columns if none does."""
    for name in ("chat_completion", "sharegpt"):
        keys = {"chat_completion": {"role", "content"}, "sharegpt": {"from", "value"}}[name]
        for value in row.values():
            if isinstance(value, Sequence) and value and isinstance(value[0], Mapping) and keys <= set(value[0]):
                return name
    if _first(row, _PROMPT) and _first(row, _ANSWER):
        return "prompt_answer"
    if _first(row, _TEXT) or sum(isinstance(value, str) for value in row.values()) == 1:
        return "raw_text"
    raise ValueError(f"no formatter fits its columns ({', '.join(row)}); name one with 'formatter', and its 'columns'")


def _first(row: Row, names: Sequence[str]) -> str | None:
    return next((name for name in names if isinstance(row.get(name), str)), None)


def _column(row: Row, name: str) -> Any:
    if name not in row:
        raise ValueError(f"it has no column {name!r}; its columns are {', '.join(row)}")
    return row[name]


def formatter(
    name: str, columns: str | list[str] | dict[str, str] | None, row: Row, tokenizer: Any
) -> Callable[[Row], str]:
    """The function that turns rows like ``row`` into text.

    Args:
        name: of the formatter.
        columns: as in a recipe; None looks for the usual names.
        tokenizer: whose chat template the chat formats use.

    Raises:
        ValueError: a column is missing, or the tokenizer has no chat template.
    """
    if name == "raw_text":
        return _raw_text(columns, row)
    if name == "prompt_answer":
        return _prompt_answer(columns, row)
    return _chat(name, columns, row, tokenizer)


def _raw_text(columns: str | list[str] | dict[str, str] | None, row: Row) -> Callable[[Row], str]:
    if columns is None:
        only = [name for name, value in row.items() if isinstance(value, str)]
        found = _first(row, _TEXT) or (only[0] if len(only) == 1 else None)
        if found is None:
            raise ValueError(f"raw_text finds no column of text among {', '.join(row)}; name it with 'columns'")
        names = [found]
    else:
        names = (
            [columns] if isinstance(columns, str) else list(columns.values() if isinstance(columns, dict) else columns)
        )
    for name in names:
        _column(row, name)
    return lambda row: "\n".join(str(row[name]) for name in names if row[name])


def _prompt_answer(columns: str | list[str] | dict[str, str] | None, row: Row) -> Callable[[Row], str]:
    if isinstance(columns, dict):
        unknown = set(columns) ^ {"prompt", "answer"}
        if unknown:
            raise ValueError(f"prompt_answer needs the columns 'prompt' and 'answer', found {', '.join(columns)}")
        prompt, answer = columns["prompt"], columns["answer"]
    elif isinstance(columns, list) and len(columns) == 2:
        prompt, answer = columns
    elif columns is None:
        found = _first(row, _PROMPT), _first(row, _ANSWER)
        if None in found:
            raise ValueError(
                f"prompt_answer finds no columns of prompt and answer among {', '.join(row)}; name them with "
                "'columns: {prompt: ..., answer: ...}'"
            )
        prompt, answer = str(found[0]), str(found[1])
    else:
        raise ValueError(f"prompt_answer needs two columns, found {columns!r}")
    _column(row, prompt), _column(row, answer)
    return lambda row: f"{row[prompt]}\n{row[answer]}"


def _chat(
    name: str, columns: str | list[str] | dict[str, str] | None, row: Row, tokenizer: Any
) -> Callable[[Row], str]:
    named = list(columns.values()) if isinstance(columns, dict) else [columns] if isinstance(columns, str) else columns
    if named is not None and len(named) != 1:
        raise ValueError(f"{name} reads one column, the turns; found {named!r}")
    column = named[0] if named else next((key for key in _TURNS[name] if key in row), None)
    if column is None:
        raise ValueError(f"{name} finds no column of turns among {', '.join(row)}; name it with 'columns'")
    _column(row, column)
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{name} needs the tokenizer's chat template, and it has none; use raw_text or prompt_answer")
    role, content = ("from", "value") if name == "sharegpt" else ("role", "content")

    def text(row: Row) -> str:
        turns = []
        for turn in row[column]:
            speaker = str(turn[role])
            turns.append({"role": _ROLES.get(speaker.lower(), speaker), "content": turn[content]})
        return str(tokenizer.apply_chat_template(turns, tokenize=False))

    return text
