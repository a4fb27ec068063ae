"""Formatters: functions that turn a row of a dataset into the text that a model reads."""

from __future__ import annotations

import contextlib
import json
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
    """Name of the formatter that fits a row.

    Raises:
        ValueError: no formatter fits; the message lists the columns.
    """
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
        name: name of the formatter.
        columns: as in a recipe; None looks for the usual names.
        row: any row, which shows the columns.
        tokenizer: the tokenizer whose chat template the chat formats use.

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


def _turns_column(name: str, columns: str | list[str] | dict[str, str] | None, row: Row) -> str:
    """The column of the turns of a conversation. ValueError if there is none."""
    named = list(columns.values()) if isinstance(columns, dict) else [columns] if isinstance(columns, str) else columns
    if named is not None and len(named) != 1:
        raise ValueError(f"{name} reads one column, the turns; found {named!r}")
    column = named[0] if named else next((key for key in _TURNS[name] if key in row), None)
    if column is None:
        raise ValueError(f"{name} finds no column of turns among {', '.join(row)}; name it with 'columns'")
    _column(row, column)
    return column


def _keys(name: str) -> tuple[str, str]:
    """What a chat format calls the speaker of a turn, and what was said."""
    return ("from", "value") if name == "sharegpt" else ("role", "content")


def turns_of(
    name: str, columns: str | list[str] | dict[str, str] | None, row: Row
) -> Callable[[Row], list[dict[str, Any]]]:
    """The function that turns rows like ``row`` into turns of role and content, which may be a list of parts.

    Args:
        name: name of a chat format.
        columns: as in a recipe.
        row: any row, which shows the columns.

    Raises:
        ValueError: a column is missing.
    """
    column, (role, content) = _turns_column(name, columns, row), _keys(name)

    def turns(row: Row) -> list[dict[str, Any]]:
        speakers = [(str(turn[role]), turn[content]) for turn in row[column]]
        return [{"role": _ROLES.get(speaker.lower(), speaker), "content": said} for speaker, said in speakers]

    return turns


def _chat(
    name: str, columns: str | list[str] | dict[str, str] | None, row: Row, tokenizer: Any
) -> Callable[[Row], str]:
    column, (role, content) = _turns_column(name, columns, row), _keys(name)
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{name} needs the tokenizer's chat template, and it has none; use raw_text or prompt_answer")

    def text(row: Row) -> str:
        turns = [_turn(turn, role, content, number) for number, turn in enumerate(row[column])]
        return _rendered(tokenizer, turns, _tools(row))

    return text


def _turn(turn: Row, role: str, content: str, number: int) -> dict[str, Any]:
    """One turn as chat templates expect it: role, content, and the row's other fields (tool calls, their ids)."""
    speaker = str(turn[role])
    made: dict[str, Any] = {"role": _ROLES.get(speaker.lower(), speaker)}
    # Datasets give a row every field that any row has, filled with None.
    made |= {key: value for key, value in turn.items() if key not in (role, content) and value is not None}
    if "tool_calls" in made:
        made["tool_calls"] = [_tool_call(call) for call in made["tool_calls"]]
    said = turn.get(content) if made.get("tool_calls") else turn[content]
    if said is None and not made.get("tool_calls"):
        raise ValueError(f"turn {number} ({speaker}) has neither content nor tool calls")
    if isinstance(said, Sequence) and not isinstance(said, str):
        said = _joined(said, f"turn {number} ({speaker})")
    return made | {"content": said}


def _tool_call(call: Row) -> dict[str, Any]:
    """A tool call with its arguments as an object, as templates print it; OpenAI's format has JSON in a string."""
    function = {key: value for key, value in (call.get("function") or {}).items() if value is not None}
    with contextlib.suppress(TypeError, ValueError):
        if isinstance(arguments := json.loads(function["arguments"]), dict):
            function["arguments"] = arguments
    return {key: value for key, value in call.items() if value is not None} | {"function": function}


def _joined(parts: Sequence[Any], where: str) -> str:
    """The joined text of a content in OpenAI's list of parts."""
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"{where} has a part of type {kind!r}; calibration reads parts of type 'text' alone")
    return "".join(part["text"] for part in parts)


def _tools(row: Row) -> list[Any] | None:
    """The tools that a row offers, None for none; some datasets keep them as JSON in a string."""
    tools = row.get("tools")
    if isinstance(tools, str):
        with contextlib.suppress(ValueError):
            tools = json.loads(tools)
    return tools if isinstance(tools, list) and tools else None


def _rendered(tokenizer: Any, turns: list[dict[str, Any]], tools: list[Any] | None) -> str:
    """The turns rendered by the tokenizer's chat template. ValueError with its reason where it refuses them."""
    silent = [turn for turn in turns if turn["content"] is None]
    if silent and "tool_calls" not in str(tokenizer.chat_template):
        raise ValueError("a turn calls a tool and says nothing, and the chat template has no place for tool calls")
    filled = [{**turn, "content": turn["content"] or ""} for turn in turns]
    refusal = ""
    for attempt in (turns, filled) if silent else (turns,):
        try:
            return str(tokenizer.apply_chat_template(attempt, tools=tools, tokenize=False))
        except ValueError:
            raise
        except Exception as error:  # a template is a program from elsewhere, which may fail with any error
            refusal = refusal or " ".join(str(error).split()) or type(error).__name__
    raise ValueError(f"the chat template refuses it: {refusal}")
