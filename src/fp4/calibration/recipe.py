"""Recipes of calibration data: what a YAML file may say, every mistake named with its line and key."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fp4.plain_yaml import read_yaml

Formatter = Literal["raw_text", "prompt_answer", "sharegpt", "chat_completion"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DatasetRecipe(_Strict):
    """One source of samples.

    Attributes:
        path: hub id, folder, or file (jsonl, json, parquet, arrow, csv, txt).
        name: configuration of a hub dataset that has several.
        split: of the dataset.
        weight: its share of the samples, relative to the other datasets.
        streaming: read no more of it than is needed, without downloading all; shuffled within a buffer.
        columns: what the formatter reads: a column or several for ``raw_text``, ``{prompt: ..., answer: ...}`` for
            ``prompt_answer``, the column with the turns for the chat formats. Detected where not named.
        formatter: how a row becomes text. Detected where not named.
    """

    path: str = Field(min_length=1)
    name: str | None = None
    split: str = "train"
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    streaming: bool = False
    columns: str | list[str] | dict[str, str] | None = None
    formatter: Formatter | None = None


class Amounts(_Strict):
    """How many samples are taken, and how long they are.

    Attributes:
        max_samples: samples in all.
        max_seq_len: tokens that a sample is cut to.
        seed: of the random order.
        min_token_length: shorter samples are left out.
        oversample_ratio: how many times more rows are taken than samples are wanted, since some will be too short.
    """

    max_samples: int = Field(default=128, ge=1)
    max_seq_len: int = Field(default=512, ge=2)
    seed: int = Field(default=0, ge=0)
    min_token_length: int = Field(default=16, ge=1)
    oversample_ratio: float = Field(default=1.5, ge=1, allow_inf_nan=False)


class Recipe(_Strict):
    """Datasets, and how much is taken of them."""

    datasets: list[DatasetRecipe] = Field(min_length=1)
    calibration: Amounts = Amounts()


def read_recipe(path: Path) -> Recipe:
    """Read a YAML recipe.

    Raises:
        ValueError: it is no YAML or no recipe; the message lists every mistake with its line and key.
        OSError: it cannot be read.
    """
    try:
        content, node = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error
    lines = _lines(node)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}; expected a mapping with the key 'datasets'")
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        mistakes = [_describe(mistake, lines) for mistake in error.errors()]
        listed = "\n".join(dict.fromkeys(f"  {mistake}" for mistake in mistakes))
        raise ValueError(f"{path} has {len(mistakes)} mistake{'s' if len(mistakes) > 1 else ''}:\n{listed}") from error


def _lines(node: yaml.Node | None, at: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], int]:
    """The line, counted from one, of every key and list entry."""
    found: dict[tuple[Any, ...], int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            found[(*at, key.value)] = key.start_mark.line + 1
            found |= _lines(value, (*at, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            found[(*at, index)] = value.start_mark.line + 1
            found |= _lines(value, (*at, index))
    return found


def _describe(mistake: Any, lines: dict[tuple[Any, ...], int]) -> str:
    path = list(mistake["loc"])
    while path and tuple(path) not in lines:
        path.pop()  # a key that is missing, or the branch of a union that pydantic tried
    missing = mistake["type"] == "missing"
    place = [*path, mistake["loc"][-1]] if missing else path
    key = ".".join(str(part) if isinstance(part, str) else f"[{part}]" for part in place).replace(".[", "[")
    line = f"line {lines[tuple(path)]}, " if path else ""
    if mistake["type"] == "extra_forbidden":
        return f"{line}{key}: there is no such key"
    found = "" if missing else f" (found {mistake['input']!r})"
    return f"{line}{key}: {mistake['msg'].lower() if missing else mistake['msg']}{found}"
