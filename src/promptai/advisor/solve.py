"""Solve for unit prices: a small least-squares problem with non-negative unknowns. Pure."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def solve_prices(quantities: Sequence[Sequence[float]], costs: Sequence[float]) -> list[float]:
    """
    Return the non-negative unit prices with the least squared relative error.

    A negative price is noise around zero: it becomes 0 and the others are solved again.

    Args:
        quantities: One row per reading, one column per unknown price.
        costs: Measured cost of each reading; never 0.
    """
    matrix = np.array(quantities, dtype=np.float64)
    values = np.array(costs, dtype=np.float64)
    scale = np.abs(matrix).max(axis=0)
    scale[scale == 0] = 1.0
    weighted = matrix / scale / np.abs(values)[:, None]
    signs: NDArray[np.float64] = np.sign(values)
    active = list(range(matrix.shape[1]))
    found = np.zeros(matrix.shape[1])
    while active:
        solution = np.linalg.lstsq(weighted[:, active], signs, rcond=None)[0]
        if (solution >= 0).all():
            found[active] = solution
            break
        active.pop(int(solution.argmin()))
    return [float(value) for value in found / scale]
