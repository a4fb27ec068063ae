"""Checkpoints of older ModelOpt releases, which say that they are quantized in hf_quant_config.json alone.

Transformers looks into config.json only. Without help it would take the packed bytes for weights.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import cached_file

from fp4.checkpoint.formats.modelopt import flatten
from fp4.checkpoint.io.headers import read_json

_SIDE_FILE = "hf_quant_config.json"
# What says where and as whom to look for a file.
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "subfolder", "token")


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


def register() -> None:
    """Let configurations of models find hf_quant_config.json where config.json says nothing. Idempotent."""
    stock: Any = PreTrainedConfig.get_config_dict
    if getattr(stock, "_fp4", False):
        return

    @functools.wraps(stock.__func__)
    def get_config_dict(cls: Any, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        config, rest = stock.__func__(cls, pretrained_model_name_or_path, **kwargs)
        holders = [config, config.get("text_config")]
        said = any(isinstance(holder, dict) and holder.get("quantization_config") for holder in holders)
        if config.get("architectures") and not said:
            hub = {key: kwargs.get(key) for key in _HUB_OPTIONS}
            commit = config.get("_commit_hash") or kwargs.get("revision")
            found = stored_beside(str(pretrained_model_name_or_path), commit, **hub)
            if found is not None:
                config["quantization_config"] = found
        return config, rest

    wrapped: Any = get_config_dict
    wrapped._fp4 = True
    PreTrainedConfig.get_config_dict = classmethod(wrapped)
