"""Returns freed host memory to the system (glibc only), and recognises out-of-memory errors."""

from __future__ import annotations

import ctypes
import errno

# Parameters of mallopt, as glibc's malloc.h defines them.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def return_freed_tensors() -> None:
    """Make the C library return the memory of every allocation of 1 MiB or more as soon as it is freed.

    By default glibc raises this threshold up to 32 MiB as large allocations are freed. Quantizing a block then takes
    twice the memory, because its temporaries stay with the process. Does nothing where there is no ``mallopt``.
    """
    adjust = getattr(ctypes.pythonapi, "mallopt", None)
    if adjust is not None:
        for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            adjust(option, 1 << 20)


def return_freed_pages() -> None:
    """Return unused pages of the C library's heap to the system.

    These are pages between live tensors, and pages freed before :func:`return_freed_tensors` was called. Does nothing
    where there is no ``malloc_trim``.
    """
    trim = getattr(ctypes.pythonapi, "malloc_trim", None)
    if trim is not None:
        trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` means that host or GPU memory is full; it may come from Python, the system, C++ or torch."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and tells_out_of_memory(str(error)))


def tells_out_of_memory(message: str) -> bool:
    """Whether the message of an error means that memory is full."""
    # A new thread fails to start when there is no memory for its stack.
    words = ("out of memory", "can't allocate memory", "bad_alloc", "MemoryError", "can't start new thread")
    return any(each in message for each in words)
