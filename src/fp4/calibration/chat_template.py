"""Chat templates of a checkpoint, rendered in a process of their own under limits of time and memory.

A template is a program in Jinja that comes with the tokenizer. Transformers renders it in a sandbox, which keeps it
from the system, but not from loops within loops or from doubling a string a hundred times. A process of its own under
the kernel's limits bounds both, whatever the template does: counting iterations would miss what a single operator
computes, and an alarm interrupts only the main thread, and no allocation.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import warnings
import weakref
from multiprocessing.connection import Connection
from typing import Any

# Conversations take milliseconds to render, even on a busy machine, so this limit stops nothing that would end.
_SECONDS = 10
_MEMORY = 1 << 30  # bytes beside what the process has already
_MAX_CHARACTERS = 1 << 26


class BoundedTemplate:
    """A stand-in for a tokenizer that renders its chat template in another process, forked at the first conversation.

    The process is a copy of this one, so any tokenizer's own method renders, with nothing to import. It ends when this
    object is collected. Where the system cannot fork (Windows), the template is rendered here, without bounds.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.chat_template = getattr(tokenizer, "chat_template", None)
        self._process: Any = None
        self._connection: Connection | None = None

    def apply_chat_template(self, conversation: Any, **options: Any) -> str:
        """The text of a conversation; arguments as Transformers' method of that name.

        Raises:
            ValueError: the template took too long, too much memory, or wrote too much.
            Exception: what the template raises, such as Jinja's TemplateError.
        """
        if "fork" not in multiprocessing.get_all_start_methods():
            return str(self.tokenizer.apply_chat_template(conversation, **options))
        connection = self._connection or self._start()
        try:
            connection.send((conversation, options))
            in_time = connection.poll(_SECONDS)
            found = connection.recv() if in_time else None
        except (EOFError, ConnectionError):
            in_time = False  # the kernel ended the process because it had used up its time
        if not in_time:
            self._process.kill()
            self._process.join()
            self._process = self._connection = None
            raise ValueError(f"the chat template did not finish a conversation within {_SECONDS} seconds")
        if isinstance(found, Exception):
            raise found
        return str(found)

    def _start(self) -> Connection:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        self._process = context.Process(target=_render, args=(self.tokenizer, ours, theirs), daemon=True)
        # The tokenizers library prints a warning where it is forked after it was used, unless this is set.
        unset = "TOKENIZERS_PARALLELISM" not in os.environ
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        try:
            with warnings.catch_warnings():
                # Python warns of forks beside threads, which may hold locks; rendering takes none.
                warnings.simplefilter("ignore", DeprecationWarning)
                self._process.start()
        finally:
            if unset:
                del os.environ["TOKENIZERS_PARALLELISM"]
        theirs.close()
        weakref.finalize(self, self._process.kill)
        self._connection = ours
        return ours


def _render(tokenizer: Any, parents: Connection, connection: Connection) -> None:
    """Answer conversations with their texts, or with what went wrong, until the other end is closed."""
    parents.close()  # while this copy is open, this process would never see the end of the connection
    _limit_memory()
    while True:
        try:
            conversation, options = connection.recv()
        except (EOFError, OSError):
            return
        _limit_time()
        answer: str | Exception
        try:
            answer = str(tokenizer.apply_chat_template(conversation, **options))
            if len(answer) > _MAX_CHARACTERS:
                answer = ValueError(f"the chat template wrote {len(answer)} characters for one conversation")
        except MemoryError:
            answer = ValueError(f"the chat template needs more than {_MEMORY >> 20} MiB for one conversation")
        except RecursionError:
            answer = ValueError("the chat template calls itself without end")
        except Exception as error:  # a template, or the tokenizer's own code, may raise any error
            answer = _picklable(error)
        connection.send(answer)


def _picklable(error: Exception) -> Exception:
    """The error itself where it can be sent to another process, else one with its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an error class decides itself how it is pickled, and what goes wrong then
        return ValueError(f"{type(error).__name__}: {error}")
    return error


def _limit_memory() -> None:
    """Limit the address space of this process to ``_MEMORY`` more than it has now."""
    import resource

    with (
        contextlib.suppress(OSError, ValueError),
        open("/proc/self/statm") as file,
    ):  # elsewhere than on Linux time alone is limited
        limit = int(file.read().split()[0]) * resource.getpagesize() + _MEMORY
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _limit_time() -> None:
    """Let the kernel end this process some time after the other has given up, in case the other was killed."""
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    limit = int(used.ru_utime + used.ru_stime) + 2 * _SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
