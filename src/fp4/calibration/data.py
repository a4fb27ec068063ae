"""Calibration samples: token sequences from a recipe, a file, a hub dataset, or the text that comes with fp4."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import itertools
import json
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp4.calibration.chat_template import BoundedTemplate
from fp4.calibration.formatters import detect, formatter
from fp4.calibration.images import ImageRows, image_column
from fp4.calibration.recipe import Amounts, DatasetRecipe, Recipe, read_recipe

logger = logging.getLogger("fp4")

DEFAULT_TEXT = "default.txt"
_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".txt": "text"}
_SHUFFLE_BUFFER = 10_000
_EXCERPT = 60  # characters of a row that errors show where its number is unknown


@dataclass
class Samples:
    """The samples that a model is calibrated on.

    Attributes:
        tokens: token ids of each sample, int64 ``[length]``.
        description: one sentence, for the report and the model card.
        warnings: sentences about what differs from what was asked for.
        inputs: what the model reads beside the tokens of each sample, by argument, such as pixels of images; empty
            where all samples are text.
    """

    tokens: list[Tensor]
    description: str
    warnings: list[str] = field(default_factory=list)
    inputs: list[dict[str, Tensor]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Number of tokens in all samples."""
        return sum(sample.numel() for sample in self.tokens)

    @property
    def sha256(self) -> str:
        """Digest of token ids and lengths, which is the same for equal samples on every machine."""
        digest = hashlib.sha256()
        for sample in self.tokens:
            digest.update(len(sample).to_bytes(8, "little") + sample.to(torch.int64).numpy().astype("<i8").tobytes())
        for inputs in self.inputs:
            for name in sorted(inputs):
                digest.update(name.encode() + inputs[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def load_samples(
    data: str | Path | None,
    tokenizer: Any,
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int | None = None,
    processor: Callable[[], Any] | None = None,
) -> Samples:
    """Load samples to calibrate on.

    Args:
        data: a recipe (``.yaml``), a dataset file (jsonl, json, parquet, arrow, csv), a folder, a hub id, a plain
            ``.txt``, or None for the text that comes with fp4. Of a plain text the first ``samples x seq_len`` tokens
            are taken as they follow each other; everything else is sampled at random as :class:`Recipe` says.
        tokenizer: the model's.
        samples: how many, in place of the recipe's ``max_samples`` or its default.
        seq_len: tokens a sample, in place of ``max_seq_len``.
        seed: of the random order, in place of the recipe's.
        processor: loads the model's processor of text and images, where rows have images; None, or a ValueError that
            says why there is none, for text alone.

    Raises:
        ValueError: the data cannot be read, or has no sample that is long enough; the message names what and where.
    """
    given = {"max_samples": samples, "max_seq_len": seq_len, "seed": seed}
    chosen = {key: value for key, value in given.items() if value is not None}
    path = None if data is None else Path(data)
    if path is None or path.suffix == ".txt":
        amounts = Amounts(**chosen)
        text, name = _plain_text(path)
        return _contiguous(text, name, tokenizer, amounts.max_samples, amounts.max_seq_len)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ValueError(f"{path} is no file; expected a recipe of datasets")
        recipe = read_recipe(path)
        recipe = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update=chosen)})
        return from_recipe(recipe, tokenizer, path.parent, processor)
    recipe = Recipe(datasets=[DatasetRecipe(path=str(data))], calibration=Amounts(**chosen))
    return from_recipe(recipe, tokenizer, processor=processor)


def seed_of(data: str | Path | None) -> int:
    """The seed that ``data`` names where it is a recipe, 0 for anything else.

    Raises:
        ValueError: there is a mistake in the recipe.
    """
    path = None if data is None else Path(data)
    if path is None or path.suffix not in (".yaml", ".yml") or not path.is_file():
        return 0
    return read_recipe(path).calibration.seed


def _plain_text(path: Path | None) -> tuple[str, str]:
    if path is None:
        resource = importlib.resources.files("fp4.calibration") / DEFAULT_TEXT
        return resource.read_text(encoding="utf-8"), "the text that comes with fp4"
    try:
        return path.read_text(encoding="utf-8"), path.name
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from error


def _tokenize(tokenizer: Any, text: str, **kwargs: Any) -> Tensor:
    # The tokenizer would warn of texts longer than the model's context, but these are cut afterwards.
    ids = tokenizer(text, return_tensors="pt", verbose=False, **kwargs).input_ids[0]
    return torch.as_tensor(ids, dtype=torch.int64)


def _contiguous(text: str, name: str, tokenizer: Any, count: int, length: int) -> Samples:
    ids = _tokenize(tokenizer, text, add_special_tokens=False)
    pieces = list(ids[: count * length].split(length))
    if pieces and len(pieces[-1]) < length and len(pieces) > 1:
        pieces.pop()
    if not pieces or len(pieces[0]) < 2:
        raise ValueError(f"{name} holds {len(ids)} tokens; calibration needs at least 2")
    found = Samples(pieces, f"the first {len(pieces)} x {len(pieces[0])} tokens of {name}")
    if len(pieces) < count or len(pieces[0]) < length:
        _warn(
            found,
            f"{name} holds {len(ids)} tokens: {len(pieces)} samples of {len(pieces[0])} tokens, "
            f"{count} of {length} were asked for",
        )
    return found


def _warn(samples: Samples, message: str) -> None:
    samples.warnings.append(message)
    logger.warning("%s", message)


def from_recipe(
    recipe: Recipe, tokenizer: Any, base: Path = Path(), processor: Callable[[], Any] | None = None
) -> Samples:
    """Draw the samples of a recipe.

    From each dataset more rows are taken than its share (``oversample_ratio``), in random order; rows that are too
    short are left out, and of the rest, shuffled together, the first ``max_samples`` remain.

    Args:
        recipe: datasets and amounts.
        tokenizer: the model's.
        base: folder that relative paths start from.
        processor: as for :func:`load_samples`.

    Raises:
        ValueError: a dataset cannot be loaded or formatted, or no sample is long enough.
    """
    amounts = recipe.calibration
    weights = sum(dataset.weight for dataset in recipe.datasets)
    pool: list[tuple[Tensor, dict[str, Tensor]]] = []
    notes: list[str] = []
    for number, dataset in enumerate(recipe.datasets):
        wanted = math.ceil(amounts.max_samples * dataset.weight / weights * amounts.oversample_ratio)
        try:
            pool += _draw(dataset, wanted, amounts, tokenizer, base, processor, notes)
        except ValueError as error:
            raise ValueError(f"datasets[{number}] ({dataset.path}): {error}") from error
    random.Random(amounts.seed).shuffle(pool)
    kept = pool[: amounts.max_samples]
    names = ", ".join(dataset.path for dataset in recipe.datasets)
    if not kept:
        raise ValueError(f"{names} gave no sample of at least {amounts.min_token_length} tokens (min_token_length)")
    images = sum(bool(inputs) for _, inputs in kept)
    found = Samples(
        [tokens for tokens, _ in kept],
        f"{len(kept)} samples of at most {amounts.max_seq_len} tokens{f', {images} with images' if images else ''}, "
        f"drawn with seed {amounts.seed} from {names}",
        inputs=[inputs for _, inputs in kept] if images else [],
    )
    for note in dict.fromkeys(notes):
        _warn(found, note)
    if len(kept) < amounts.max_samples:
        _warn(
            found,
            f"{names} gave {len(kept)} samples of at least {amounts.min_token_length} tokens, "
            f"{amounts.max_samples} were asked for",
        )
    return found


def _draw(
    dataset: DatasetRecipe,
    wanted: int,
    amounts: Amounts,
    tokenizer: Any,
    base: Path,
    processor: Callable[[], Any] | None,
    notes: list[str],
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """The samples among ``wanted`` random rows of a dataset that are long enough: tokens and the other inputs."""
    rows = _rows(dataset, wanted, amounts.seed, base)
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    read: Callable[[dict[str, Any]], tuple[Any, dict[str, Tensor]]] | None = None
    for number, row in rows:
        if read is None:
            name = dataset.formatter or detect(row)
            images = _image_rows(dataset, name, row, base, processor, notes)
            read = _reader(dataset, name, row, amounts, tokenizer, images)
        try:
            ids, inputs = read(row)
        except (KeyError, TypeError, AttributeError) as error:
            where = _place(dataset, base, number, row)
            raise ValueError(f"{where} does not have the form of {name}: {error!r}") from error
        except ValueError as error:
            raise ValueError(f"{_place(dataset, base, number, row)}: {error}") from error
        if len(ids) >= amounts.min_token_length:
            found.append((torch.as_tensor(ids), inputs))
    return found


def _image_rows(
    dataset: DatasetRecipe,
    name: str,
    row: dict[str, Any],
    base: Path,
    processor: Callable[[], Any] | None,
    notes: list[str],
) -> ImageRows | None:
    """What reads rows like ``row`` with their images; None for text alone, with a note if there are images."""
    column = image_column(row, dataset.images)
    if column is None:
        return None
    try:
        loaded = None if processor is None else processor()
        reason = "the model has no processor of images"
    except ValueError as error:
        loaded, reason = None, str(error)
    if loaded is None:
        notes.append(f"the images of column {column!r} of {dataset.path} are not used: {reason}")
        return None
    return ImageRows(loaded, column, name, dataset.columns, row, (base / dataset.path).parent)


def _reader(
    dataset: DatasetRecipe,
    name: str,
    row: dict[str, Any],
    amounts: Amounts,
    tokenizer: Any,
    images: ImageRows | None,
) -> Callable[[dict[str, Any]], tuple[Any, dict[str, Tensor]]]:
    """The function that turns rows like ``row`` into token ids and the model's other inputs; no ids for a row to leave.

    Args:
        dataset: the source of the rows.
        name: name of the formatter.
        row: any row, which shows the columns.
        amounts: how long samples are.
        tokenizer: the model's.
        images: reads rows with their images; None for text alone.
    """
    if images is not None:
        return lambda row: images.read(row, amounts.max_seq_len) or ((), {})
    to_text = formatter(name, dataset.columns, row, BoundedTemplate(tokenizer))
    # A chat template writes the special tokens itself.
    special = name in ("raw_text", "prompt_answer")

    def read(row: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
        text = to_text(row)
        return _tokenize(tokenizer, text, add_special_tokens=special)[: amounts.max_seq_len] if text else (), {}

    return read


class _RecipeError(ValueError):
    """A mistake in a recipe, told apart from the errors of the libraries that read datasets."""


def _place(dataset: DatasetRecipe, base: Path, number: int | None, row: dict[str, Any]) -> str:
    """Where a row is, as a user would look for it: its line in a jsonl file, else its number or its beginning."""
    path = base / Path(dataset.path).expanduser()
    if number is None:
        return f"the row {str(row)[:_EXCERPT]}..."
    if path.suffix != ".jsonl" or not path.is_file():
        return f"row {number} (counted from 0)"
    with path.open(encoding="utf-8", errors="replace") as file:
        lines = (line for line, text in enumerate(file, start=1) if text.strip())  # empty lines are no rows
        return f"line {next(itertools.islice(lines, number, None))}"


def _bad_line(path: Path) -> str | None:
    """The mistake in the first line of a jsonl file that is no JSON object, or that there is an empty line."""
    empty = None
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                empty = empty or f"line {number} is empty"  # datasets accepts those in some files
                continue
            try:
                found = json.loads(line)
            except (ValueError, RecursionError) as error:
                return f"line {number} is no valid JSON: {error}"
            if not isinstance(found, dict):
                return f"line {number} holds {type(found).__name__}; expected an object"
    return empty


def _rows(dataset: DatasetRecipe, wanted: int, seed: int, base: Path) -> Sequence[tuple[int | None, dict[str, Any]]]:
    """``wanted`` rows in random order, or as many as there are, each with its number; rows of streams have none."""
    import datasets
    import numpy

    try:
        with _unlogged():
            loaded = _load(dataset, base)
        if isinstance(loaded, (datasets.DatasetDict, datasets.IterableDatasetDict)):
            if dataset.split not in loaded:
                raise _RecipeError(f"it has no split {dataset.split!r}; its splits are {', '.join(loaded)}")
            loaded = loaded[dataset.split]
        if isinstance(loaded, datasets.IterableDataset):
            return [(None, row) for row in loaded.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER).take(wanted)]
        # This is the order of Dataset.shuffle, which does not return the numbers.
        order = numpy.random.default_rng(seed).permutation(len(loaded))[:wanted].tolist()
        return list(zip(order, loaded.select(order), strict=True))
    except _RecipeError:
        raise
    except Exception as error:  # datasets raises errors of many libraries, each with its own base class
        path = base / Path(dataset.path).expanduser()
        if path.suffix == ".jsonl" and path.is_file() and (bad := _bad_line(path)):
            raise ValueError(bad) from error
        first = str(error).strip().splitlines()
        raise ValueError(f"it cannot be loaded: {first[0] if first else type(error).__name__}") from error


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Silence what datasets logs about a file that it cannot read, because the error that follows says it."""
    library = logging.getLogger("datasets")
    level = library.level
    library.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        library.setLevel(level)


def _load(dataset: DatasetRecipe, base: Path) -> Any:
    import datasets

    path = base / Path(dataset.path).expanduser()
    options: dict[str, Any] = {"streaming": dataset.streaming}
    if path.is_file():
        builder = _BUILDERS.get(path.suffix)
        if builder is None:
            raise _RecipeError(f"its files end with {path.suffix!r}; expected one of {', '.join(_BUILDERS)}")
        if builder == "text":
            options["sample_by"] = "paragraph"
        # A single file has one split, whatever it is called.
        return datasets.load_dataset(builder, data_files=str(path), split="train", **options)
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(path))
        return datasets.load_dataset(str(path), dataset.name, **options)
    if dataset.path.startswith((".", "/", "~")) or dataset.path.count("/") > 1 or path.suffix in _BUILDERS:
        raise _RecipeError(f"there is no file or folder {path}")
    return datasets.load_dataset(dataset.path, dataset.name, split=dataset.split, **options)
