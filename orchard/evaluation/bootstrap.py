"""Estimate means over rows, and over seeds and rows, with percentile bootstrap intervals.

Shapes:  B rows   M quantities   D distinct rows   S, T seeds
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
    rng = np.random.default_rng(seed)
    means = _resampled_means(values, resamples, rng)
    return _intervals(names, values.mean(axis=0), means, len(values))


def estimates_over_seeds(
    names: Sequence[str],
    a: Float64[np.ndarray, "S B M"],
    b: Float64[np.ndarray, "T B M"],
    *,
    resamples: int,
    seed: int,
) -> dict[str, Estimate]:
    """Estimate the mean of `a` minus that of `b`, measured with several seeds on the same rows.

    Every resample draws rows and, independently of them, seeds, both with replacement: the interval
    covers the choice of both. Sides with equally many seeds are paired by seed, others are drawn
    independently. With one seed on each side, the interval is that over rows. Few seeds show less
    than their spread: with S of them the variance between seeds appears (S - 1) / S times as large.

    Raises:
        DataError: there are no seeds or rows, row counts differ, or fewer than one resample.
    """
    if not len(a) or not len(b) or a.shape[1:] != b.shape[1:]:
        raise DataError(
            f"cannot pair {len(a)} with {len(b)} seeds of {a.shape[1]} and {b.shape[1]} rows; "
            "evaluate every seed of both sides on the same rows"
        )
    rng = np.random.default_rng(seed)
    num_rows = a.shape[1]
    # [B, (S + T) M] all quantities of a row; resampled together, seed by seed
    both = np.concatenate([a, b]).transpose(1, 0, 2)
    means = _resampled_means(both.reshape(num_rows, -1), resamples, rng)
    means = means.reshape(resamples, len(a) + len(b), -1)
    share_a = _seed_shares(len(a), resamples, rng)
    share_b = share_a if len(a) == len(b) else _seed_shares(len(b), resamples, rng)
    weight = np.concatenate([share_a, -share_b], axis=1)
    # [resamples, M]
    difference = np.einsum("rs,rsm->rm", weight, means)
    return _intervals(names, a.mean(axis=(0, 1)) - b.mean(axis=(0, 1)), difference, num_rows)


def _seed_shares(
    num_seeds: int, resamples: int, rng: np.random.Generator
) -> Float64[np.ndarray, "resamples S"]:
    """Draw each seed's share of every resample; a single seed draws nothing."""
    if num_seeds == 1:
        return np.ones((resamples, 1))
    return rng.multinomial(num_seeds, [1 / num_seeds] * num_seeds, resamples) / num_seeds


def _resampled_means(
    values: Float64[np.ndarray, "B M"], resamples: int, rng: np.random.Generator
) -> Float64[np.ndarray, "resamples M"]:
    """Return the means of all columns on resampled rows.

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
    chunk = max(1, _CELLS // len(distinct))
    sizes = [min(chunk, resamples - done) for done in range(0, resamples, chunk)]
    sums = [rng.multinomial(num_rows, count / num_rows, size) @ distinct for size in sizes]
    return np.concatenate(sums) / num_rows


def _intervals(
    names: Sequence[str],
    mean: Float64[np.ndarray, " M"],
    resampled: Float64[np.ndarray, "resamples M"],
    num_rows: int,
) -> dict[str, Estimate]:
    """Return the estimates whose intervals are quantiles of resampled means."""
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    bounds = zip(names, mean, low, high, strict=True)
    return {
        name: Estimate(mean=float(value), low=float(bottom), high=float(top), n=num_rows)
        for name, value, bottom, top in bounds
    }
