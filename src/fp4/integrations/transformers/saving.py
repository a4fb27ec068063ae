"""Saving a model so that a folder holds either all of it or what it held before."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp4.checkpoint.io.shards import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def save_atomically(model: PreTrainedModel, side_files: Mapping[str, Any] | None = None) -> None:
    """Make ``model.save_pretrained`` write beside its target and move the files in once they are all there.

    ``side_files`` are JSON files, by name, that the checkpoint's format wants beside config.json.

    Transformers writes shard by shard into the target, so that a full disk leaves a folder that looks like a model and
    is not one. The method is replaced on this instance alone.
    """
    model.save_pretrained = _AtomicSaving(model, dict(side_files or {}))


@dataclass
class _AtomicSaving:
    """``save_pretrained`` of one model; of a class, so that the model can be pickled."""

    model: PreTrainedModel
    side_files: dict[str, Any]

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        target = Path(save_directory)
        if target.is_file():
            raise ValueError(f"cannot save to {target}: it is a file; name a folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", target.name)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            type(self.model).save_pretrained(self.model, staging, *args, **kwargs)
            for name, content in self.side_files.items():
                write_json(staging / name, content)
            written = sorted(path.name for path in staging.iterdir())
            _exchange(staging, target, written, _stale(target, written, kwargs.get("variant")))
        except _HalfDoneError:
            raise
        except OSError as error:
            raise OSError(f"could not save the model to {target}: {error}; nothing there was changed") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _stale(target: Path, written: list[str], variant: str | None) -> list[str]:
    """Shards or an index of a model of the same variant that was saved in ``target`` before."""
    suffix = f"\\.{re.escape(variant)}" if variant else ""
    weights = re.compile(rf"model{suffix}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{suffix}\.json")
    if not target.is_dir() or not any(weights.fullmatch(name) for name in written):
        return []
    present = (path.name for path in target.iterdir())
    return [name for name in present if weights.fullmatch(name) and name not in written]


class _HalfDoneError(OSError):
    """Files were exchanged in part, and not all could be put back."""


def _exchange(staging: Path, target: Path, written: list[str], stale: list[str]) -> None:
    """Move ``written`` from ``staging`` into ``target`` and ``stale`` out of it; a failure half-way is taken back."""
    created = not target.exists()
    target.mkdir(exist_ok=True)
    before = Path(tempfile.mkdtemp(prefix=f".{target.name}.before.", dir=target.parent))
    moved: list[tuple[Path, Path]] = []

    def move(origin: Path, place: Path) -> None:
        os.replace(origin, place)
        moved.append((origin, place))

    try:
        for name in [*written, *stale]:
            if (target / name).exists():
                move(target / name, before / name)
        for name in written:
            move(staging / name, target / name)
    except OSError as error:
        try:
            for origin, place in reversed(moved):
                os.replace(place, origin)
            if created:
                target.rmdir()
        except OSError as second:
            raise _HalfDoneError(
                f"{target} is incomplete: saving failed ({error}), and so did putting back what was there ({second}); "
                f"it is in {before}"
            ) from error
        shutil.rmtree(before, ignore_errors=True)
        raise
    shutil.rmtree(before, ignore_errors=True)
