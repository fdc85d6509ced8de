r"""Select the negatives of a group that its positives are compared with.

In a group with a spread of rewards, positives are the candidates with the largest reward and
negatives all others, in the order of their log-probability: the most likely negative is the
hardest. Two estimators differ from `group` in which of them count.

`boundary` (ReCast, arXiv 2604.22169): the strongest positive against the hardest negative. The
strongest positive is the most likely one. Here the two are standardized as a group of two, and all
other candidates have neither an advantage nor a weight, so that they need no place in a batch. What
the paper calls repair, a positive for a group that has none, is `rollout.add_target`.

`window` (windowed partial AUC, arXiv 2604.22504): with 0/1 rewards the advantages of `group`
ascend the area under the ROC curve, the integral of the true positive rate over the false positive
rate from 0 to 1. Here the integral goes from `low` to `high`. The j-th hardest of n negatives is
the threshold for false positive rates from (j - 1) / n to j / n, so it counts with the share of
that interval that lies in the window,

    w_j = n |[(j - 1) / n, j / n] and [low, high]|,    w = 1 for a positive,
    A_i = w_i (R_i - mu) / (sigma + eps),    mu, sigma^2 the w-weighted mean and variance (- 1),

which is `group` for the window from 0 to 1. A window of the hardest negatives aims at the first
place of a list, one further down at a hit among as many places as it leaves negatives above. This
is the hard window alone, without a smooth reweighting of negatives around its thresholds.

Ties of log-probability follow the order of the candidates.

Shapes:  C candidates   G groups
"""

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from learner.advantage.groups import group_normalize


def boundary_pairs(
    reward: Float32[np.ndarray, " C"],
    score: Float32[np.ndarray, " C"],
    group: Int64[np.ndarray, " C"],
    num_groups: int,
    std_epsilon: float,
) -> tuple[Float64[np.ndarray, " C"], Bool[np.ndarray, " C"]]:
    """Return the advantages of `boundary`, and a mask of the two candidates of each group.

    A group without a spread of rewards has none.
    """
    is_positive, has_spread = _positives(reward, group, num_groups)
    chosen = np.zeros(len(reward), bool)
    for of_kind in (is_positive, ~is_positive):
        candidate = np.flatnonzero(of_kind & has_spread[group])
        # The first of each group is the most likely one.
        order = candidate[np.lexsort((candidate, -score[candidate], group[candidate]))]
        _, first = np.unique(group[order], return_index=True)
        chosen[order[first]] = True
    advantage = np.zeros(len(reward))
    advantage[chosen] = group_normalize(reward[chosen], group[chosen], num_groups, std_epsilon)
    return advantage, chosen


def windowed_advantages(
    reward: Float32[np.ndarray, " C"],
    score: Float32[np.ndarray, " C"],
    group: Int64[np.ndarray, " C"],
    num_groups: int,
    std_epsilon: float,
    window: tuple[float, float],
) -> Float64[np.ndarray, " C"]:
    """Return the advantages of `window` for the shares `low` to `high` of the negatives."""
    is_positive, _ = _positives(reward, group, num_groups)
    weight = np.ones(len(reward))
    negative = np.flatnonzero(~is_positive)
    order = negative[np.lexsort((negative, -score[negative], group[negative]))]
    # [G] number of negatives, and [negatives] rank of each within its group, from 0
    count = np.bincount(group[order], minlength=num_groups)
    rank = np.arange(len(order)) - (np.cumsum(count) - count)[group[order]]
    first, last = window[0] * count[group[order]], window[1] * count[group[order]]
    weight[order] = (np.minimum(rank + 1, last) - np.maximum(rank, first)).clip(0, 1)
    total = np.bincount(group, weight, minlength=num_groups)
    value = reward.astype(np.float64)
    mean = np.bincount(group, weight * value, minlength=num_groups) / np.maximum(total, 1)
    centered = value - mean[group]
    variance = np.bincount(group, weight * centered**2, minlength=num_groups)
    std = np.sqrt(variance / np.maximum(total - 1, 1))
    # Where no negative counts, there is nothing to compare; the mean may differ by rounding.
    compares = np.bincount(group, weight * ~is_positive, minlength=num_groups) > 0
    return np.where(compares[group], weight * centered / (std[group] + std_epsilon), 0)


def _positives(
    reward: Float32[np.ndarray, " C"], group: Int64[np.ndarray, " C"], num_groups: int
) -> tuple[Bool[np.ndarray, " C"], Bool[np.ndarray, " G"]]:
    """Return the mask of candidates with the largest reward, and of groups with a spread."""
    highest = np.full(num_groups, -np.inf)
    np.maximum.at(highest, group, reward)
    is_positive = reward == highest[group]
    return is_positive, np.bincount(group, ~is_positive, minlength=num_groups) > 0
