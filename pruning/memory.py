"""What large tensors that come and go cost: each page of a fresh one is a fault.

A search keeps what it freed; a pruning, whose peak should stay low, takes larger pages.
"""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's mallopt(3)
_NEVER = 2**31 - 1


def use_huge_pages() -> None:
    """Let torch ask for huge pages; to be called before the first large tensor is made.

    A page of 2 MiB in place of 4 KiB makes the first pass over a fresh tensor five times as fast,
    where the system grants it. The user's own setting stands.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory() -> bool:
    """Tell glibc to reuse large freed blocks; return whether it could be told.

    By default it gives every large block back to the system, and each page of the next one costs
    a fault: that was three quarters of the time of scoring a model. The process then holds its
    peak until it ends. Other C libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, _NEVER))
