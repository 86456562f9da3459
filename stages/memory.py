"""Memory that a process has freed and still holds."""

import ctypes

import pyarrow as pa


def release_memory() -> None:
    """Give back to the system what Arrow and the C library keep of freed memory for later use.

    Between two steps that need much each, so that the second does not come on top of the first.
    """
    pa.default_memory_pool().release_unused()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc's own
        libc.malloc_trim(0)
