"""Means over rows, and how far other rows would have moved them.

Shapes:  B rows   M quantities   D distinct rows
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from orchard.errors import DataError

_CELLS = 1 << 22
"""Counts that the bootstrap holds at once (32 MiB)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over rows with its 95 % percentile bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int
    """Number of rows."""

    @property
    def significant(self) -> bool:
        """The interval leaves zero outside."""
        return self.low > 0 or self.high < 0


def estimates(
    names: Sequence[str], values: Float64[np.ndarray, "B M"], *, resamples: int, seed: int
) -> dict[str, Estimate]:
    """The mean of each column with its interval, all columns on the same resampled rows.

    Raises:
        DataError: there are no rows, or fewer than one resample.
    """
    num_rows = len(values)
    if num_rows < 1 or resamples < 1:
        raise DataError(
            f"{num_rows} rows and {resamples} resamples give no estimate; both must be at least 1"
        )
    # Rows with equal values are interchangeable: drawing how often each distinct row occurs is the
    # bootstrap itself, at the price of the few values that ranks can take.
    distinct, count = np.unique(values, axis=0, return_counts=True)
    draw = np.random.default_rng(seed)
    chunk = max(1, _CELLS // len(distinct))
    sizes = [min(chunk, resamples - done) for done in range(0, resamples, chunk)]
    sums = [draw.multinomial(num_rows, count / num_rows, size) @ distinct for size in sizes]
    low, high = np.quantile(np.concatenate(sums) / num_rows, [0.025, 0.975], axis=0)
    bounds = zip(names, values.mean(axis=0), low, high, strict=True)
    return {
        name: Estimate(mean=float(mean), low=float(bottom), high=float(top), n=num_rows)
        for name, mean, bottom, top in bounds
    }
