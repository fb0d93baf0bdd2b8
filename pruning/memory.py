"""Keep freed memory, so that large temporary tensors are not mapped anew each time.

After a step that will not come again the memory can be given back.
"""

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's mallopt(3)
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell glibc to reuse large freed blocks; return whether that worked.

    By default it returns every large block to the system, and each page of the next one costs
    a page fault: three quarters of the time of scoring a model. With this the process holds its
    peak memory until it ends. Other C libraries are left alone.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, _NEVER))


def give_back_freed_memory() -> bool:
    """Return currently free memory to the system; return whether that worked."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return False
    return bool(trim(0))
