"""Settings of the allocator for processes that work on large blocks."""

import ctypes

import pyarrow as pa


def tune_malloc() -> None:
    """Has glibc keep what is freed for the next block or step, where else it goes back to the system and faults in again."""
    mmap_threshold, trim_threshold = -3, -1  # as in malloc.h
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def release_memory() -> None:
    """What was kept goes back to the system: what comes next needs other blocks."""
    pa.default_memory_pool().release_unused()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
