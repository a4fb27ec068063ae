"""Access to a checkpoint in a folder or on the Hugging Face hub."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from fp4.checkpoint.io.headers import (
    INDEX_NAME,
    Checkpoint,
    parse_header,
    read_header,
    read_index,
    read_json,
    self_sufficient_files,
)

_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.yaml"]
_HEADER_GUESS = 1 << 20


def is_hub_id(source: str | Path) -> bool:
    """Whether ``source`` can only mean a model of the hub: no such path, and of the form ``name`` or ``owner/name``."""
    if isinstance(source, Path) or Path(source).exists():
        return False
    return source.count("/") <= 1 and not source.startswith((".", "/", "~")) and not source.endswith("/")


def checked_token(token: str | bool | None) -> str | bool | None:
    """The hub's access token without surrounding white space, checked for characters that no HTTP header can hold.

    If ``token`` is None or True, the token that huggingface_hub finds by itself is checked. Without this check, the
    HTTP client's error message would show the token.

    Raises:
        ValueError: the token holds a space or a character beyond ASCII; the message does not show it.
    """
    from huggingface_hub import get_token

    if isinstance(token, str):
        token = token.strip() or None
    used = (get_token() or "") if token is None or token is True else token or ""
    wrong = re.search(r"[^\x21-\x7e]", used)
    if wrong is not None:
        raise ValueError(
            f"the hub's token has a space or a character beyond ASCII at position {wrong.start() + 1} of {len(used)}; "
            "copy it anew from the hub's settings"
        )
    return token


def local_folder(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """The folder of a checkpoint, which is downloaded first if it is on the hub.

    Only safetensors and text files are downloaded.

    Args:
        source: a folder, or the id of a model on the hub.
        revision: branch, tag or commit of a model on the hub.
        token: the hub's access token, as huggingface_hub takes it.
        cache_dir: folder of the hub's cache; huggingface_hub's own if None.

    Raises:
        ValueError: the hub has no such model or cannot be reached, or the token is malformed.
    """
    if not is_hub_id(source):
        return Path(source)
    from huggingface_hub import snapshot_download

    token = checked_token(token)
    try:
        folder = snapshot_download(
            str(source), revision=revision, token=token, cache_dir=cache_dir, allow_patterns=_WANTED
        )
    except _failures() as error:
        raise _not_found(source, error) from error
    return Path(folder)


def open_headers(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[Checkpoint, bool]:
    """The configuration and headers of a checkpoint, without its weights.

    Of a model on the hub only the small files and the headers of the weight files are fetched.

    Args:
        source: a folder, or the id of a model on the hub.
        revision: branch, tag or commit of a model on the hub.
        token: the hub's access token, as huggingface_hub takes it.
        cache_dir: folder of the hub's cache; huggingface_hub's own if None.

    Returns:
        the checkpoint, and whether its tensors can be read, which is False for a model on the hub.

    Raises:
        ValueError: a file is damaged, or the hub has no such model or cannot be reached.
    """
    if not is_hub_id(source):
        return Checkpoint.open(Path(source)), True
    from huggingface_hub import HfFileSystem, hf_hub_download, model_info

    repo, token = str(source), checked_token(token)
    try:
        names = [file.rfilename for file in model_info(repo, revision=revision, token=token).siblings or []]
        small = [name for name in ("config.json", INDEX_NAME, *self_sufficient_files()) if name in names]
        paths = {
            name: Path(str(hf_hub_download(repo, name, revision=revision, token=token, cache_dir=cache_dir)))
            for name in small
        }
        if "config.json" not in paths:
            raise ValueError(f"{source} has no config.json")
        folder = paths["config.json"].parent
        index = read_index(paths[INDEX_NAME]) if INDEX_NAME in paths else None
        shards = sorted(set(index.values())) if index else [n for n in names if n.endswith(".safetensors")]
        checkpoint = Checkpoint(folder, read_json(paths["config.json"]), [], {}, {})
        filesystem = HfFileSystem(token=token)
        root = f"{repo}@{revision}" if revision else repo
        for name in shards:
            local = folder / name
            if local.is_file():
                checkpoint.add(local, read_header(local))
                continue
            with filesystem.open(f"{root}/{name}", "rb", block_size=_HEADER_GUESS) as file:
                length = int.from_bytes(file.read(8), "little")
                if length > 100 << 20:
                    raise ValueError(f"{name} is no safetensors file: its header would be {length} bytes")
                checkpoint.add(local, parse_header(file.read(length), local, file.size))
    except _failures() as error:
        raise _not_found(source, error) from error
    checkpoint.check_index(index)
    return checkpoint, False


def _failures() -> tuple[type[Exception], ...]:
    """The errors of huggingface_hub: OSError if the hub answered, those of its HTTP client if it did not."""
    clients = (sys.modules.get(name) for name in ("httpx", "httpx2"))
    return (OSError, *(client.HTTPError for client in clients if client is not None))


def _not_found(source: str | Path, error: Exception) -> ValueError:
    """An error of one sentence, made from the hub's, which may have several lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    did = "did not give it" if isinstance(error, OSError) else "cannot be reached"
    return ValueError(f"{source} is no folder here, and the hub {did}: {' '.join(lines[:2])}")
