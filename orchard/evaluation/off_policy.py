"""Off-policy evaluation: what a policy would have earned, from what another one showed.

A logged decision is a history, one drawn item (its codes a_1..a_D, with the log-probabilities of
the policy that drew them) and its reward. With rho_d the ratio of target to behaviour probability
of code d and w_d = rho_1 ... rho_d,

    IS     mean of w_D r
    SNIPS  sum of w_D r / sum of w_D                                  (Swaminathan, Joachims 2015)
    PDIS   mean of sum_d w_d r_d, r_d the reward of code d            (Precup et al. 2000)
    DR     mean of V_0 + sum_d w_d (r_d + V_d - Q_d)                  (Jiang, Li 2016)

where Q_d is what a model expects of the rewards from code d on, V_{d-1} its mean under the target
before the code is drawn, V_D = 0. IS, PDIS and DR have no bias where the behaviour policy could
draw all that the target may; SNIPS trades a vanishing bias for less variance. Intervals are 95 %
percentile bootstraps over decisions.

Shapes:  B decisions   D codes   A codes that an item may begin with
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float64, Int64

from orchard.errors import DataError
from orchard.evaluation.bootstrap import Estimate, estimates

_CELLS = 1 << 22


@dataclass(frozen=True, kw_only=True)
class LoggedDecisions:
    """Drawn items, under two policies. Codes past the end of an item have log-probability 0."""

    behaviour: Float64[np.ndarray, "B D"]
    """Log-probability of each code under the policy that drew it."""
    target: Float64[np.ndarray, "B D"]
    """Under the policy that is judged."""
    reward: Float64[np.ndarray, "B D"]
    """Of each code; a reward of the item as a whole is that of its last code."""
    q: Float64[np.ndarray, "B D"] | None = None
    """What a model expects of the rewards from each code on, that code chosen."""
    v: Float64[np.ndarray, "B D"] | None = None
    """The same before the code is chosen, under the target."""

    def __post_init__(self) -> None:
        """Raise DataError where log-probabilities are none, or there are no decisions."""
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
        """w_d of every code."""
        return np.exp(np.cumsum(self.target - self.behaviour, axis=1))


@dataclass(frozen=True, kw_only=True)
class OffPolicyEstimate:
    """What is known of the target policy."""

    value: dict[str, Estimate]
    """Reward per decision by estimator; `logged` is what the behaviour policy earned."""
    effective: float
    """Effective number of decisions, (sum w)^2 / sum w^2: how many the weights leave."""
    largest: float
    """The largest weight."""


def estimate(
    decisions: LoggedDecisions, *, resamples: int = 2000, seed: int = 0
) -> OffPolicyEstimate:
    """All estimators with their intervals; DR where a model is given."""
    whole, reward = decisions.weight[:, -1], decisions.reward.sum(1)
    columns = {
        "logged": reward,
        "is": whole * reward,
        "pdis": (decisions.weight * decisions.reward).sum(1),
    }
    if decisions.q is not None and decisions.v is not None:
        after = np.concatenate([decisions.v[:, 1:], np.zeros((len(whole), 1))], 1)
        correction = decisions.weight * (decisions.reward + after - decisions.q)
        columns["dr"] = decisions.v[:, 0] + correction.sum(1)
    table = np.stack(list(columns.values()), 1)
    value = estimates(list(columns), table, resamples=resamples, seed=seed)
    value["snips"] = _ratio(whole * reward, whole, resamples=resamples, seed=seed)
    squares = float((whole**2).sum())
    return OffPolicyEstimate(
        value=value,
        effective=float(whole.sum()) ** 2 / squares if squares else 0.0,
        largest=float(whole.max()),
    )


def first_code_model(
    first: Int64[np.ndarray, " B"],
    reward: Float64[np.ndarray, "B D"],
    fold: Int64[np.ndarray, " B"],
    root: Float64[np.ndarray, "B A"],
) -> tuple[Float64[np.ndarray, "B D"], Float64[np.ndarray, "B D"]]:
    """Q and V of DR, from the mean reward of the other folds' decisions with the same first code.

    The model knows the first code alone, so that V is its exact mean under the target, and it never
    sees a decision's own fold: DR keeps its freedom from bias, however poor the model. Few
    decisions with a code are drawn towards the mean of all.

    Args:
        first: place of the first code among those that an item may begin with.
        reward: of each code.
        fold: of each decision.
        root: the target's probability of every such code, for each decision's history.
    """
    total, codes = reward.sum(1), root.shape[1]
    q = np.zeros(len(first))
    before = np.zeros(len(first))
    for one in np.unique(fold):
        inside, outside = fold == one, fold != one
        mean = float(total[outside].mean()) if outside.any() else 0.0
        count = np.bincount(first[outside], minlength=codes)
        table = (np.bincount(first[outside], total[outside], codes) + mean) / (count + 1)
        q[inside], before[inside] = table[first[inside]], root[inside] @ table
    wide = np.repeat(q[:, None], reward.shape[1], axis=1)
    v = wide.copy()
    v[:, 0] = before
    return wide, v


def _ratio(
    top: Float64[np.ndarray, " B"],
    bottom: Float64[np.ndarray, " B"],
    *,
    resamples: int,
    seed: int,
) -> Estimate:
    """A ratio of sums with its bootstrap interval."""
    number, draw = len(top), np.random.default_rng(seed)
    found: list[Float64[np.ndarray, " _"]] = []
    chunk = max(1, _CELLS // number)
    for done in range(0, resamples, chunk):
        rows = draw.integers(number, size=(min(chunk, resamples - done), number))
        sums = bottom[rows].sum(1)
        found.append(top[rows].sum(1) / np.where(sums > 0, sums, 1.0))
    low, high = np.quantile(np.concatenate(found), [0.025, 0.975])
    total = float(bottom.sum())
    mean = float(top.sum()) / total if total else 0.0
    return Estimate(mean=mean, low=float(low), high=float(high), n=number)
