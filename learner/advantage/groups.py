"""Center and standardize values within groups.

Shapes:  C values
"""

import numpy as np
from jaxtyping import Float, Float64, Int64


def group_center(
    value: Float[np.ndarray, " C"], group: Int64[np.ndarray, " C"], num_groups: int
) -> Float64[np.ndarray, " C"]:
    """Subtract the group's mean; exactly 0 where all values of a group are equal."""
    value64 = value.astype(np.float64)
    # [num_groups] size and sum of each group
    size = np.bincount(group, minlength=num_groups)
    total = np.bincount(group, weights=value64, minlength=num_groups)
    return value64 - (total / np.maximum(size, 1))[group]


def group_normalize(
    value: Float[np.ndarray, " C"],
    group: Int64[np.ndarray, " C"],
    num_groups: int,
    std_epsilon: float,
) -> Float64[np.ndarray, " C"]:
    """Center and divide by the group's unbiased standard deviation plus epsilon."""
    centered = group_center(value, group, num_groups)
    size = np.bincount(group, minlength=num_groups)
    # [num_groups] sum of squares and standard deviation of each group
    square_sum = np.bincount(group, weights=centered**2, minlength=num_groups)
    std = np.sqrt(square_sum / np.maximum(size - 1, 1))
    return centered / (std[group] + std_epsilon)
