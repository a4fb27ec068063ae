"""Atomic ``save_pretrained``: the target folder holds either the complete new model or what it held before."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp4.checkpoint.io.publish import moving_into, write_json
from fp4.integrations.transformers.edited_weights import is_edited

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("fp4")


def save_atomically(model: PreTrainedModel, side_files: Mapping[str, Any] | None = None) -> None:
    """Make ``model.save_pretrained`` write to a temporary folder and move the files when all are complete.

    Transformers writes shards directly into the target, so that a full disk leaves an incomplete folder that looks like
    a model. The method is replaced on this instance alone.

    Args:
        model: changed in place.
        side_files: contents by name of JSON files that the checkpoint's format requires beside config.json.
    """
    model.save_pretrained = _AtomicSaving(model, dict(side_files or {}))


@dataclass
class _AtomicSaving:
    """``save_pretrained`` of one model; a class instead of a closure, so that the model can be pickled."""

    model: PreTrainedModel
    side_files: dict[str, Any]

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        target = Path(save_directory)
        edited = [name for name, module in self.model.named_modules() if is_edited(module)]
        if edited:
            logger.info("saved unquantized, because their weights were edited: %s", ", ".join(edited))
            self.model.hf_quantizer.make_dense(self.model, edited)
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", target.name)
        with moving_into(target, functools.partial(_stale, target, kwargs.get("variant"))) as staging:
            type(self.model).save_pretrained(self.model, staging, *args, **kwargs)
            # A model that was dequantized since is saved without them: they would say that its weights are packed.
            for name, content in self.side_files.items() if hasattr(self.model, "hf_quantizer") else ():
                write_json(staging / name, content)


def _stale(target: Path, variant: str | None, written: list[str]) -> list[str]:
    """Names of weight files in ``target`` that are left from an earlier save of the same variant."""
    suffix = f"\\.{re.escape(variant)}" if variant else ""
    weights = re.compile(rf"model{suffix}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{suffix}\.json")
    if not target.is_dir() or not any(weights.fullmatch(name) for name in written):
        return []
    present = (path.name for path in target.iterdir())
    return [name for name in present if weights.fullmatch(name) and name not in written]
