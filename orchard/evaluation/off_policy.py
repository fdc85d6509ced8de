"""Estimate the reward of a target policy from the logged decisions of a behavior policy.

A logged decision is a history, one sampled item (its codes a_1..a_D, with their log-probabilities
under the behavior policy) and its reward. An item that the target policy cannot draw has target
log-probability -inf: its weight is 0, and it counts among the decisions. With rho_d the ratio of
target to behavior probability of code d and w_d = rho_1 ... rho_d,

    IS     mean of w_D r
    SNIPS  sum of w_D r / sum of w_D                                  (Swaminathan, Joachims 2015)
    PDIS   mean of sum_d w_d r_d, r_d the reward of code d            (Precup et al. 2000)
    DR     mean of V_0 + sum_d w_d (r_d + V_d - Q_d)                  (Jiang, Li 2016)

where Q_d is a model's expected sum of rewards from code d on, V_{d-1} its mean under the target
policy before the code is drawn, and V_D = 0. IS, PDIS and DR are unbiased if the behavior policy
covers the support of the target; SNIPS trades a vanishing bias for less variance. Intervals are
95 % percentile bootstraps over decisions.

Shapes:  B decisions   D codes   A codes that an item may begin with
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float64, Int64

from orchard.errors import DataError
from orchard.evaluation.bootstrap import Estimate, estimates

UNKNOWN = -1
"""Index of a first code that the target policy does not have."""
_CELLS = 1 << 22
"""Maximum number of resampled row indices in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class LoggedDecisions:
    """Logged items under two policies; codes past the end of an item have log-probability 0."""

    behaviour: Float64[np.ndarray, "B D"]
    """Log-probability of each code under the policy that sampled it."""
    target: Float64[np.ndarray, "B D"]
    """Log-probability of each code under the policy that is evaluated."""
    reward: Float64[np.ndarray, "B D"]
    """Reward of each code; a reward of the whole item belongs to its last code."""
    q: Float64[np.ndarray, "B D"] | None = None
    """Q_d of a model: expected sum of rewards from each code on, given that code."""
    v: Float64[np.ndarray, "B D"] | None = None
    """V_{d-1} of the model: the mean of Q_d under the target policy."""

    def __post_init__(self) -> None:
        """Raise DataError if there are no decisions, or a log-probability or reward is invalid."""
        if len(self.reward) == 0:
            raise DataError("there are no logged decisions; at least one is needed")
        for name, values in (("behaviour", self.behaviour), ("target", self.target)):
            if not (values <= 1e-6).all():
                raise DataError(
                    f"{name} has log-probabilities up to {np.nanmax(values):g} or NaN; they must "
                    "not exceed 0"
                )
        if not np.isfinite(self.behaviour).all():
            raise DataError("a logged item has behaviour probability 0; it cannot have been drawn")
        if not np.isfinite(self.reward).all():
            raise DataError("a reward is not a finite number; drop such rows")

    @cached_property
    def weight(self) -> Float64[np.ndarray, "B D"]:
        """Cumulative importance weight w_d of every code."""
        return np.exp(np.cumsum(self.target - self.behaviour, axis=1))


@dataclass(frozen=True, kw_only=True)
class OffPolicyEstimate:
    """Estimates of a target policy's reward, with diagnostics of the weights."""

    value: dict[str, Estimate]
    """Reward per decision by estimator; `logged` is that of the behavior policy."""
    effective: float
    """Effective sample size, (sum w)^2 / sum w^2."""
    largest: float
    """Largest item weight w_D."""


def estimate(
    decisions: LoggedDecisions, *, resamples: int = 2000, seed: int = 0
) -> OffPolicyEstimate:
    """Compute all estimators with their intervals; DR only if the decisions have q and v."""
    item_weight, reward = decisions.weight[:, -1], decisions.reward.sum(1)
    columns = {
        "logged": reward,
        "is": item_weight * reward,
        "pdis": (decisions.weight * decisions.reward).sum(1),
    }
    if decisions.q is not None and decisions.v is not None:
        next_v = np.concatenate([decisions.v[:, 1:], np.zeros((len(item_weight), 1))], 1)
        correction = decisions.weight * (decisions.reward + next_v - decisions.q)
        columns["dr"] = decisions.v[:, 0] + correction.sum(1)
    table = np.stack(list(columns.values()), 1)
    value = estimates(list(columns), table, resamples=resamples, seed=seed)
    value["snips"] = _ratio(item_weight * reward, item_weight, resamples=resamples, seed=seed)
    squares = float((item_weight**2).sum())
    return OffPolicyEstimate(
        value=value,
        effective=float(item_weight.sum()) ** 2 / squares if squares else 0.0,
        largest=float(item_weight.max()),
    )


def first_code_model(
    first: Int64[np.ndarray, " B"],
    reward: Float64[np.ndarray, "B D"],
    fold: Int64[np.ndarray, " B"],
    root: Float64[np.ndarray, "B A"],
) -> tuple[Float64[np.ndarray, "B D"], Float64[np.ndarray, "B D"]]:
    """Fit Q and V of DR by cross-fitting: the mean reward of other folds' items by first code.

    The model depends only on the first code, so V is its exact mean under the target policy, and it
    is never fitted on a decision's own fold: DR stays unbiased however poor the model is. Means of
    codes with few decisions are shrunk towards the overall mean.

    Args:
        first: index of the first code among those that an item may begin with, `UNKNOWN` for an
            item that the target policy cannot draw; no mean is fitted on such a decision.
        reward: reward of each code.
        fold: fold of each decision.
        root: target probability of every first code, for each decision's history.
    """
    total, num_codes, known = reward.sum(1), root.shape[1], first != UNKNOWN
    first_q = np.zeros(len(first))
    root_value = np.zeros(len(first))
    for held_out in np.unique(fold):
        in_fold, out_of_fold = fold == held_out, (fold != held_out) & known
        mean = float(total[out_of_fold].mean()) if out_of_fold.any() else 0.0
        # [A] mean reward of each first code outside the fold, with one pseudo-decision at the mean
        count = np.bincount(first[out_of_fold], minlength=num_codes)
        mean_reward = (np.bincount(first[out_of_fold], total[out_of_fold], num_codes) + mean) / (
            count + 1
        )
        first_q[in_fold] = np.where(known[in_fold], mean_reward[first[in_fold]], 0.0)
        root_value[in_fold] = root[in_fold] @ mean_reward
    q_of_code = np.repeat(first_q[:, None], reward.shape[1], axis=1)
    v = q_of_code.copy()
    v[:, 0] = root_value
    return q_of_code, v


def _ratio(
    numerator: Float64[np.ndarray, " B"],
    denominator: Float64[np.ndarray, " B"],
    *,
    resamples: int,
    seed: int,
) -> Estimate:
    """Estimate a ratio of sums with its bootstrap interval."""
    num_rows, rng = len(numerator), np.random.default_rng(seed)
    ratios: list[Float64[np.ndarray, " _"]] = []
    chunk = max(1, _CELLS // num_rows)
    for done in range(0, resamples, chunk):
        rows = rng.integers(num_rows, size=(min(chunk, resamples - done), num_rows))
        sums = denominator[rows].sum(1)
        ratios.append(numerator[rows].sum(1) / np.where(sums > 0, sums, 1.0))
    low, high = np.quantile(np.concatenate(ratios), [0.025, 0.975])
    total = float(denominator.sum())
    mean = float(numerator.sum()) / total if total else 0.0
    return Estimate(mean=mean, low=float(low), high=float(high), n=num_rows)
