"""Memory of freed tensors, given back to the system instead of kept by the C library (glibc) for later."""

from __future__ import annotations

import ctypes

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
