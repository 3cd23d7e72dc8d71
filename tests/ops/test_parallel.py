"""Pieces cover every row once, whatever their number, and an error in one comes out."""

import multiprocessing
import sys
from collections.abc import Iterator
from threading import Thread

import pytest
import torch

from decoct.ops import parallel
from decoct.ops.parallel import each_piece


@pytest.fixture
def two_threads() -> Iterator[None]:
    parallel._pool.cache_clear()  # its threads are to start within the test
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("rows", "cols"), [(0, 8), (1, 1 << 21), (3, 1 << 20), (1000, 700), (5, 7), (4096, 4096)])
def test_every_row_once(threads: int, rows: int, cols: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        seen = torch.zeros(rows, dtype=torch.int32)

        def work(part: slice) -> None:
            seen[part] += 1

        each_piece(work, rows, cols)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert bool((seen == 1).all())


def test_an_error_in_a_piece_comes_out() -> None:
    def work(part: slice) -> None:
        if part.start > 0:
            raise ValueError("the last piece")

    with pytest.raises(ValueError, match="the last piece"):
        each_piece(work, 4096, 4096)


def fill(target: torch.Tensor) -> None:
    def work(part: slice) -> None:
        target[part] = 1.0

    each_piece(work, *target.shape)


@pytest.mark.usefixtures("two_threads")
def test_pieces_within_pieces_do_not_wait_for_each_other() -> None:
    """And torch starts no threads of its own within a piece."""
    seen, numbers = torch.zeros(1024, dtype=torch.int32), []

    def inner(part: slice, start: int) -> None:
        numbers.append(torch.get_num_threads())
        seen[start + part.start : start + part.stop] += 1

    def outer(part: slice) -> None:
        each_piece(lambda each: inner(each, part.start), part.stop - part.start, 1 << 12)

    caller = Thread(target=lambda: each_piece(outer, 1024, 1 << 12), daemon=True)
    caller.start()
    caller.join(60)
    assert not caller.is_alive()
    assert bool((seen == 1).all())
    assert set(numbers) == {1}


@pytest.mark.usefixtures("two_threads")
def test_tensors_of_inference_mode_can_be_written() -> None:
    with torch.inference_mode():
        made = torch.zeros(1024, 1024)
        fill(made)
    assert bool((made == 1).all())


@pytest.mark.usefixtures("two_threads")
def test_threads_that_start_later_keep_the_callers_number() -> None:
    fill(torch.zeros(1024, 1024))
    seen: list[int] = []
    later = Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [2]


def forked(queue: "multiprocessing.SimpleQueue[int]") -> None:
    seen: list[int] = []  # without tensors: OpenMP's own threads do not survive a fork
    each_piece(lambda part: seen.extend(range(part.start, part.stop)), 1024, 1024)
    queue.put(len(set(seen)))


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
@pytest.mark.usefixtures("two_threads")
def test_a_forked_process_gets_threads_of_its_own() -> None:
    fill(torch.zeros(1024, 1024))
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=forked, args=(queue,))
    child.start()
    child.join(20)
    if child.exitcode is None:
        child.kill()
    assert child.exitcode == 0
    assert queue.get() == 1024
