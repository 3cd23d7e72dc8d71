"""How the C library's heap behaves while a model is loaded."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM, _MMAP = -1, -3  # glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
_WHILE_LOADING = 1 << 20
_AFTERWARDS = 32 << 20  # as far as glibc goes by itself, once a program has freed blocks of that size


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """While the body runs, every block of a MiB or more has memory of its own, which goes back when it is freed.

    Loading reads each matrix, packs it anew, and frees what was read. In a heap that has learnt to keep large blocks
    for the next request, which is what glibc does, what was read stays between what was packed: a seventh of a file of
    600 MiB. Afterwards large blocks are kept again, since fresh memory for each intermediate result is slow. With
    other C libraries nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, another system
        yield
        return
    mallopt(_MMAP, _WHILE_LOADING)
    try:
        yield
    finally:
        mallopt(_MMAP, _AFTERWARDS)
        mallopt(_TRIM, 2 * _AFTERWARDS)
