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
_MIN_INNER = 5  # fewer than 2**5 numbers side by side are slow to take the minimum of
_HISTORY = 4  # low bits of a distance that hold the digits that led to it
_SEAM = 5  # states on either side of a sequence's ends that are looked at to choose how its ends meet
_MULTIPLE = 8  # of which sequences are long: whole bytes, and whole periods of the search
_CACHE = (
    1 << 17
)  # distances of one batch: they stay in the processor's cache, and outlast a turn of the interpreter lock
_WORTH_A_THREAD = 1 << 19  # what `each_piece` takes for a piece of its own

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
    known = bits  # how many bits of each state are there already
    while known < state_bits:
        step = known // bits
        state[..., step:] |= state[..., :-step] << known
        known *= 2
    table = state_values(bits, state_bits).to(digits.device).float() / _FRACTION
    return table[state[..., lead:] & ((1 << state_bits) - 1)]


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
    batches = -((-count << state_bits) // _CACHE)
    edges = [count * number // batches for number in range(batches + 1)]

    def work(part: slice) -> None:
        for number in range(batches)[part]:
            rows = slice(edges[number], edges[number + 1])
            digits[rows] = _ring(steps[rows], bits, state_bits)

    each_piece(work, batches, _WORTH_A_THREAD)
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


def _period(bits: int, state_bits: int) -> int:
    """Steps between two times that the digits are put in order: a power of two."""
    most = min((state_bits - 2 * bits - _MIN_INNER) // bits + 1, _HISTORY // bits)
    return 1 << (max(1, most).bit_length() - 1)


@cache
def _schedule(bits: int, state_bits: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """The constant and the slope of each state's distance, for each phase of a period; int32.

    A state's distance is value² - 2·x·value, which is affine in x. In a trellis each step drops the oldest digit and
    appends a new one. Instead of moving everything up by a digit at every step, the new digit takes the place next to
    the ones already appended, and only after a whole period of phases are the digits put in order. In phase f, states
    are laid out as [digits of this period before: f] [new digit] [oldest digit] [the others, oldest first].

    The minimum over the oldest digit must also say which digit it was. So all distances are multiples of
    2**(bits·phases), and the digit is part of the constant: it ends up in the low bits of the minimum.
    """
    values, phases, digit = state_values(bits, state_bits), _period(bits, state_bits), 1 << bits
    found = []
    for phase in range(phases):
        others = 1 << (state_bits - (phase + 2) * bits)
        # Chronologically: oldest, others, this period's, new.
        laid = values.reshape(digit, others, 1 << (phase * bits), digit).permute(2, 3, 0, 1)
        oldest = torch.arange(digit, dtype=torch.int32)[:, None] << ((phases - 1 - phase) * bits)
        constant = (laid.square() << (bits * phases)) + oldest
        found.append((constant.reshape(-1).contiguous(), (laid * -2 << (bits * phases)).reshape(-1).contiguous()))
    return tuple(found)


def shortest_path(
    x: Int[Tensor, "seqs length"], bits: int, state_bits: int, seam: Int[Tensor, " seqs"] | None
) -> UInt8[Tensor, "seqs length"]:
    """Viterbi's algorithm.

    Args:
        x: in steps of 1/64, at most 5 in size; at most 512 long, a multiple of 8.
        bits: of a digit.
        state_bits: of a state.
        seam: the digits before each sequence's start, as one number; they must also be those at its end. None: any.
    """
    (count, length), schedule = x.shape, _schedule(bits, state_bits)
    phases, digit, older = len(schedule), 1 << bits, 1 << (state_bits - bits)
    distance = torch.empty(count, older << bits, dtype=torch.int32)
    best = torch.zeros(count, older, dtype=torch.int32)
    if seam is not None:
        best.fill_(_UNREACHABLE).scatter_(1, seam[:, None], 0)
    history = torch.empty(length // phases, count, older, dtype=torch.uint8)
    # A torch call on a few thousand numbers is mostly overhead, so every view is made before the loop.
    laid = [distance.view(count, 1 << (f * bits), digit, digit, -1) for f in range(phases)]
    spare = [torch.empty_like(best) for _ in range(phases)]
    source = [b.view(count, 1 << (f * bits), 1, digit, -1) for f, b in enumerate([best, *spare[:-1]])]
    target = [b.view(laid[f][:, :, :, 0].shape) for f, b in enumerate(spare)]
    ordered = best.view(count, -1, 1 << (phases * bits)).transpose(1, 2)
    unordered, low_bits = spare[-1].view(ordered.shape), torch.tensor(-1 << (phases * bits), dtype=torch.int32)
    columns = iter(x.T.contiguous().unsqueeze(-1).unbind())
    for ended in history.unbind():
        for phase, (constant, slope) in enumerate(schedule):
            torch.addcmul(constant, slope, next(columns), out=distance)
            laid[phase].add_(source[phase])
            torch.amin(laid[phase], 3, out=target[phase])
        ended.copy_(spare[-1])
        torch.bitwise_and(unordered, low_bits, out=ordered)
    return _walk_back(history, best.argmin(1) if seam is None else seam, bits, state_bits)


def _walk_back(
    history: UInt8[Tensor, "periods seqs older"], ends: Int[Tensor, " seqs"], bits: int, state_bits: int
) -> UInt8[Tensor, "seqs length"]:
    """The digits of the paths that end with the digits `ends`; a few numbers a step, so plain Python is fastest.

    History has, for what each period ended with, laid out as [its digits] [older ones], the digits that the period
    dropped, in the low bits. They came before the older ones.
    """
    phases = _period(bits, state_bits)
    room = phases * bits
    low, inner = (1 << room) - 1, state_bits - bits - room
    rest = (1 << inner) - 1
    older = torch.arange(1 << (state_bits - bits))
    place: list[int] = (((older & low) << inner) | (older >> room)).tolist()  # of digits in order
    table = memoryview(history.numpy())  # type: ignore[arg-type]  # numpy's stubs do not say that arrays are buffers
    paths = []
    for number, end in enumerate(ends.tolist()):
        at, path = place[end], []
        for period in range(len(table) - 1, -1, -1):
            path.append(at)
            at = place[(table[period, number, at] & low) << inner | at & rest]
        paths.append(path[::-1])
    shifts = torch.arange(phases - 1, -1, -1) * bits + inner
    digits: Tensor = (torch.tensor(paths).unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return digits.flatten(1).to(torch.uint8)
