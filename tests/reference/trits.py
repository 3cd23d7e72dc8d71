"""Five trits in a byte, and runs between positions, one at a time."""


def pack(trits: list[int]) -> list[int]:
    """Bytes: the first trit of five in the lowest place of base 3, each trit shifted to 0..2."""
    padded = trits + [0] * (-len(trits) % 5)
    return [sum((padded[i + k] + 1) * 3**k for k in range(5)) for i in range(0, len(padded), 5)]


def gaps(positions: list[int], bits: int) -> list[int]:
    """Codes of the runs before each position; the largest code stands for that many empty places and no entry."""
    longest = 2**bits - 1
    codes, place = [], 0
    for position in positions:
        while position - place >= longest:
            codes.append(longest)
            place += longest
        codes.append(position - place)
        place = position + 1
    return codes
