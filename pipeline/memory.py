"""What a process that works on large blocks tells its allocator."""

import ctypes


def keep_memory() -> None:
    """Has glibc keep what is freed for the next block or step, where else it goes back to the system and faults in again."""
    mmap_threshold, trim_threshold = -3, -1  # as in malloc.h
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
