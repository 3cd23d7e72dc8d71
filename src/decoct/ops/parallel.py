"""Row ranges worked on side by side, one thread each: small pieces stay in cache, where torch's own threads would wait.

A pass over a matrix is many short element-wise operations. Splitting each of them among threads costs more than it
gains below some hundred thousand entries; splitting the rows once, and letting every thread take its piece through all
the operations, doubles the speed on two cores.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import torch

_AT_ONCE = (
    1 << 19
)  # entries of one piece: short enough for the cache, long enough to outlast a turn of the interpreter lock

_WORTH_A_THREAD = 1 << 16  # entries that take longer than waking a thread


def each_piece(work: Callable[[slice], None], rows: int, cols: int, device: torch.device | None = None) -> None:
    """Call `work` with row ranges that together cover [0, rows), on as many threads as torch is set to use.

    Args:
        work: must write only what belongs to its rows; its result must not depend on how the rows are split.
        rows: rows in all.
        cols: entries of each row.
        device: where the entries are; on anything but a CPU one call does it all.
    """
    if device is not None and device.type != "cpu":
        work(slice(0, rows))
        return
    threads = min(torch.get_num_threads(), max(1, rows * cols // _WORTH_A_THREAD))
    count = min(rows, threads * -(-rows * cols // (_AT_ONCE * threads)))  # a multiple, so that all end together
    edges = [rows * n // max(1, count) for n in range(count + 1)]
    pieces = [slice(start, stop) for start, stop in pairwise(edges)]
    if threads == 1:
        for piece in pieces:
            work(piece)
        return
    for done in [_pool(threads).submit(_run, work, pieces[first::threads]) for first in range(threads)]:
        done.result()


def _run(work: Callable[[slice], None], pieces: list[slice]) -> None:
    with torch.no_grad():  # a thread of its own does not inherit this from its caller
        for piece in pieces:
            work(piece)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads for which torch does not start threads again."""
    return ThreadPoolExecutor(threads, "decoct-ops", initializer=torch.set_num_threads, initargs=(1,))
