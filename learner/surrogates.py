r"""Surrogates that `learner.loss` names: the policy's part of the loss, from ratios and advantages.

Let r be the ratio pi / pi_behavior of a choice, or of a candidate (`learner.ratio`), low and high
the clips, c the dual clip, and A+ and A- the sums of the positive and of the negative weighted
advantages that share r. sg stops the gradient. To maximize:

    clip    A+ min(r, 1 + high) + A- min(max(r, 1 - low), c)           PPO, arXiv 1707.06347, eq. 7;
                                                                       c: arXiv 1912.09729, eq. 5
    cispo   (A+ + A-) sg(min(max(r, 1 - low), 1 + high)) log r         arXiv 2506.13585, eq. 4 and 5
    ecpo    A+ min(r, 1 + high) + A- max(r', 1 - low)                  OneRec, arXiv 2506.13695
            with r' = pi / max(pi_behavior, sg(pi) / (1 + high + delta))

`cispo` clips the weight of a choice and drops none: every choice keeps a gradient. The paper has
log pi in the place of log r, which differs by a constant; it has no lower clip, which is
`learner.clip_low` = 1.

`ecpo` bounds the gradient of choices with a negative advantage whose probability has grown since
the search: r' is r up to 1 + high + delta, and above it has that value with the gradient of
(1 + high + delta) log pi. For a positive advantage the substitution changes nothing, because
min(r, 1 + high) is then constant. The dual clip has the same purpose and drops such choices.

Neither of the last two has a ratio above 1 + high, or 1 + high + delta, so a dual clip above it
cannot bind and a lower one is refused.

To add a loss, write a function of the type `Surrogate` in a module of its own and register it in
`LOSSES`; a worker of the learner imports `plugins` like every other.

Shapes:  R ratios, of choices or of candidates
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from orchard.errors import ConfigError
from orchard.registry import Facts, Registry
from orchard.settings import Config, LearnerConfig


class RatioTerms(NamedTuple):
    """Log-ratios with the sums of their positive (A+) and of their negative (A-) advantages."""

    log_ratio: Float32[Tensor, " R"]
    advantage_pos: Float32[Tensor, " R"]
    advantage_neg: Float32[Tensor, " R"]


class SurrogateTerms(NamedTuple):
    """Terms of the surrogate, whose sum is maximized, and the ratios that a clip changed."""

    term: Float32[Tensor, " R"]
    clipped: Bool[Tensor, " R"]
    """Mask of the ratios for which the clip of an advantage's sign is active."""


Surrogate = Callable[[RatioTerms, LearnerConfig], SurrogateTerms]
"""Surrogate of a loss: from ratios and advantages under the settings of the learner to its terms.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossFacts(Facts):
    """Properties of a loss that a run looks up."""

    largest_ratio: Callable[[LearnerConfig], float] | None = None
    """Bound that the loss itself puts on a ratio with a negative advantage; None if the dual clip
    is that bound."""


def _dual_clip_above_bound(config: Config) -> None:
    """Refuse a dual clip that would bind below the bound that the loss itself has."""
    learner = config.learner
    bound = LOSSES.facts(learner.loss).largest_ratio
    if bound is not None and 0 < learner.dual_clip < bound(learner):
        raise ConfigError(
            f"learner.loss = {learner.loss} bounds the ratio at {bound(learner):g} and keeps its "
            f"gradient there, which learner.dual_clip = {learner.dual_clip:g} would drop; set "
            "learner.dual_clip = 0",
            code="config.dual_clip_of_other_loss",
        )


LOSSES: Registry[Surrogate, LossFacts] = Registry(
    "loss", ("learner.loss",), LossFacts(), rules=(_dual_clip_above_bound,)
)
"""Losses by their name in `learner.loss`."""


@LOSSES.register("clip")
def clip(ratios: RatioTerms, config: LearnerConfig) -> SurrogateTerms:
    """Clip the ratio where it has moved far enough in the direction of the advantage (PPO)."""
    log_ratio, advantage_pos, advantage_neg = ratios
    low, high, ratio = 1 - config.clip_low, 1 + config.clip_high, log_ratio.exp()
    ceiling = config.dual_clip if config.dual_clip > 0 else float("inf")
    # [R] terms of the positive and of the negative advantages
    positive = advantage_pos * ratio.clamp(max=high)
    negative = advantage_neg * ratio.clamp(min=low, max=ceiling)
    clipped = (advantage_pos > 0) & (ratio > high)
    clipped |= (advantage_neg < 0) & ((ratio < low) | (ratio > ceiling))
    return SurrogateTerms(positive + negative, clipped)


@LOSSES.register("cispo", LossFacts(largest_ratio=lambda config: 1 + config.clip_high))
def cispo(ratios: RatioTerms, config: LearnerConfig) -> SurrogateTerms:
    """Weigh the log-probability by the clipped ratio, without its gradient (CISPO)."""
    log_ratio, advantage_pos, advantage_neg = ratios
    ratio = log_ratio.detach().exp()
    weight = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    advantage = advantage_pos + advantage_neg
    has_advantage = (advantage_pos > 0) | (advantage_neg < 0)
    return SurrogateTerms(advantage * weight * log_ratio, has_advantage & (weight != ratio))


@LOSSES.register(
    "ecpo", LossFacts(largest_ratio=lambda config: 1 + config.clip_high + config.ecpo_delta)
)
def ecpo(ratios: RatioTerms, config: LearnerConfig) -> SurrogateTerms:
    """Bound the gradient of negative advantages whose probability has grown (ECPO)."""
    log_ratio, advantage_pos, advantage_neg = ratios
    low, high, ratio = 1 - config.clip_low, 1 + config.clip_high, log_ratio.exp()
    ceiling = high + config.ecpo_delta
    is_early = ratio > ceiling
    # [R] r' of the docstring: above the ceiling its value is the ceiling, with a gradient
    bounded = torch.where(is_early, ceiling * (log_ratio - log_ratio.detach()).exp(), ratio)
    positive = advantage_pos * ratio.clamp(max=high)
    negative = advantage_neg * bounded.clamp(min=low)
    clipped = (advantage_pos > 0) & (ratio > high)
    clipped |= (advantage_neg < 0) & ((ratio < low) | is_early)
    return SurrogateTerms(positive + negative, clipped)
