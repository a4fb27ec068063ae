"""Publishing: nothing has its name before it is complete.

* one file: :func:`write_text`, :func:`write_json`;
* a folder that a job makes, which may be interrupted and goes on: :class:`Staging`, :func:`plain_errors`;
* files that move into a folder which may hold others: :func:`moving_into`;
* what the folder of a checkpoint holds besides weights: :func:`write_companions`.
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
    """Write ``text`` to ``path``, which holds all of it or what it held before.

    Args:
        durable: hold to that even after a loss of power.
    """
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, content: Mapping[str, Any], durable: bool = False) -> None:
    """As :func:`write_text`, of JSON."""
    write_text(path, json.dumps(content, indent=2, sort_keys=False, ensure_ascii=False) + "\n", durable)


# --- a folder that a job makes ---------------------------------------------------------------------------------------


def identity_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What tells whether a checkpoint is still the same one: configuration, and size and time of its files."""
    files = {}
    for shard in checkpoint.shards:
        status = shard.stat()
        files[shard.name] = [status.st_size, status.st_mtime_ns]
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode()).hexdigest()
    return {"config": digest, "files": files}


def refuse_existing(out: Path, overwrite: bool) -> None:
    """ValueError where ``out`` may not be made: it is a file, or it exists and may not be replaced."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder")
    if out.exists() and not overwrite:
        raise OptionError(f"{out} exists; name another folder, or replace it with", "overwrite")


def require_room(out: Path, needed: int) -> None:
    """OSError (ENOSPC) if the disk that ``out`` will be on has not ``needed`` bytes, unfinished work included."""
    place = next(parent for parent in out.absolute().parents if parent.is_dir())
    partial = _partial(out)
    # What an earlier run left is written already, or makes room.
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
    """``<out>.partial``: finished parts of the output and the journal of a job, until :meth:`publish` renames it.

    Args:
        out: the folder that the job is to make.
        request: everything that decides about the bytes of the output. A later call with the same goes on with what
            is there; with another it is refused, so that no work is lost by mistake.
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
        # Held through the handle of a file, so a killed process leaves nothing behind that would keep others out.
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
        """Whether everything that is there would be made alike for the request ``wanted``."""
        free = {_PARTS, *self._planning}
        if any(found.get(key) != wanted.get(key) for key in {*found, *wanted} - free):
            return False
        before = found.get(_PARTS) or {}
        return all(before.get(part) == self.parts[part] for part in self.finished())

    def finished(self) -> list[str]:
        """The parts that are complete."""
        return [part for part in self.parts if (self.folder / part).is_file()]

    def _take_lock(self) -> None:
        try:
            self._lock.acquire(blocking=False)
        except Timeout as error:
            raise ValueError(f"another process is at work in {self.folder}") from error

    def release(self) -> None:
        """Let another process have the folder."""
        self._lock.release()

    def read(self, name: str) -> dict[str, Any] | None:
        """A note of the journal, None if it was not written."""
        path = self.folder / name
        return read_json(path) if path.is_file() else None

    def note(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a note of the journal; it is there whole, even after a loss of power, or not at all."""
        write_json(self.folder / name, content, durable=True)

    def discard(self) -> None:
        """Remove everything, for a request that cannot be fulfilled."""
        self.release()
        shutil.rmtree(self.folder, ignore_errors=True)

    def publish(self, files: list[str]) -> None:
        """Remove all but ``files`` and give the folder its final name."""
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
    """Turn what the machine lacks, and a user's interruption, into one sentence that says what to do.

    Finished parts stay where they are. Where there is none, nothing stays.

    Args:
        pattern: from the name of a layer that cannot be quantized to what keeps it when it is skipped.
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
    """A folder beside ``target`` to write files into, all of which move there at the end, or none.

    Args:
        target: is made where it does not exist; what else it holds stays.
        stale: from the names of the files that were written to those of files that are to go from ``target``.

    Raises:
        ValueError: ``target`` is a file.
        OSError: writing or moving failed, and nothing in ``target`` was changed, or the message says what was.
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
    """Files were exchanged in part, and not all could be put back."""


def _exchange(staging: Path, target: Path, written: list[str], stale: Collection[str]) -> None:
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


# --- what a checkpoint holds besides weights -------------------------------------------------------------------------


def write_companions(
    source: Checkpoint,
    folder: Path,
    shards: Sequence[str],
    codec: type[Codec],
    quantization: Mapping[str, Any],
    made_anew: Collection[str] = (),
) -> list[str]:
    """Write config.json, the index of ``shards`` and what the format wants into ``folder``; copy the rest along.

    Args:
        source: the checkpoint whose tokenizer and the like ``folder`` gets.
        shards: names of the weight files, which are in ``folder``.
        quantization: the ``quantization_config``.
        made_anew: files of ``source`` that are not copied because the caller writes its own.

    Returns:
        names of all files that now belong to the checkpoint, ``shards`` among them.
    """
    # What says how weights are stored must not outlive them.
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
    """``config`` without a ``quantization_config`` in its ``text_config``, in whose place there will be one outside."""
    text = config.get("text_config")
    if "quantization_config" in config or not isinstance(text, Mapping) or "quantization_config" not in text:
        return dict(config)
    return {**config, "text_config": {key: value for key, value in text.items() if key != "quantization_config"}}


def _index(folder: Path, shards: Sequence[str]) -> dict[str, Any]:
    headers = {name: read_header(folder / name).tensors for name in shards}
    weight_map = {name: file for file, tensors in headers.items() for name in tensors}
    size = sum(info.nbytes for tensors in headers.values() for info in tensors.values())
    return {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
