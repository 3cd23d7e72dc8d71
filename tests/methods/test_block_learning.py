"""What methods that learn a block's codes share."""

import pytest

from decoct.methods.block_learning import Order


@pytest.mark.parametrize(("count", "batch"), [(12, 5), (12, 8), (12, 12), (5, 8)])
def test_every_sequence_is_seen_as_often_as_any_other(count: int, batch: int) -> None:
    order = Order(count, batch, seed=3)
    seen = [number for _ in range(2 * count) for number in order.next()]
    assert len(seen) == 2 * count * min(count, batch)
    for start in range(0, len(seen), count):
        assert sorted(seen[start : start + count]) == list(range(count))
    again = Order(count, batch, seed=3)
    assert seen == [number for _ in range(2 * count) for number in again.next()]
