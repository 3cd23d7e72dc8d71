"""A bit stream, written and read bit by bit: code 0 first, each code's least significant bit first."""


def pack(codes: list[int], bits: int) -> list[int]:
    """Bytes of the stream; the last one is padded with zero bits."""
    stream = [(code >> k) & 1 for code in codes for k in range(bits)]
    stream += [0] * (-len(stream) % 8)
    return [sum(stream[i + k] << k for k in range(8)) for i in range(0, len(stream), 8)]


def unpack(packed: list[int], bits: int, count: int) -> list[int]:
    """The first `count` codes of the stream."""
    stream = [(byte >> k) & 1 for byte in packed for k in range(8)]
    return [sum(stream[i * bits + k] << k for k in range(bits)) for i in range(count)]
