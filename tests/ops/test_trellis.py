"""The trellis code against plain loops, its search against trying everything, and how close it comes to a Gaussian."""

import pytest
import torch

from decoct.ops import trellis
from decoct.ops.trellis import check_trellis, decode, encode, expected_error, shortest, shortest_path, state_values
from tests.reference import trellis as reference
from tests.reference.inputs import gaussian

TINY = [(1, 2, 8), (1, 4, 8), (2, 4, 6), (2, 5, 6), (3, 7, 4), (4, 8, 2), (4, 9, 3), (1, 8, 12), (1, 9, 12), (2, 9, 6),
        (2, 11, 6)]  # fmt: skip  # bits, state_bits, length; the last four put their digits in order every other step
FRACTION = 64


def table(bits: int, state_bits: int) -> list[float]:
    return [value / FRACTION for value in state_values(bits, state_bits).tolist()]


def number(digits: tuple[int, ...], bits: int) -> int:
    total = 0
    for digit in digits:
        total = total << bits | digit
    return total


@pytest.mark.parametrize(("bits", "state_bits"), [(1, 6), (2, 7), (3, 6), (4, 10)])
def test_values_are_slices_of_a_gaussian(bits: int, state_bits: int) -> None:
    expected = reference.values(
        bits, state_bits, trellis._SPREAD, trellis._SHUFFLE, trellis._WIDTH[bits], trellis._FRACTION
    )
    assert table(bits, state_bits) == expected
    followers = state_values(bits, state_bits).reshape(-1, 1 << bits)
    assert bool((followers.sort(1).values.diff(dim=1) > 0).all())  # what can follow lies in different slices


@pytest.mark.parametrize(("bits", "state_bits", "length"), TINY)
def test_decoding_reads_windows_of_a_ring(bits: int, state_bits: int, length: int) -> None:
    length = max(length, shortest(bits, state_bits))
    digits = torch.randint(0, 2**bits, (3, 2, length), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    found = decode(digits, bits, state_bits)
    for row in range(6):
        ring = tuple(digits.reshape(6, length)[row].tolist())
        values = [table(bits, state_bits)[s] for s in reference.states(ring, ring, bits, state_bits)]
        assert found.reshape(6, length)[row].tolist() == values


@pytest.mark.parametrize(("bits", "state_bits", "length"), TINY)
def test_the_path_is_the_best_of_all(bits: int, state_bits: int, length: int) -> None:
    x = (gaussian(3, length, seed=4).clamp(-5, 5) * FRACTION).round()
    lead = shortest(bits, state_bits)
    generator = torch.Generator().manual_seed(1)
    seams = [tuple(torch.randint(0, 2**bits, (lead,), generator=generator).tolist()) for _ in range(3)]
    kept = 2 ** (state_bits - bits)
    wanted = torch.tensor([number(seam, bits) % kept for seam in seams])
    digits = shortest_path(x.int(), bits, state_bits, wanted)
    for row, seam in enumerate(seams):
        found = tuple(digits[row].tolist())
        states = reference.states(found, seam, bits, state_bits)
        assert states[-1] % kept == wanted[row]
        error = sum(
            (table(bits, state_bits)[s] - t) ** 2 for s, t in zip(states, (x[row] / FRACTION).tolist(), strict=True)
        )
        assert error == pytest.approx(
            reference.least_error(x[row] / FRACTION, table(bits, state_bits), bits, state_bits, seam), abs=1e-9
        )


@pytest.mark.parametrize(("bits", "state_bits"), [(1, 8), (2, 8), (2, 11), (3, 8), (4, 8)])
def test_rings_are_near_the_best_open_path(bits: int, state_bits: int) -> None:
    """Closing a sequence costs little: the search that may begin and end anywhere is a bound."""
    x = gaussian(8, 128, seed=5)
    steps = (x * FRACTION).round().int()
    open_digits = shortest_path(steps, bits, state_bits, None)
    lead = shortest(bits, state_bits)
    beyond = (decode(open_digits, bits, state_bits) - x)[:, lead:].square().mean()
    ring = (decode(encode(x, bits, state_bits), bits, state_bits) - x).square().mean()
    assert float(ring) < 1.06 * float(beyond)


@pytest.mark.parametrize(
    ("bits", "state_bits", "most"), [(1, 10, 0.285), (2, 10, 0.074), (2, 12, 0.0715), (3, 10, 0.0195), (4, 10, 0.0053)]
)
def test_error_on_a_gaussian(bits: int, state_bits: int, most: float) -> None:
    """Scalar quantizers cannot do better than 0.3634, 0.1175, 0.0345, 0.0095; nothing can than 4**-bits."""
    x = gaussian(32, 256, seed=6)
    x /= x.square().mean().sqrt()
    error = float((decode(encode(x, bits, state_bits), bits, state_bits) - x).square().mean())
    assert 4.0**-bits < error < most
    assert error == pytest.approx(expected_error(bits), rel=0.2)


def test_threads_and_batches_change_nothing() -> None:
    x = gaussian(40, 64, seed=7)
    many = encode(x, 2, 14)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(encode(x, 2, 14), many)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat([encode(x[:1], 2, 14), encode(x[1:], 2, 14)]), many)


@pytest.mark.parametrize("size", [0.0, 1e-3, 1e3, 1e30])
def test_inputs_of_any_size_give_digits(size: float) -> None:
    for bits in range(1, 5):
        digits = encode(gaussian(2, 512) * size, bits, 8 if bits < 4 else 16)
        assert int(digits.max()) < 2**bits
        if size > 1:  # beyond the range: the values on either end
            values = decode(digits, bits, 8 if bits < 4 else 16)
            assert float((values * gaussian(2, 512)).mean()) > 0.5


def test_numbers_that_make_no_trellis_are_refused() -> None:
    for bits in (0, 5):
        with pytest.raises(ValueError, match=f"bits must be 1 to 4, not {bits}"):
            check_trellis(bits, 12)
    for state_bits in (3, 17):
        with pytest.raises(ValueError, match=r"state_bits must lie between 4 \(twice the bits\) and 16"):
            check_trellis(2, state_bits)
