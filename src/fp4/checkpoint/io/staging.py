"""The work folder beside the output: what makes a job resumable, and its result appear complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from fp4.checkpoint.io.headers import Checkpoint, read_json
from fp4.checkpoint.io.shards import write_json
from fp4.errors import NotQuantizable, OptionError
from fp4.host_memory import is_out_of_memory

_REQUEST = "request.json"
_LOCK = "lock"
_PARTS = "parts"


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
        self._lock: IO[str] | None = None
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
        _write_durably(state, wanted)
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
        self._lock = (self.folder / _LOCK).open("w")
        try:
            import fcntl

            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # no such locks on this system
        except OSError as error:
            self.release()
            raise ValueError(f"another process is at work in {self.folder}") from error

    def release(self) -> None:
        """Let another process have the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def read(self, name: str) -> dict[str, Any] | None:
        """A note of the journal, None if it was not written."""
        path = self.folder / name
        return read_json(path) if path.is_file() else None

    def note(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a note of the journal; it is there whole, even after a loss of power, or not at all."""
        _write_durably(self.folder / name, content)

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


def _write_durably(path: Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    write_json(temporary, content)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


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
