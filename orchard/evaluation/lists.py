r"""Importance weights for the positions of lists that were drawn without replacement.

A list of k distinct items is drawn one after the other, each in proportion to its probability among
those that are left (Plackett, Luce), as a stochastic beam does (arXiv 1903.06059):

    P(y_1, .., y_k) = prod_j p(y_j) / (1 - p(y_1) - .. - p(y_{j-1}))

One weight for the whole list has a variance that grows with k. An assumption about users gives a
weight to each position, with which the sum over positions of weight times reward estimates the
reward of a list of the target policy, without bias where the assumption holds:

    cascade       the reward of position j depends on y_1, .., y_j, and lists are shown in the order
                  of their draws:  P_target(y_1..j) / P_behavior(y_1..j)
                  (RIPS, McInerney et al., KDD 2020)
    independent   the reward of an item depends on the item alone, not on its position:
                  P_target(y in list) / P_behavior(y in list)

The probability that y is in the list is not a product. Think of an exponential clock of rate p(z)
for every item z; the list is the first k to ring. y is among them if fewer than k others have rung
before it:

    P(y in list) = integral over t > 0 of  p(y) exp(-p(y) t) P(fewer than k others ring before t)

Items that are not listed are known by their total probability alone. They count as many small
ones, whose number by time t is then Poisson: an approximation that is exact where all are listed.

Shapes:  B lists   K places of the longest list; places past the end have log-probability -inf
"""

import numpy as np
from jaxtyping import Float64, Int64

from orchard.errors import DataError

_POINTS = 256
"""Number of times at which the integral is evaluated, in equal steps of log t."""
_FIRST, _LAST = -24.0, 14.0
"""Bounds of log t: nothing that matters rings before or after."""


def cascade_weights(
    target: Float64[np.ndarray, "B K"], behavior: Float64[np.ndarray, "B K"]
) -> Float64[np.ndarray, "B K"]:
    """Return the weights under the assumption `cascade`, 0 past the end of a list.

    Args:
        target: log-probability of a single draw of each item under the policy that is evaluated.
        behavior: that under the policy that drew the list.

    Raises:
        DataError: the probabilities of a list add up to more than 1.
    """
    is_item = np.isfinite(behavior)
    ratio = np.where(is_item, _draw_logprobs(target) - _draw_logprobs(behavior), 0.0)
    return np.where(is_item, np.exp(np.cumsum(ratio, axis=1)), 0.0)


def independent_weights(
    target: Float64[np.ndarray, "B K"], behavior: Float64[np.ndarray, "B K"]
) -> Float64[np.ndarray, "B K"]:
    """Return the weights under the assumption `independent`, 0 past the end of a list.

    Lists of both policies have the length of the logged list.

    Raises:
        DataError: the probabilities of a list add up to more than 1.
    """
    is_item = np.isfinite(behavior)
    draws = is_item.sum(1)
    ratio = inclusion(target, draws) / np.where(is_item, inclusion(behavior, draws), 1.0)
    return np.where(is_item, ratio, 0.0)


def inclusion(
    logprob: Float64[np.ndarray, "B K"], draws: Int64[np.ndarray, " B"]
) -> Float64[np.ndarray, "B K"]:
    """Return the probability of each item to be among the first `draws` of its list's policy.

    Args:
        logprob: log-probabilities of a single draw, of the items that are known.
        draws: number of items that are drawn.

    Raises:
        DataError: the probabilities of a list add up to more than 1.
    """
    probability = np.exp(logprob)
    rest = _rest(probability)
    log_time = np.linspace(_FIRST, _LAST, _POINTS)
    time = np.exp(log_time)
    most = int(draws.max(initial=1))
    found = np.zeros(probability.shape)
    rung = -np.expm1(-probability[:, :, None] * time)  # [B, K, T] each has rung by t
    few = _poisson(rest[:, None] * time, most)
    place = np.arange(most)
    # [B, T, most] counts below the number of draws
    counted = (place < draws[:, None])[:, None, :]
    for item in range(probability.shape[1]):
        number = few.copy()  # [B, T, most] probability that so many others have rung
        for other in range(probability.shape[1]):
            if other == item:
                continue
            chance = rung[:, other, :, None]
            shifted = np.concatenate([np.zeros_like(number[..., :1]), number[..., :-1]], axis=2)
            number = number * (1 - chance) + shifted * chance
        before = np.where(counted, number, 0.0).sum(2)
        density = probability[:, item, None] * time * np.exp(-probability[:, item, None] * time)
        found[:, item] = np.trapezoid(density * before, log_time, axis=1)
    return found


def _poisson(mean: Float64[np.ndarray, "B T"], most: int) -> Float64[np.ndarray, "B T M"]:
    """Return the probabilities of the counts 0 .. most - 1."""
    found = np.empty((*mean.shape, most))
    found[..., 0] = np.exp(-mean)
    for count in range(1, most):
        found[..., count] = found[..., count - 1] * mean / count
    return found


def _draw_logprobs(logprob: Float64[np.ndarray, "B K"]) -> Float64[np.ndarray, "B K"]:
    """Return the log-probability of each item among those that the items before it have left."""
    probability = np.exp(logprob)
    _rest(probability)
    before = np.cumsum(probability, axis=1) - probability
    with np.errstate(divide="ignore"):
        return logprob - np.log1p(-np.minimum(before, 1.0))


def _rest(probability: Float64[np.ndarray, "B K"]) -> Float64[np.ndarray, " B"]:
    """Return the probability of all items that are not listed."""
    total = probability.sum(1)
    if (total > 1 + 1e-4).any():
        raise DataError(
            f"the items of a list have probability {total.max():g} together; they must be distinct "
            "draws of one policy at temperature 1"
        )
    return np.maximum(0.0, 1.0 - total)
