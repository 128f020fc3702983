"""Prices from what was seen: a small least-squares problem whose unknowns are never negative. Pure."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def solve_prices(rows: Sequence[Sequence[float]], seen: Sequence[float]) -> list[float]:
    """
    Least squares with relative errors and without negative prices.

    A price that comes out negative is noise around nothing: it becomes 0 and the others are solved again.

    Args:
        rows: How much of everything was used, one row a reading.
        seen: What each reading cost, none of them 0.
    """
    matrix = np.array(rows, dtype=np.float64)
    values = np.array(seen, dtype=np.float64)
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
