"""Trellis-coded quantization of Gaussian sequences: the bit-shift trellis of QTIP (arXiv 2406.11235).

A sequence of weights becomes a stream of digits of `bits` bits. The last `state_bits` bits of the stream up to a weight
are its state, and a fixed table gives the value of each state: the weight. So a weight costs `bits` bits and yet has
2**state_bits values to choose from, which its neighbours constrain. Finding the best stream is a shortest path, which
Viterbi's algorithm finds exactly.
"""

from functools import cache

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from decoct.ops.parallel import each_piece

_FRACTION = 64  # values and inputs are taken in steps of 1/64, so distances are exact integers
_LARGEST = 5.0  # inputs beyond this many standard deviations are taken for this
_LONGEST = 512  # steps after which distances might no longer fit into 31 bits
_UNREACHABLE = 1 << 30
_SEAM = 5  # states on either side of a sequence's ends that are looked at to choose how its ends meet
_MULTIPLE = 8  # of which sequences are long: whole bytes
_CACHE = 1 << 17  # distances of one batch: they stay in the processor's cache
_SIDE_BY_SIDE = 64  # sequences in a batch at least: fewer are short rows
_ROW = 16  # sequences side by side come in multiples of this: whole vectors
_WORTH_A_THREAD = 64  # sequences that a thread of their own is worth its while for
_PIECE = 1 << 19  # what `each_piece` takes for a piece of its own

_SPREAD, _SHUFFLE = 38115, 37435  # the pair of odd multipliers with the least error among some hundreds
_WIDTH = {1: 0.90, 2: 1.0, 3: 1.05, 4: 1.05}  # spread of the values, by bits, that loses least on a standard Gaussian


def check_trellis(bits: int, state_bits: int) -> None:
    """Refuse numbers that make no trellis.

    Raises:
        ValueError: bits not in 1..4, or state_bits not between 2·bits and 16.
    """
    if not 1 <= bits <= 4:
        raise ValueError(f"bits must be 1 to 4, not {bits}")
    if not 2 * bits <= state_bits <= 16:
        raise ValueError(f"state_bits must lie between {2 * bits} (twice the bits) and 16, not {state_bits}")


def expected_error(bits: int) -> float:
    """Mean squared error on a standard Gaussian, about: 0.6 dB above the least there can be, 4**-bits."""
    return float(1.15 * 4.0**-bits)


def shortest(bits: int, state_bits: int) -> int:
    """How many digits before the newest take part in a state: a ring needs at least as many."""
    return -(-state_bits // bits) - 1


@cache
def state_values(bits: int, state_bits: int) -> Int[Tensor, " states"]:
    """The value of each state in steps of 1/64, int32; over all states they are spread as a Gaussian's quantiles.

    The digits before the newest choose where in each of 2**bits slices of equal probability the values lie, and which
    digit stands for which slice. So the values that can follow one another always cover the whole range evenly, where
    QTIP's pseudorandom values leave that to chance.
    """
    kinds, older = 1 << bits, 1 << (state_bits - bits)
    history = torch.arange(older)
    offset = ((history * _SPREAD % older) + 0.5) / older
    shuffle = history * _SHUFFLE % older * kinds // older
    cell = torch.arange(kinds)[None, :] ^ shuffle[:, None]
    quantile = (cell + offset.double()[:, None]) / kinds
    values: Tensor = torch.special.ndtri(quantile)
    return (values * _WIDTH[bits] * _FRACTION).round().to(torch.int32).reshape(-1)


def decode(digits: UInt8[Tensor, "*seqs length"], bits: int, state_bits: int) -> Float[Tensor, "*seqs length"]:
    """The values that streams of digits stand for, float32. A stream is a ring: before its start lies its end."""
    lead = shortest(bits, state_bits)
    state = torch.cat([digits[..., -lead:], digits], -1).to(torch.int32)
    older = 0  # how many digits before the newest are in each state already
    while older < lead:
        step = min(older + 1, lead - older)
        state = (state[..., :-step] << (step * bits)).bitwise_or_(state[..., step:])
        older += step
    table = state_values(bits, state_bits).to(digits.device).float() / _FRACTION
    return table.index_select(0, (state & ((1 << state_bits) - 1)).flatten()).view(digits.shape)


@cache
def window_values(bits: int, state_bits: int) -> Float[Tensor, " windows"]:
    """The value of each window of a stream as it is packed: the newest digit in the highest bits; float32."""
    lead = shortest(bits, state_bits)
    windows = torch.arange(1 << (lead + 1) * bits, dtype=torch.int32)
    state = torch.zeros_like(windows)
    for older in range(lead + 1):
        digit = (windows >> (lead - older) * bits) & ((1 << bits) - 1)
        state |= digit << older * bits
    return state_values(bits, state_bits)[state & ((1 << state_bits) - 1)].float() / _FRACTION


def encode(x: Float[Tensor, "seqs length"], bits: int, state_bits: int) -> UInt8[Tensor, "seqs length"]:
    """The digits whose values come closest to each sequence, by squared distance.

    How the end of the ring meets its start is decided first, from the neighbourhood of the seam alone (the idea of
    QTIP's algorithm 4); given that, the path is the shortest, but for rounding x to 1/64. All arithmetic is on
    integers, so the result depends neither on the number of threads nor on the machine.

    Args:
        x: about standard normal; beyond ±5 taken for ±5.
        bits: 1 to 4.
        state_bits: time and memory grow with 2**state_bits.
    """
    count, length = x.shape
    assert shortest(bits, state_bits) <= length <= _LONGEST
    assert length % _MULTIPLE == 0
    digits = torch.empty(count, length, dtype=torch.uint8)
    steps = (x.float().clamp(-_LARGEST, _LARGEST) * _FRACTION).round().to(torch.int32)
    most = max(_SIDE_BY_SIDE, _CACHE >> state_bits)
    batches = max(-(-count // most), min(torch.get_num_threads(), count // _WORTH_A_THREAD))
    edges = [count * number // batches for number in range(batches + 1)]

    def work(part: slice) -> None:
        for number in range(batches)[part]:
            batch = steps[edges[number] : edges[number + 1]]
            whole = torch.nn.functional.pad(batch, (0, 0, 0, -len(batch) % _ROW))
            digits[edges[number] : edges[number + 1]] = _ring(whole, bits, state_bits)[: len(batch)]

    each_piece(work, batches, _PIECE)
    return digits


def _ring(x: Int[Tensor, "seqs length"], bits: int, state_bits: int) -> UInt8[Tensor, "seqs length"]:
    """Digits of closed paths; x in steps of 1/64."""
    lead = shortest(bits, state_bits)
    around = min(-(-_SEAM * (lead + 1) // _MULTIPLE) * _MULTIPLE, x.shape[1])
    ends = torch.cat([x[:, -around:], x[:, :around]], 1)
    meeting = shortest_path(ends, bits, state_bits, None)[:, around - lead : around]
    seam = torch.zeros(x.shape[0], dtype=torch.int64)
    for digit in meeting.unbind(1):
        seam = (seam << bits) | digit
    return shortest_path(x, bits, state_bits, seam & ((1 << (state_bits - bits)) - 1))


@cache
def _distance_terms(bits: int, state_bits: int) -> tuple[Int[Tensor, "states 1"], Int[Tensor, "states 1"]]:
    """The constant and the slope of each state's distance, value² - 2·x·value, which is affine in x; int32.

    The minimum over a state's oldest digit must also say which digit it was. So all distances are multiples of
    2**bits, and the oldest digit is part of the constant: it ends up in the low bits of the minimum.
    """
    values = state_values(bits, state_bits)
    oldest = torch.arange(len(values), dtype=torch.int32) >> (state_bits - bits)
    return ((values.square() << bits) + oldest).unsqueeze(1), (values * -2 << bits).unsqueeze(1)


def shortest_path(
    x: Int[Tensor, "seqs length"], bits: int, state_bits: int, seam: Int[Tensor, " seqs"] | None
) -> UInt8[Tensor, "seqs length"]:
    """Viterbi's algorithm.

    Sequences lie side by side, so every operation is on long rows whatever the trellis. States are numbered with the
    oldest digit first, so the minimum over it is one over blocks of rows, and the states that are left are in order.

    Args:
        x: in steps of 1/64, at most 5 in size; at most 512 long.
        bits: of a digit.
        state_bits: of a state.
        seam: the digits before each sequence's start, as one number; they must also be those at its end. None: any.
    """
    (count, length), (constant, slope) = x.shape, _distance_terms(bits, state_bits)
    states, digit, older = 1 << state_bits, 1 << bits, 1 << (state_bits - bits)
    distance = torch.empty(states, count, dtype=torch.int32)
    best = torch.zeros(older, count, dtype=torch.int32)
    if seam is not None:
        best.fill_(_UNREACHABLE).scatter_(0, seam[None], 0)
    history = torch.empty(length, older, count, dtype=torch.uint8)
    # A torch call on some thousand numbers is mostly overhead, so every view is made before the loop.
    before, laid = best.view(older, 1, count), distance.view(older, digit, count)
    halves = [(distance[:half], distance[half : 2 * half]) for half in (states >> n for n in range(1, bits + 1))]
    digits_only, low_bits = torch.tensor(digit - 1, dtype=torch.uint8), torch.tensor(-digit, dtype=torch.int32)
    for column, dropped in zip(x.T.contiguous().unbind(), history.unbind(), strict=True):
        torch.mul(slope, column, out=distance)
        distance.add_(constant)
        laid.add_(before)
        for first, second in halves[:-1]:
            torch.minimum(first, second, out=first)
        torch.minimum(*halves[-1], out=best)
        dropped.copy_(best)  # its low eight bits
        best.bitwise_and_(low_bits)
    history.bitwise_and_(digits_only)
    return _walk_back(history, best.argmin(0) if seam is None else seam, bits, state_bits)


def _walk_back(
    history: UInt8[Tensor, "length older seqs"], ends: Int[Tensor, " seqs"], bits: int, state_bits: int
) -> UInt8[Tensor, "seqs length"]:
    """The digits of the paths that end with the digits `ends`, given the digit that each step dropped."""
    digits = torch.empty(history.shape[0], history.shape[2], dtype=torch.uint8)
    at = ends.clone()
    for dropped, digit in zip(reversed(history.unbind()), reversed(digits.unbind()), strict=True):
        digit.copy_(at & ((1 << bits) - 1))
        oldest = dropped.gather(0, at[None])[0].long()
        at = (at >> bits) | (oldest << (state_bits - 2 * bits))
    return digits.T.contiguous()
