"""EvoPress's selection (arXiv 2410.14649): many offspring are judged on little text, the better ones on more."""

_SURVIVORS = 4  # an elimination round keeps one in so many


def elimination_rounds(offspring: int, num_sequences: int) -> list[tuple[int, int]]:
    """How many survive each round, and on how many sequences it judges: fewer and fewer, on more and more.

    The last round judges on all sequences, and one survives it.
    """
    counts = []
    count = offspring
    while count > 1:
        count = max(1, count // _SURVIVORS)
        counts.append(count)
    found, sequences = [], num_sequences
    for count in reversed(counts):
        found.append((count, sequences))
        sequences = max(1, sequences // _SURVIVORS)
    return found[::-1] or [(1, num_sequences)]
