"""Values within groups: centred, and in standard deviations.

Shapes:  C values
"""

import numpy as np
from jaxtyping import Float, Float64, Int64


def group_center(
    value: Float[np.ndarray, " C"], group: Int64[np.ndarray, " C"], num_groups: int
) -> Float64[np.ndarray, " C"]:
    """Minus the group's mean; exactly 0 where all values of a group are equal."""
    exact = value.astype(np.float64)
    size = np.bincount(group, minlength=num_groups)
    total = np.bincount(group, weights=exact, minlength=num_groups)
    return exact - (total / np.maximum(size, 1))[group]


def group_normalize(
    value: Float[np.ndarray, " C"],
    group: Int64[np.ndarray, " C"],
    num_groups: int,
    std_epsilon: float,
) -> Float64[np.ndarray, " C"]:
    """Centred, over the group's unbiased standard deviation plus epsilon."""
    apart = group_center(value, group, num_groups)
    size = np.bincount(group, minlength=num_groups)
    square = np.bincount(group, weights=apart**2, minlength=num_groups)
    std = np.sqrt(square / np.maximum(size - 1, 1))
    return apart / (std[group] + std_epsilon)
