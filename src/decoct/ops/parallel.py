"""Row ranges worked on side by side, one thread each: small pieces stay in cache, where torch's own threads would wait.

A pass over a matrix is many short element-wise operations. Splitting each of them among threads costs more than it
gains below some hundred thousand entries; splitting the rows once, and letting every thread take its piece through all
the operations, doubles the speed on two cores.
"""

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from threading import Barrier, local

import torch

_AT_ONCE = 1 << 19  # entries of one piece: they fit the cache, and outlast a turn of the interpreter lock
_WORTH_A_THREAD = 1 << 16  # entries that take longer than waking a thread


class _Here(local):
    """What a thread knows of itself: whether it is one of a pool's."""

    works = False


_here = _Here()


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
    # Within a piece there is no second team: its tasks would wait behind the very ones that wait for them.
    most = 1 if _here.works else torch.get_num_threads()
    threads = min(most, max(1, rows * cols // _WORTH_A_THREAD))
    count = min(rows, threads * -(-rows * cols // (_AT_ONCE * threads)))  # a multiple, so that all end together
    edges = [rows * n // max(1, count) for n in range(count + 1)]
    pieces = [slice(start, stop) for start, stop in pairwise(edges)]
    if threads == 1:
        for piece in pieces:
            work(piece)
        return
    inference = torch.is_inference_mode_enabled()
    for done in [_pool(threads).submit(_run, work, pieces[first::threads], inference) for first in range(threads)]:
        done.result()


def _run(work: Callable[[slice], None], pieces: list[slice], inference: bool) -> None:
    # A thread of its own inherits neither mode from its caller, and tensors of inference mode refuse writes outside it.
    with torch.inference_mode(inference), torch.no_grad():
        for piece in pieces:
            work(piece)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads for which torch does not start threads again."""
    wanted, ready = torch.get_num_threads(), Barrier(threads + 1)

    def start() -> None:
        _here.works = True
        torch.get_num_threads()  # a thread's first use of this takes the latest setting of all; then it has its own
        torch.set_num_threads(1)
        ready.wait()

    pool = ThreadPoolExecutor(threads, "decoct-ops", initializer=start)
    for _ in range(threads):
        pool.submit(int)  # a worker starts with its first task
    ready.wait()
    torch.set_num_threads(wanted)  # the workers' setting is also what threads that start later would begin with
    return pool


# A forked child has the pool but not its threads, and would wait for them for ever.
if sys.platform != "win32":
    os.register_at_fork(after_in_child=_pool.cache_clear)
