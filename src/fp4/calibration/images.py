"""Rows of datasets with images, as the processor of a vision-language model reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp4.calibration.chat_template import BoundedTemplate
from fp4.calibration.formatters import Row, formatter, turns_of

_COLUMNS = ("images", "image")


def image_column(row: Row, named: str | None) -> str | None:
    """The column of a row that holds an image or several; None where no column does.

    Args:
        row: any row of the dataset.
        named: the recipe's name of the column; None looks for one with decoded images.

    Raises:
        ValueError: there is no column of that name.
    """
    if named is not None:
        if named not in row:
            raise ValueError(f"it has no column {named!r}; its columns are {', '.join(row)}")
        return named
    return next((name for name in (*_COLUMNS, *row) if _is_decoded(row.get(name))), None)


def _is_decoded(value: Any) -> bool:
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    return any(base.__module__ == "PIL.Image" for base in type(value).__mro__)


class ImageRows:
    """Turns rows with images into token ids and what else a model reads.

    Args:
        processor: the model's, of tokenizer and images.
        column: the column of the images.
        form: name of the formatter of the text.
        columns: the formatter's columns, as in a recipe.
        row: any row, which shows the columns.
        base: folder that paths of images start from.

    Raises:
        ValueError: a column is missing.
    """

    def __init__(
        self,
        processor: Any,
        column: str,
        form: str,
        columns: str | list[str] | dict[str, str] | None,
        row: Row,
        base: Path,
    ) -> None:
        self.processor, self.column, self.base = processor, column, base
        self.template = BoundedTemplate(processor) if getattr(processor, "chat_template", None) else None
        self.is_chat = form in ("chat_completion", "sharegpt")
        self.turns = turns_of(form, columns, row) if self.is_chat else None
        self.text = None if self.is_chat else formatter(form, columns, row, processor.tokenizer)

    def read(self, row: Row, most: int) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Token ids ``[length]`` of a row, and the model's other inputs; None where its images take too many tokens.

        Args:
            row: the row.
            most: the number of tokens that a sample is cut to; no image is cut.

        Raises:
            ValueError: the template or the processor refuses the row.
        """
        images = self._images(row)
        conversation = self._conversation(row, len(images))
        text = self._rendered(conversation)
        if images and self._mark not in text:
            raise ValueError(f"the chat template has no place for images: it writes no {self._mark}")
        try:
            made = self.processor(
                text=text, images=images or None, return_tensors="pt", add_special_tokens=self.template is None
            )
        except (ValueError, TypeError, IndexError) as error:
            raise ValueError(f"the processor refuses it: {' '.join(str(error).split())}") from error
        loose = [key for key, value in made.items() if not isinstance(value, Tensor)]
        if loose:
            raise ValueError(
                f"the processor makes no tensor of {loose[0]}; calibrate on text alone, or on one image a row"
            )
        tensors = dict(made.items())
        ids, mask = tensors["input_ids"], tensors.pop("attention_mask", None)
        if mask is not None and not bool(mask.all()):
            raise ValueError("the processor pads it; calibration takes samples one by one, without padding")
        if ids.shape[1] > most:
            token = getattr(self.processor, "image_token_id", None)
            if images and (token is None or bool((ids[0, most:] == token).any())):
                return None
            # Inputs of the shape of the ids say something of each token.
            tensors = {key: value[:, :most] if value.shape == ids.shape else value for key, value in tensors.items()}
        return tensors.pop("input_ids")[0].to(torch.int64), tensors

    def _images(self, row: Row) -> list[Any]:
        value = row[self.column]
        values = list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]
        return [self._opened(value) if isinstance(value, str) else value for value in values]

    def _opened(self, path: str) -> Any:
        from PIL import Image

        try:
            with Image.open(self.base / path) as image:
                return image.convert("RGB")
        except OSError as error:
            raise ValueError(f"its image {path} cannot be read: {error}") from error

    def _conversation(self, row: Row, images: int) -> list[dict[str, Any]]:
        """The turns, each with a list of parts, in which every image has its place."""
        if self.turns is None:
            assert self.text is not None
            turns: list[dict[str, Any]] = [{"role": "user", "content": self.text(row)}]
        else:
            turns = self.turns(row)
        turns = [turn | {"content": _parts(turn["content"])} for turn in turns]
        places = sum(part["type"] == "image" for turn in turns for part in turn["content"])
        if not places:
            # Datasets that name no place mean one before the question.
            first = next((turn for turn in turns if turn["role"] == "user"), turns[0])
            first["content"] = [{"type": "image"}] * images + first["content"]
        elif places != images:
            raise ValueError(f"its turns have places for {places} images, and its column {self.column} has {images}")
        return turns

    def _rendered(self, conversation: list[dict[str, Any]]) -> str:
        if self.template is not None:
            try:
                return self.template.apply_chat_template(conversation, tokenize=False)
            except ValueError:
                raise
            except Exception as error:  # a template is a program from elsewhere, which may fail with any error
                said = " ".join(str(error).split()) or type(error).__name__
                raise ValueError(f"the chat template refuses it: {said}") from error
        parts = [part for turn in conversation for part in turn["content"]]
        return "\n".join(self._mark if part["type"] == "image" else part["text"] for part in parts)

    @property
    def _mark(self) -> str:
        """What stands in a text for an image; Gemma's processor looks for the token that begins one."""
        return str(getattr(self.processor, "boi_token", None) or self.processor.image_token)


def _parts(content: Any) -> list[dict[str, Any]]:
    """The content of a turn as parts of type ``image`` and ``text``; what a part says of its image is left out."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, Sequence) or not all(isinstance(part, Mapping) for part in content):
        raise ValueError(f"a turn's content is {type(content).__name__}; expected text or a list of parts")
    parts: list[dict[str, Any]] = []
    for part in content:
        kind = str(part.get("type"))
        if kind.startswith("image"):
            parts.append({"type": "image"})
        elif isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        else:
            raise ValueError(f"a turn has a part of type {kind!r}; calibration reads parts of type 'text' and 'image'")
    return parts
