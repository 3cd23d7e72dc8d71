"""Base-3 packing and positions as runs, against the one-at-a-time references."""

import pytest
import torch

from decoct.ops.gaps import pack_positions, unpack_positions
from decoct.ops.packing import packed_width
from decoct.ops.trits import pack_trits, trit_width, unpack_trits
from tests.reference import bits as bit_reference
from tests.reference import trits as reference


def random_trits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


@pytest.mark.parametrize("width", [*range(1, 17), 576, 577])
def test_bytes_are_the_references(width: int) -> None:
    trits = random_trits(3, width, seed=width)
    packed = pack_trits(trits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [reference.pack(row) for row in trits.tolist()]
    assert torch.equal(unpack_trits(packed, width), trits)


@pytest.mark.parametrize("shape", [(13,), (3, 13), (2, 3, 13), (0, 13)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    trits = random_trits(*shape)
    packed = pack_trits(trits)
    assert packed.shape == (*shape[:-1], 3)
    assert torch.equal(unpack_trits(packed, 13), trits)


def test_extremes_and_size() -> None:
    for value in (-1, 0, 1):
        trits = torch.full((2, 11), value, dtype=torch.int8)
        assert torch.equal(unpack_trits(pack_trits(trits), 11), trits)
    assert pack_trits(random_trits(64, 640)).nbytes == 64 * 640 * 1.6 / 8
    assert [trit_width(n) for n in (0, 1, 5, 6)] == [0, 1, 1, 2]
    with pytest.raises(ValueError, match=r"2 bytes cannot hold 11 trits.*truncated"):
        unpack_trits(pack_trits(random_trits(10)), 11)


@pytest.mark.parametrize("share", [0.0, 0.003, 0.05, 0.1, 0.3, 0.7, 1.0])
def test_positions_as_runs(share: float) -> None:
    places = torch.rand(4000, generator=torch.Generator().manual_seed(1)) < share
    positions = places.nonzero().squeeze(1)
    packed, bits, count = pack_positions(positions)
    assert packed.tolist() == bit_reference.pack(reference.gaps(positions.tolist(), bits), bits)
    assert packed.nbytes == packed_width(count, bits)
    assert torch.equal(unpack_positions(packed, bits, count), positions)
    for other in range(1, 9):
        assert packed.nbytes <= packed_width(len(reference.gaps(positions.tolist(), other)), other)


@pytest.mark.parametrize("positions", [[], [0], [5000], [0, 1, 2], [254, 255, 256], [0, 255, 511, 100_000]])
def test_single_and_far_positions(positions: list[int]) -> None:
    packed, bits, count = pack_positions(torch.tensor(positions, dtype=torch.long))
    assert unpack_positions(packed, bits, count).tolist() == positions


def test_a_tenth_costs_little_more_than_its_entropy() -> None:
    places = torch.rand(200_000, generator=torch.Generator().manual_seed(2)) < 0.1
    packed, _, _ = pack_positions(places.nonzero().squeeze(1))
    assert 0.46 < 8 * packed.nbytes / places.numel() < 0.52
