"""Checkpoints that say how they are quantized in a file beside config.json alone, as older ones of ModelOpt do.

Transformers looks into config.json only. Without help it would take the packed bytes for weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from fp4.checkpoint.io.headers import read_json, self_sufficient_files


def stored_beside(name: str, commit: str | None = None, **hub: Any) -> dict[str, Any] | None:
    """The ``quantization_config`` that such a file means, of a folder or hub id; None where there is none.

    A model on the hub is asked for each file at most once a commit: that it has none is remembered in the cache, too.
    """
    for file, codec in self_sufficient_files().items():
        found = _find(file, name, commit, hub)
        if found is not None:
            return codec.from_side_file(read_json(found))
    return None


def _find(file: str, name: str, commit: str | None, hub: dict[str, Any]) -> Path | None:
    if Path(name).exists() or not name:
        path = Path(name) / (hub.get("subfolder") or "") / file
        return path if path.is_file() else None
    try:
        found = cached_file(
            name,
            file,
            revision=commit,
            _commit_hash=commit,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **{key: value for key, value in hub.items() if value is not None},
        )
    except OSError:
        return None  # config.json came from somewhere else, a cache for instance
    return None if found is None else Path(found)
