"""One choice for each group at the least total cost within a number of bytes: an integer programme, solved exactly."""

from collections.abc import Sequence
from importlib.util import find_spec
from math import gcd

_MISSING = "choosing bits needs scipy: pip install 'decoct[search]'"
_SCALE = 1e6  # the largest cost handed to the solver, whose absolute tolerances are then far below what matters


def check_solver() -> None:
    """Refuse to begin a search whose last step could not run.

    Raises:
        ValueError: scipy is not installed.
    """
    if find_spec("scipy") is None:
        raise ValueError(_MISSING)


def solve(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """Which option each group takes.

    Minimises Σ costs[g][x_g] over x with Σ sizes[g][x_g] <= budget: a multiple-choice knapsack, solved by HiGHS to a
    gap of zero. Groups may have different numbers of options.

    Args:
        costs: of each group's options; any unit, any sign.
        sizes: bytes of each group's options.
        budget: bytes for all groups together.

    Raises:
        ValueError: even the smallest options do not fit, a cost is not finite, or scipy is not installed.
    """
    least = sum(min(each) for each in sizes)
    if least > budget:
        raise ValueError(f"the smallest choice takes {least} bytes, the budget is {budget}; raise the target")
    check_solver()
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    cost = np.array([value for each in costs for value in each], dtype=np.float64)
    if not np.isfinite(cost).all():
        raise ValueError("a matrix's cost is not finite; the checkpoint or the text is damaged")
    owner = np.array([group for group, each in enumerate(costs) for _ in each])
    unit = gcd(budget, *(size for each in sizes for size in each)) or 1
    size = np.array([value // unit for each in sizes for value in each], dtype=np.float64)
    # Within a group only differences matter; without what all options share the tolerances meet what is left.
    cost -= np.array([min(each) for each in costs], dtype=np.float64)[owner]
    largest = float(cost.max(initial=0.0))
    once = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    found = milp(
        cost * (_SCALE / largest) if largest > 0 else cost,
        integrality=np.ones(len(owner)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(once, 1, 1), LinearConstraint(size[np.newaxis], -np.inf, budget // unit)],
        options={"mip_rel_gap": 0.0},
    )
    assert found.success, found.message
    chosen, position = [], 0
    for each in costs:
        chosen.append(int(np.argmax(found.x[position : position + len(each)])))
        position += len(each)
    assert sum(each[option] for each, option in zip(sizes, chosen, strict=True)) <= budget
    return chosen
