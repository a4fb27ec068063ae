"""The work folder beside the output: what makes a job resumable, and its result appear complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from fp4.allocator import is_out_of_memory
from fp4.checkpoint.files import Checkpoint, read_json
from fp4.checkpoint.writing import write_json

_REQUEST = "request.json"
_LOCK = "lock"


def identity_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What tells whether a checkpoint is still the same one: configuration, and size and time of its files."""
    files = {}
    for shard in checkpoint.shards:
        status = shard.stat()
        files[shard.name] = [status.st_size, status.st_mtime_ns]
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode()).hexdigest()
    return {"config": digest, "files": files}


class Staging:
    """``<out>.partial``: finished parts of the output and the journal of a job, until :meth:`publish` renames it.

    Args:
        out: the folder that the job is to make.
        request: everything that decides about the bytes of the output. A later call with the same goes on with what
            is there; with another it is refused, so that no work is lost by mistake.
        overwrite: whether an existing ``out``, or the unfinished work for another request, may be replaced.

    Raises:
        ValueError: ``out`` exists, unfinished work belongs to another request, or another process works on it.
    """

    def __init__(self, out: Path, request: Mapping[str, Any], overwrite: bool) -> None:
        self.out = out
        self.folder = out.with_name(f"{out.name}.partial")
        self.overwrite = overwrite
        self._lock: IO[str] | None = None
        if out.exists() and not overwrite:
            raise ValueError(f"{out} exists; name another folder, or allow it to be overwritten")
        if out.exists() and not out.is_dir():
            raise ValueError(f"{out} is a file; name a folder")
        self.resumed = self._claim(json.loads(json.dumps(request)))

    def _claim(self, request: dict[str, Any]) -> bool:
        state = self.folder / _REQUEST
        if self.folder.exists():
            self._take_lock()
            found = read_json(state) if state.is_file() else {}
            if found == request:
                return True
            if found and not self.overwrite:
                self.release()
                changed = sorted(key for key in {*found, *request} if found.get(key) != request.get(key))
                raise ValueError(
                    f"{self.folder} holds unfinished work for another request (it differs in {', '.join(changed)}); "
                    "finish that one with its own command, remove the folder, or allow it to be overwritten"
                )
            self.release()
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        self._take_lock()
        _write_durably(state, request)
        return False

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
def plain_errors(staging: Staging) -> Iterator[None]:
    """Turn what the machine lacks into one sentence that says what to do; work so far stays where it is."""
    kept = f"what is finished is kept in {staging.folder}; the same command goes on from there"
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
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
        staging.release()
