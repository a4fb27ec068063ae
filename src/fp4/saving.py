"""Saving a model so that a folder holds either all of it or what it held before."""

from __future__ import annotations

import functools
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

from fp4.checkpoint.files import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def save_atomically(model: PreTrainedModel, side_files: Mapping[str, Any] | None = None) -> None:
    """Make ``model.save_pretrained`` write beside its target and move the files in once they are all there.

    ``side_files`` are JSON files, by name, that the checkpoint's format wants beside config.json.

    Transformers writes shard by shard into the target, so that a full disk leaves a folder that looks like a model and
    is not one. The method is replaced on this instance alone.
    """
    model.save_pretrained = MethodType(functools.partial(_save_pretrained, dict(side_files or {})), model)


def _save_pretrained(
    side_files: dict[str, Any],
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    *args: Any,
    **kwargs: Any,
) -> None:
    target = Path(save_directory)
    if target.is_file():
        raise ValueError(f"cannot save to {target}: it is a file; name a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    if kwargs.get("push_to_hub"):
        kwargs.setdefault("repo_id", target.name)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        type(model).save_pretrained(model, staging, *args, **kwargs)
        for name, content in side_files.items():
            write_json(staging / name, content)
        target.mkdir(exist_ok=True)
        written = [path.name for path in staging.iterdir()]
        for path in staging.iterdir():
            os.replace(path, target / path.name)
        if any(_WEIGHT_FILE.fullmatch(name) for name in written):
            for path in target.iterdir():
                if _WEIGHT_FILE.fullmatch(path.name) and path.name not in written:
                    path.unlink()  # a shard or index of a model saved here before
    except OSError as error:
        raise OSError(f"could not save the model to {target}: {error}; nothing there was changed") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
