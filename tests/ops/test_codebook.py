"""Codes of the nearest table values, and back."""

import pytest
import torch

from decoct.ops.codebook import lookup, nearest
from tests.reference import kmeans as reference
from tests.reference.inputs import gaussian


@pytest.mark.parametrize("entries", [2, 8, 16, 256])
def test_the_nearest_value(entries: int) -> None:
    w, tables = gaussian(5, 40), gaussian(5, entries, seed=1).sort(1).values
    found = nearest(w, tables)
    rows = zip(w.tolist(), tables.tolist(), strict=True)
    assert found.tolist() == [[reference.nearest(v, table) for v in row] for row, table in rows]
    assert found.dtype == torch.uint8


def test_a_middle_goes_to_the_lower_and_the_largest_numbers_do_not_overflow() -> None:
    largest = torch.finfo(torch.float32).max
    tables = torch.tensor([[-1.0, 1.0, 2.0, 4.0], [-largest, -1.0, 0.9 * largest, largest]])
    w = torch.tensor([[0.0, 1.5, 3.0, 9.0], [-largest, 0.4 * largest, 0.6 * largest, largest]])
    assert nearest(w, tables).tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]


@pytest.mark.parametrize("d", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lookup(d: int, dtype: torch.dtype) -> None:
    codes = torch.randint(0, 256, (4, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    tables = gaussian(4, 256, d, dtype=dtype)
    expected = torch.stack([torch.cat([tables[i, c] for c in row]) for i, row in enumerate(codes.tolist())])
    found = lookup(codes, tables)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
