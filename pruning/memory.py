"""Keep freed memory: large tensors that come and go must not be mapped anew each time.

What came and went once is given back.
"""

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's mallopt(3)
_NEVER = 2**31 - 1


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


def give_back_freed_memory() -> bool:
    """Give what is free at this time back to the system; return whether it could be told."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return False
    return bool(trim(0))
