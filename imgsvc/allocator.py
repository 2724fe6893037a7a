"""How the C library gives memory back."""

from __future__ import annotations

import ctypes

# glibc's mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_MIB = 1024 * 1024


def keep_memory() -> None:
    """Has freed memory kept for the next use, at most 64 MiB of it.

    What is read from the network comes in pieces of more than 128 KiB, for each of which glibc would ask the kernel
    anew: hundreds of thousands of page faults a GiB, and most of the system's time on a virtual machine whose host
    takes back what is freed. Does nothing with another C library."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # A threshold that is set is no longer adapted, so both are. What is kept is kept in each of the arenas.
        mallopt(_M_MMAP_THRESHOLD, 4 * _MIB)
        mallopt(_M_TRIM_THRESHOLD, 32 * _MIB)
        mallopt(_M_ARENA_MAX, 2)
