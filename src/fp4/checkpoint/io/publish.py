"""Atomic writing: a file or folder gets its final name only when it is complete.

* :func:`write_text` and :func:`write_json` write one file;
* :class:`Staging` and :func:`plain_errors` make a folder in a long job that can be interrupted and resumed;
* :func:`moving_into` puts several files into a folder that may hold others;
* :func:`write_companions` writes the files of a checkpoint other than weights.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fp4.checkpoint.formats import CODECS
from fp4.checkpoint.formats.codec import Codec
from fp4.checkpoint.io.headers import INDEX_NAME, Checkpoint, read_header, read_json
from fp4.errors import NotQuantizable, OptionError
from fp4.host_memory import is_out_of_memory

# Files that belong to the tokenizer, the model's code, its documentation and the like.
_COPIED_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".md", ".yaml", ".py", ".tiktoken")
_REQUEST = "request.json"
_LOCK = "lock"
_PARTS = "parts"


# --- one file --------------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str, durable: bool = False) -> None:
    """Replace a text file atomically: it holds the new text or the old, never a part.

    Args:
        path: the file.
        text: its new content, written in UTF-8.
        durable: flush the file to the disk before it replaces the old one, so that this holds after a power failure.
    """
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, content: Mapping[str, Any], durable: bool = False) -> None:
    """Replace a JSON file atomically, as :func:`write_text` does."""
    write_text(path, json.dumps(content, indent=2, sort_keys=False, ensure_ascii=False) + "\n", durable)


# --- a folder that a job makes ---------------------------------------------------------------------------------------


def identity_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """A fingerprint of a checkpoint, for JSON: a digest of its configuration, and the size and time of its files."""
    files = {}
    for shard in checkpoint.shards:
        status = shard.stat()
        files[shard.name] = [status.st_size, status.st_mtime_ns]
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode()).hexdigest()
    return {"config": digest, "files": files}


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Refuse an output folder that may not be made.

    Raises:
        ValueError: ``out`` is a file, or it exists and ``overwrite`` is False.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder")
    if out.exists() and not overwrite:
        raise OptionError(f"{out} exists; name another folder, or replace it with", "overwrite")


def require_room(out: Path, needed: int) -> None:
    """Refuse to start a job that the disk has no room for.

    Args:
        out: the output folder, which need not exist.
        needed: bytes that output and work files take in all.

    Raises:
        OSError: ENOSPC, if free space and unfinished work of an earlier run together are less than ``needed``.
    """
    place = next(parent for parent in out.absolute().parents if parent.is_dir())
    partial = _partial(out)
    # Unfinished work of an earlier run counts as free, because the job either reuses or deletes it.
    there = sum(path.stat().st_size for path in partial.iterdir() if path.is_file()) if partial.is_dir() else 0
    free = shutil.disk_usage(place).free + there
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"the disk of {place} is too small: it has {free / 1e9:.3g} GB free, and output and work files need about "
            f"{needed / 1e9:.3g} GB; make room, or name a folder elsewhere",
        )


def _partial(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


class Staging:
    """The working folder ``<out>.partial`` of a job, which holds finished parts and notes until it is published.

    Args:
        out: the folder that the job is to make.
        request: all that determines the bytes of the output. A later call with an equal request resumes the work.
            One with another request is refused, so that no work is lost by mistake.
        overwrite: whether an existing ``out``, or the unfinished work for another request, may be replaced.
        parts: what is planned for each part of the output, as a digest, by the name of the part's note.
        planning: keys of ``request`` that decide about nothing but ``parts``. They may change while the parts that are
            finished stay as they were planned.

    Raises:
        ValueError: ``out`` exists, unfinished work belongs to another request, or another process works on it.
    """

    def __init__(
        self,
        out: Path,
        request: Mapping[str, Any],
        overwrite: bool,
        parts: Mapping[str, str] | None = None,
        planning: Collection[str] = (),
    ) -> None:
        self.out = out
        self.folder = _partial(out)
        self.overwrite = overwrite
        self.parts = dict(parts or {})
        self.published = False
        self._planning = planning
        # The system releases the lock when the process that holds it dies, so a killed job does not lock others out.
        self._lock = FileLock(self.folder / _LOCK)
        refuse_existing(out, overwrite)
        self.resumed = self._claim(json.loads(json.dumps(request)))

    def _claim(self, request: dict[str, Any]) -> bool:
        state = self.folder / _REQUEST
        wanted = {**request, _PARTS: self.parts}
        resumed = False
        if self.folder.exists():
            self._take_lock()
            found = read_json(state) if state.is_file() else {}
            resumed = bool(found) and self._goes_on(found, wanted)
            if not resumed:
                self.release()
                if found and not self.overwrite:
                    changed = sorted(key for key in {*found, *request} - {_PARTS} if found.get(key) != request.get(key))
                    differs = ", ".join(changed) or "what is planned for its layers"
                    raise OptionError(
                        f"{self.folder} holds unfinished work for another request (it differs in {differs}); finish "
                        "that one with its own command, or replace it with",
                        "overwrite",
                    )
                shutil.rmtree(self.folder)
        if not resumed:
            self.folder.mkdir(parents=True)
            self._take_lock()
        write_json(state, wanted, durable=True)
        return resumed

    def _goes_on(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
        """Whether the finished parts of the request ``found`` are also those of the request ``wanted``."""
        free = {_PARTS, *self._planning}
        if any(found.get(key) != wanted.get(key) for key in {*found, *wanted} - free):
            return False
        before = found.get(_PARTS) or {}
        return all(before.get(part) == self.parts[part] for part in self.finished())

    def finished(self) -> list[str]:
        """The names of the parts that are complete."""
        return [part for part in self.parts if (self.folder / part).is_file()]

    def _take_lock(self) -> None:
        try:
            self._lock.acquire(blocking=False)
        except Timeout as error:
            raise ValueError(f"another process is at work in {self.folder}") from error

    def release(self) -> None:
        """Release the lock, so that another process can use the folder."""
        self._lock.release()

    def read(self, name: str) -> dict[str, Any] | None:
        """The content of a note, or None if it was not written."""
        path = self.folder / name
        return read_json(path) if path.is_file() else None

    def note(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a note (a JSON file), which is complete or absent even after a power failure."""
        write_json(self.folder / name, content, durable=True)

    def discard(self) -> None:
        """Remove the working folder, for a request that cannot succeed."""
        self.release()
        shutil.rmtree(self.folder, ignore_errors=True)

    def publish(self, files: list[str]) -> None:
        """Remove everything but ``files`` and give the folder its final name."""
        self.published = True
        for path in self.folder.iterdir():
            if path.name not in files:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.release()
        if not self.out.exists():
            os.replace(self.folder, self.out)
            return
        old = self.out.with_name(f".{self.out.name}.replaced")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(self.out, old)
        os.replace(self.folder, self.out)
        shutil.rmtree(old)


@contextlib.contextmanager
def plain_errors(staging: Staging, pattern: Callable[[str], str] = str) -> Iterator[None]:
    """Turn an interruption, or a lack of memory or disk, into one sentence that says what to do.

    The working folder is kept if it has a finished part, and removed otherwise.

    Args:
        staging: the working folder of the job.
        pattern: maps the name of a layer that cannot be quantized to the value of ``skip`` that excludes it.

    Raises:
        KeyboardInterrupt: the user interrupted the job.
        OptionError: a layer cannot be quantized.
        OSError: memory or disk is exhausted, or writing failed.
    """
    try:
        yield
    except BaseException as error:
        kept = _kept(staging)
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"interrupted; {kept}") from error
        if isinstance(error, NotQuantizable):
            kept = _kept(staging, "the same command with it")
            option = "skip", pattern(error.layer), f"; {kept}" if staging.finished() else ""
            raise OptionError(f"{error}, or keep the layer as it is with", *option) from error
        if is_out_of_memory(error):
            first = next(iter(str(error).splitlines()), "no more is to be had")
            advice = "free some, or allow less with max_memory or fewer samples"
            raise OSError(errno.ENOMEM, f"out of memory ({first}); {advice}; {kept}") from error
        if not isinstance(error, OSError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, f"the disk of {staging.folder} is full; make room; {kept}") from error
        raise OSError(error.errno or errno.EIO, f"{error}; {kept}") from error
    finally:
        if not staging.published and not staging.finished():
            staging.discard()
        staging.release()


def _kept(staging: Staging, command: str = "the same command") -> str:
    if not staging.finished():
        return f"nothing was finished yet, so nothing is kept, and {command} starts anew"
    return f"what is finished is kept in {staging.folder}; {command} goes on from there"


# --- files that move into a folder -----------------------------------------------------------------------------------


@contextlib.contextmanager
def moving_into(target: Path, stale: Callable[[list[str]], Collection[str]]) -> Iterator[Path]:
    """A temporary folder beside ``target``, whose files all move to ``target`` at the end, or none of them.

    Args:
        target: the folder, which is made if it does not exist. Its other files stay.
        stale: maps the names of the written files to the names of files to remove from ``target``.

    Raises:
        ValueError: ``target`` is a file.
        OSError: writing or moving failed. Nothing in ``target`` was changed, unless the message says otherwise.
    """
    if target.is_file():
        raise ValueError(f"cannot save to {target}: it is a file; name a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield staging
        written = sorted(path.name for path in staging.iterdir())
        _exchange(staging, target, written, stale(written))
    except _HalfDoneError:
        raise
    except OSError as error:
        raise OSError(f"could not save the model to {target}: {error}; nothing there was changed") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


class _HalfDoneError(OSError):
    """A failed exchange of files that could not be undone completely."""


def _exchange(staging: Path, target: Path, written: list[str], stale: Collection[str]) -> None:
    """Move ``written`` from ``staging`` into ``target``, and remove ``stale`` from it; undo both if a move fails."""
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


# --- what a checkpoint holds besides weights -------------------------------------------------------------------------


def write_companions(
    source: Checkpoint,
    folder: Path,
    shards: Sequence[str],
    codec: type[Codec],
    quantization: Mapping[str, Any],
    made_anew: Collection[str] = (),
) -> list[str]:
    """Write all files of a checkpoint except its weights: configuration, index, and copies of the rest.

    Args:
        source: the original checkpoint, whose tokenizer, code and documentation are copied.
        folder: the folder of the new checkpoint.
        shards: the names of the weight files, which ``folder`` already holds.
        codec: the new checkpoint's format, which may have a file of its own beside config.json.
        quantization: the new ``quantization_config``.
        made_anew: names of files that are not copied because the caller writes its own.

    Returns:
        the names of all files of the new checkpoint, ``shards`` among them.
    """
    # These files describe how the original weights are stored, which is no longer true.
    describing = {"config.json", INDEX_NAME, *(codec.side_file for codec in CODECS.values())}
    left_out = describing | set(made_anew)
    written = []
    for path in sorted(source.folder.iterdir()):
        if path.name not in left_out and path.suffix in _COPIED_SUFFIXES and path.is_file():
            shutil.copyfile(path, folder / path.name)
            written.append(path.name)
    contents = {"config.json": _described(source.config) | {"quantization_config": dict(quantization)}}
    if list(shards) != ["model.safetensors"]:
        contents[INDEX_NAME] = _index(folder, shards)
    contents |= codec.side_files(quantization)
    for name, content in contents.items():
        write_json(folder / name, content)
    return [*written, *contents, *shards]


def _described(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` without the ``quantization_config`` in its ``text_config``, since the new one stands outside."""
    text = config.get("text_config")
    if "quantization_config" in config or not isinstance(text, Mapping) or "quantization_config" not in text:
        return dict(config)
    return {**config, "text_config": {key: value for key, value in text.items() if key != "quantization_config"}}


def _index(folder: Path, shards: Sequence[str]) -> dict[str, Any]:
    headers = {name: read_header(folder / name).tensors for name in shards}
    weight_map = {name: file for file, tensors in headers.items() for name in tensors}
    size = sum(info.nbytes for tensors in headers.values() for info in tensors.values())
    return {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
