"""Estimate means over rows with percentile bootstrap intervals.

Shapes:  B rows   M quantities   D distinct rows
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from orchard.errors import DataError

_CELLS = 1 << 22
"""Maximum number of resampled counts in memory at a time (32 MiB)."""


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
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def estimates(
    names: Sequence[str], values: Float64[np.ndarray, "B M"], *, resamples: int, seed: int
) -> dict[str, Estimate]:
    """Estimate the mean of each column, with all columns resampled on the same rows.

    Raises:
        DataError: there are no rows, or fewer than one resample.
    """
    num_rows = len(values)
    if num_rows < 1 or resamples < 1:
        raise DataError(
            f"{num_rows} rows and {resamples} resamples give no estimate; both must be at least 1"
        )
    # Rows with equal values are interchangeable, so drawing how often each distinct row occurs
    # (multinomial) is the exact bootstrap, and cheap, since rank metrics take few distinct values.
    distinct, count = np.unique(values, axis=0, return_counts=True)
    rng = np.random.default_rng(seed)
    chunk = max(1, _CELLS // len(distinct))
    sizes = [min(chunk, resamples - done) for done in range(0, resamples, chunk)]
    sums = [rng.multinomial(num_rows, count / num_rows, size) @ distinct for size in sizes]
    low, high = np.quantile(np.concatenate(sums) / num_rows, [0.025, 0.975], axis=0)
    bounds = zip(names, values.mean(axis=0), low, high, strict=True)
    return {
        name: Estimate(mean=float(mean), low=float(bottom), high=float(top), n=num_rows)
        for name, mean, bottom, top in bounds
    }
