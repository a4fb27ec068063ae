"""Quantization configurations in a file of their own beside config.json, as older ModelOpt versions wrote them.

Transformers reads only config.json, and would load the packed bytes of such a checkpoint as ordinary weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from fp4.checkpoint.io.headers import read_json, self_sufficient_files


def stored_beside(name: str, commit: str | None = None, **hub: Any) -> dict[str, Any] | None:
    """The ``quantization_config`` described by a file beside config.json, or None if there is no such file.

    The hub is asked at most once per file and commit, because huggingface_hub also caches that a file is missing.

    Args:
        name: folder or hub id.
        commit: commit or revision of the hub id.
        hub: further keyword arguments of ``cached_file``, such as ``token``.
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
        return None  # not reachable, though config.json was, for instance from the cache
    return None if found is None else Path(found)
