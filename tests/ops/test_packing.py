"""Bit packing against the bit-by-bit reference."""

import pytest
import torch

from decoct.ops.packing import pack_bits, pack_mask, packed_width, unpack_bits, unpack_mask
from tests.reference import bits as reference

ALL_BITS = range(1, 9)
WIDTHS = (*range(1, 26), 31, 32, 33, 63, 64, 65, 127, 128, 129)


def random_codes(bits: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_stream_is_the_references_bit_for_bit(bits: int) -> None:
    for width in WIDTHS:
        codes = random_codes(bits, 2, width, seed=width)
        packed = pack_bits(codes, bits)
        assert packed.dtype == torch.uint8
        assert packed.tolist() == [reference.pack(row, bits) for row in codes.tolist()]
        unpacked = unpack_bits(packed, bits, width)
        assert unpacked.dtype == torch.uint8
        assert unpacked.tolist() == [reference.unpack(row, bits, width) for row in packed.tolist()] == codes.tolist()


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("shape", [(13,), (3, 13), (2, 3, 13), (0, 13)])
def test_any_leading_shape(bits: int, shape: tuple[int, ...]) -> None:
    codes = random_codes(bits, *shape)
    packed = pack_bits(codes, bits)
    assert packed.shape == (*shape[:-1], packed_width(13, bits))
    assert torch.equal(unpack_bits(packed, bits, 13), codes)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_extreme_codes_do_not_leak_into_neighbours(bits: int) -> None:
    codes = torch.tensor([[0, 2**bits - 1] * 8, [2**bits - 1, 0] * 8])
    assert torch.equal(unpack_bits(pack_bits(codes, bits), bits, 16), codes.to(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_codes_of_any_integer_type(dtype: torch.dtype) -> None:
    codes = random_codes(5, 4, 9)
    assert torch.equal(pack_bits(codes.to(dtype), 5), pack_bits(codes, 5))


def test_three_bits_take_three_bits() -> None:
    assert pack_bits(random_codes(3, 64, 128), 3).nbytes == 64 * 128 * 3 // 8
    assert [packed_width(n, 3) for n in (0, 1, 2, 3, 8, 9)] == [0, 1, 1, 2, 3, 4]


@pytest.mark.parametrize("bits", ALL_BITS)
def test_truncated_rows_are_refused(bits: int) -> None:
    packed = pack_bits(random_codes(bits, 2, 24), bits)
    with pytest.raises(ValueError, match=rf"{3 * bits - 1} bytes cannot hold 24 codes of {bits} bits.*truncated"):
        unpack_bits(packed[:, :-1], bits, 24)


@pytest.mark.parametrize("bits", [-1, 0, 9])
def test_impossible_bits_are_refused(bits: int) -> None:
    codes = torch.zeros(1, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"bits must be 1 to 8, not {bits}"):
        pack_bits(codes, bits)
    with pytest.raises(ValueError, match=f"bits must be 1 to 8, not {bits}"):
        unpack_bits(codes, bits, 8)


def test_masks_take_one_bit_an_entry() -> None:
    mask = random_codes(1, 5, 19).bool()
    packed = pack_mask(mask)
    assert packed.shape == (5, 3)
    assert torch.equal(unpack_mask(packed, 19), mask)
