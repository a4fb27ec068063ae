"""Memory: freed tensors are given back to the system instead of kept by the C library (glibc), and its end is told."""

from __future__ import annotations

import ctypes
import errno

# malloc.h's names of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def return_freed_tensors() -> None:
    """From now on let the C library give the memory of tensors of 1 MiB and more back as they are freed.

    By itself it comes to keep up to 32 MiB of each, and a block's temporaries then take twice the memory.
    """
    adjust = getattr(ctypes.pythonapi, "mallopt", None)
    if adjust is not None:
        for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            adjust(option, 1 << 20)


def return_freed_pages() -> None:
    """Give back what lies between tensors that live on, or was free before :func:`return_freed_tensors`.

    Large tensors are put there too, and their pages then stay with the process.
    """
    trim = getattr(ctypes.pythonapi, "malloc_trim", None)
    if trim is not None:
        trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that main memory or a GPU's is full, in the words of Python, the system, C++ or torch."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and tells_out_of_memory(str(error)))


def tells_out_of_memory(message: str) -> bool:
    """The same of an error's message."""
    # A thread that cannot start has no room for its stack.
    words = ("out of memory", "can't allocate memory", "bad_alloc", "MemoryError", "can't start new thread")
    return any(each in message for each in words)
