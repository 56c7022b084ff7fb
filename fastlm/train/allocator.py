"""Keeping freed memory in the process.

glibc returns a large freed block to the system at once, and the next step pays a page fault for every 4 KiB of it. A
training step frees and takes the same blocks again and again; kept in the heap, they are faulted in once.
"""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h
_ONE_GIB = 1 << 30


def on_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


def keep_freed_memory() -> bool:
    """Blocks up to 1 GiB come from the heap, and the heap shrinks only above 1 GiB free. False where not glibc.

    For the whole process and for good: a program's choice, not a library's.
    """
    if not on_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _ONE_GIB) and mallopt(_M_TRIM_THRESHOLD, _ONE_GIB))
