"""Recipes of calibration data, read from YAML and checked; errors name the line and key of each mistake."""

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
        split: which split of the dataset is read.
        weight: its share of the samples, relative to the other datasets.
        streaming: read no more rows than are needed, without downloading all; they are shuffled within a buffer.
        columns: what the formatter reads: a column or several for ``raw_text``, ``{prompt: ..., answer: ...}`` for
            ``prompt_answer``, the column with the turns for the chat formats. Detected where not named.
        formatter: how a row becomes text. Detected where not named.
        images: the column with an image or a list of images, decoded or as paths, for models that read them. A column
            of decoded images is detected.
    """

    path: str = Field(min_length=1)
    name: str | None = None
    split: str = "train"
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    streaming: bool = False
    columns: str | list[str] | dict[str, str] | None = None
    formatter: Formatter | None = None
    images: str | None = None


class Amounts(_Strict):
    """How many samples are taken, and how long they are.

    Attributes:
        max_samples: samples in all.
        max_seq_len: tokens that a sample is cut to.
        seed: seed of the random order.
        min_token_length: shorter samples are left out.
        oversample_ratio: how many times more rows are taken than samples are wanted, since some will be too short.
    """

    max_samples: int = Field(default=128, ge=1)
    max_seq_len: int = Field(default=512, ge=2)
    seed: int = Field(default=0, ge=0)
    min_token_length: int = Field(default=16, ge=1)
    oversample_ratio: float = Field(default=1.5, ge=1, allow_inf_nan=False)


class Recipe(_Strict):
    """A recipe: datasets, and how much is taken of them."""

    datasets: list[DatasetRecipe] = Field(min_length=1)
    calibration: Amounts = Amounts()


def read_recipe(path: Path) -> Recipe:
    """Read a YAML recipe.

    Raises:
        ValueError: the file is no YAML or no recipe; the message lists every mistake with its line and key.
        OSError: the file cannot be read.
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


def _lines(node: yaml.Node | None, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], int]:
    """The line of every key and list entry of a YAML file, counted from one, by path."""
    found: dict[tuple[Any, ...], int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            found[(*path, key.value)] = key.start_mark.line + 1
            found |= _lines(value, (*path, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            found[(*path, index)] = value.start_mark.line + 1
            found |= _lines(value, (*path, index))
    return found


def _describe(mistake: Any, lines: dict[tuple[Any, ...], int]) -> str:
    """One of pydantic's errors as a phrase that starts with line and key."""
    path = list(mistake["loc"])
    while path and tuple(path) not in lines:
        path.pop()  # a missing key has no line, nor has the branch of a union that pydantic tried
    missing = mistake["type"] == "missing"
    place = [*path, mistake["loc"][-1]] if missing else path
    key = ".".join(str(part) if isinstance(part, str) else f"[{part}]" for part in place).replace(".[", "[")
    line = f"line {lines[tuple(path)]}, " if path else ""
    if mistake["type"] == "extra_forbidden":
        return f"{line}{key}: there is no such key"
    found = "" if missing else f" (found {mistake['input']!r})"
    return f"{line}{key}: {mistake['msg'].lower() if missing else mistake['msg']}{found}"
