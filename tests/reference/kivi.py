"""KIVI's cache, one number at a time in plain float64: what attention finds after so many tokens."""

from tests.reference.min_max import back

Matrix = list[list[float]]  # [tokens][channels]


def held_keys(keys: Matrix, bits: int, group: int, window: int) -> Matrix:
    """Each channel of each `group` tokens that have left the window has its own levels."""
    found = [list(token) for token in keys]
    for first in range(0, max(0, len(keys) - window) // group * group, group):
        for channel in range(len(keys[0])):
            column = back([keys[first + i][channel] for i in range(group)], bits)
            for i, value in enumerate(column):
                found[first + i][channel] = value
    return found


def held_values(values: Matrix, bits: int, group: int, window: int) -> Matrix:
    """Each `group` channels of a token that has left the window has its own levels."""
    found = [list(token) for token in values]
    for token in range(max(0, len(values) - window) // group * group):
        for first in range(0, len(values[0]), group):
            found[token][first : first + group] = back(values[token][first : first + group], bits)
    return found
