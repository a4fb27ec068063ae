"""Checkpoints of older ModelOpt releases, which say that they are quantized in hf_quant_config.json alone.

Transformers looks into config.json only. Without help it would take the packed bytes for weights.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from transformers import modeling_utils
from transformers.utils import cached_file

from fp4.checkpoint.files import read_json
from fp4.checkpoint.modelopt import flatten

_SIDE_FILE = "hf_quant_config.json"


def stored_beside(name: str, commit: str | None = None) -> dict[str, Any] | None:
    """The ``quantization_config`` that hf_quant_config.json means, of a folder or hub id; None where there is none.

    A model on the hub is asked for the file at most once a commit: that it has none is remembered in the cache, too.
    """
    if Path(name).is_dir():
        path = Path(name) / _SIDE_FILE
        found = str(path) if path.is_file() else None
    elif not name:
        found = None
    else:
        found = cached_file(
            name,
            _SIDE_FILE,
            revision=commit,
            _commit_hash=commit,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    return None if found is None else flatten(read_json(Path(found)))


def register() -> None:
    """Let ``from_pretrained`` find hf_quant_config.json where config.json says nothing. Idempotent."""
    stock = modeling_utils.get_hf_quantizer
    if getattr(stock, "_fp4", False):
        return

    @functools.wraps(stock)
    def get_hf_quantizer(config: Any, *args: Any, **kwargs: Any) -> Any:
        said = (
            getattr(holder, "quantization_config", None) for holder in (config, config.get_text_config(decoder=True))
        )
        if not any(said):
            found = stored_beside(str(config._name_or_path or ""), getattr(config, "_commit_hash", None))
            if found is not None:
                config.quantization_config = found
        return stock(config, *args, **kwargs)

    get_hf_quantizer._fp4 = True  # type: ignore[attr-defined]
    modeling_utils.get_hf_quantizer = get_hf_quantizer
