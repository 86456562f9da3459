"""Memory that a process has freed and still holds."""

import ctypes

import pyarrow as pa

MIB = 2**20
KEPT = {-1: 512 * MIB, -2: 64 * MIB, -3: 32 * MIB}
"""glibc's M_TRIM_THRESHOLD: what it keeps at the end of an arena; M_TOP_PAD: what it takes at once;
M_MMAP_THRESHOLD: blocks from this size on are taken and given back one by one."""


def keep_memory() -> None:
    """Let the C library keep freed memory for what this process needs next.

    Outside a process's first thread, where Ray runs its workers' functions, it otherwise gives back
    the memory of every step and takes it again page by page.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc's own
        for option, value in KEPT.items():
            libc.mallopt(option, value)


def release_memory() -> None:
    """Give back to the system what Arrow and the C library keep of freed memory for later use.

    Between two steps that need much each, so that the second does not come on top of the first.
    """
    pa.default_memory_pool().release_unused()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc's own
        libc.malloc_trim(0)
