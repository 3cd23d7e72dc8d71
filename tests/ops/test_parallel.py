"""Pieces cover every row once, whatever their number, and an error in one comes out."""

import pytest
import torch

from decoct.ops.parallel import each_piece


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
