"""Rows that were compressed apart are stored together where their kind allows it, and never cost more."""

import pytest
import torch

from decoct.weights import Codebook, GroupInt, Masked, Sparse, Stacked, Sum, Weight, stack
from tests.reference.inputs import gaussian
from tests.weights.samples import codebook, columns, group_int, mask

PARTS: dict[str, tuple[list[Weight], type[Weight]]] = {
    "ints": ([group_int(5), group_int(7)], GroupInt),
    "ints with zero points": ([group_int(5, symmetric=False), group_int(3, symmetric=False)], GroupInt),
    "one scale for each": ([group_int(5, group_size="tensor"), group_int(7, group_size="tensor")], Stacked),
    "other bits": ([group_int(5, bits=3), group_int(7, bits=4)], Stacked),
    "masked": ([Masked.of(group_int(), mask()), Masked.of(group_int(seed=2), mask(keep=0.2))], Masked),
    "sparse": ([Sparse.of(gaussian(12, 24), mask()), Sparse.of(gaussian(12, 24), ~mask())], Sparse),
    "sparse in two ways": (
        [Sparse.of(gaussian(12, 512), mask(12, 512)), Sparse.of(gaussian(12, 512), mask(12, 512, 0.004))],
        Stacked,
    ),
    "a table for each row": ([codebook(bits=3), codebook(bits=3)], Codebook),
    "tables shared by rows": ([codebook(bits=4, tables=3), codebook(bits=4, tables=3)], Stacked),
    "sums": ([Sum.of(group_int(), columns()), Sum.of(group_int(), columns((0,)))], Stacked),
    "kinds": ([group_int(), codebook(bits=3)], Stacked),
}


@pytest.mark.parametrize("name", PARTS)
def test_stacked_rows(name: str) -> None:
    parts, kind = PARTS[name]
    made = stack(parts)
    assert type(made) is kind
    assert made.nbytes == sum(part.nbytes for part in parts)
    torch.testing.assert_close(made.unpack(), torch.cat([part.unpack() for part in parts]), rtol=0, atol=0)
    rows = torch.tensor([0, made.shape[0] - 1, 2])
    torch.testing.assert_close(made.unpack_rows(rows), made.unpack()[rows], rtol=0, atol=0)
    x = gaussian(3, made.shape[1])
    torch.testing.assert_close(made.apply(x), x @ made.unpack().T)


def test_one_part_is_itself() -> None:
    part = group_int()
    assert stack([part]) is part


def test_widths_must_agree() -> None:
    with pytest.raises(ValueError, match="of one width can be stacked"):
        stack([group_int(5, 16), group_int(5, 32)])
