"""Checkpoints of older ModelOpt releases, which say that they are quantized in hf_quant_config.json alone.

Transformers looks into config.json only. Without help it would take the packed bytes for weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from fp4.checkpoint.formats.modelopt import flatten
from fp4.checkpoint.io.headers import read_json

_SIDE_FILE = "hf_quant_config.json"


def stored_beside(name: str, commit: str | None = None, **hub: Any) -> dict[str, Any] | None:
    """The ``quantization_config`` that hf_quant_config.json means, of a folder or hub id; None where there is none.

    A model on the hub is asked for the file at most once a commit: that it has none is remembered in the cache, too.
    """
    folder = Path(name) / (hub.get("subfolder") or "")
    if Path(name).exists() or not name:
        path = folder / _SIDE_FILE
        found = str(path) if path.is_file() else None
    else:
        try:
            found = cached_file(
                name,
                _SIDE_FILE,
                revision=commit,
                _commit_hash=commit,
                _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                **{key: value for key, value in hub.items() if value is not None},
            )
        except OSError:
            found = None  # config.json came from somewhere else, a cache for instance
    return None if found is None else flatten(read_json(Path(found)))
