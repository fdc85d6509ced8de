"""Estimate the advantage of each candidate over the rest of its group.

A group is the candidates of one prompt, of any number. These estimators compare rewards within the
group; they differ in whether they divide by the spread and in how they weight tokens. With N
candidates in the batch, |y| tokens in a candidate and the mean mu and standard deviation sigma of
its group:

    group           (R - mu) / (sigma + eps)     1 / (N |y|)         GRPO, arXiv 2402.03300
    dapo            (R - mu) / (sigma + eps)     1 / sum of |y|      DAPO, arXiv 2503.14476
    drgrpo          R - mu                       1 / (N max |y|)     Dr. GRPO, arXiv 2503.20783
    leave_one_out   R - mean of the others       1 / (N |y|)         RLOO, arXiv 2402.14740

    boundary        of two candidates            1 / (2 P |y|)       ReCast, arXiv 2604.22169
    window          of a window of negatives     1 / (N |y|)         WPAUC, arXiv 2604.22504

The last two (`learner.advantage.negatives`) leave out some or most negatives; P counts prompts.

|y| counts forced codes: their log-probability is 0 and they carry no gradient, but a candidate's
length must not depend on how many siblings its codes have in the catalog. N counts the whole
batch, before it is split for workers or micro-batches, so the losses of the parts add up.

To add an estimator, write a function of the type `Estimator` in a module of its own and register it
in `ESTIMATORS`; `docs/extending.md` has an example.

`sibling` compares node by node within a group (`learner.advantage.sibling`), and two estimators
combine it with `group`: `group_sibling` adds the two losses, `blend` averages the two advantages.
`sapo` compares step by step, and `credit_to_go` what is still to come at each step
(`learner.advantage.sapo`). `snips` learns from logged draws (`learner.advantage.logged`).

Shapes:  B prompts   N nodes   C candidates   K steps of the longest candidate
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from learner.advantage.groups import group_center, group_normalize
from learner.advantage.logged import snips_advantages
from learner.advantage.negatives import boundary_pairs, windowed_advantages
from learner.advantage.sapo import apply_code_switches, credit_to_go, sapo
from learner.advantage.sibling import sibling
from orchard.errors import ConfigError
from orchard.registry import Facts, Registry
from orchard.settings import Config, LearnerConfig
from orchard.types import Advantages, ScoredTrees, SearchTrees

Estimator = Callable[[ScoredTrees, float], Advantages]
"""Function from scored trees and the epsilon added to a standard deviation to advantages."""


def _one_advantage_per_candidate(config: Config) -> None:
    """Refuse a ratio of whole candidates for advantages that differ between their steps."""
    name = config.learner.estimator
    if config.learner.ratio == "sequence" and not ESTIMATORS.facts(name).per_candidate:
        known = [other for other in ESTIMATORS if ESTIMATORS.facts(other).per_candidate]
        raise ConfigError(
            'learner.ratio = "sequence" needs one advantage per candidate, and learner.estimator = '
            f"{name} gives one per step; choose from {', '.join(known)}",
            code="config.ratio_of_steps",
        )


def _two_candidates(config: Config) -> None:
    """Refuse groups of one, whose advantage is always 0, for estimators that compare."""
    estimator, size = config.learner.estimator, config.rollout.group_size
    if size < 2 and ESTIMATORS.facts(estimator).compares:
        raise ConfigError(
            f"learner.estimator = {estimator} needs rollout.group_size >= 2, not {size}: a single "
            "candidate has nothing to be compared with, and nothing would be learned",
            code="config.group_of_one",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimatorFacts(Facts):
    """Properties of an advantage estimator that a run looks up."""

    per_candidate: bool = True
    """Whether all steps of a candidate have one advantage, as `learner.ratio` "sequence" needs."""
    compares: bool = True
    """Whether candidates of one prompt are compared with one another, which a single one cannot
    be."""
    logged: bool = False
    """Whether it learns from logged draws instead of a group of candidates."""
    by_group: bool = False
    """Whether a group teaches only where the rewards of its candidates differ."""
    losses: Callable[[ScoredTrees, LearnerConfig], list[Advantages]] | None = None
    """Advantages of several losses that add up; None if those of the estimator are the only ones.
    The weights of the first also weight the divergence from the reference."""


ESTIMATORS: Registry[Estimator, EstimatorFacts] = Registry(
    "estimator",
    ("learner.estimator",),
    EstimatorFacts(),
    rules=(_one_advantage_per_candidate, _two_candidates),
)
"""Estimators by their name in `learner.estimator`."""


def candidate_lengths(trees: SearchTrees) -> Int64[np.ndarray, " C"]:
    """Count the tokens of each candidate, forced ones included."""
    path = trees.paths()
    return np.where(path >= 0, np.diff(trees.token_start)[path], 0).sum(1)


@ESTIMATORS.register("group", EstimatorFacts(by_group=True))
def group(scored: ScoredTrees, std_epsilon: float) -> Advantages:
    """Standardize rewards within the group; every candidate weighs the same."""
    return broadcast_to_steps(
        scored, group_normalize(*_by_group(scored), std_epsilon), mean_weight(scored)
    )


@ESTIMATORS.register("dapo", EstimatorFacts(by_group=True))
def dapo(scored: ScoredTrees, std_epsilon: float) -> Advantages:
    """Standardize rewards within the group; every token of the batch weighs the same."""
    length = candidate_lengths(scored.trees)
    weight = np.full(len(length), 1 / max(1, length.sum()))
    return broadcast_to_steps(scored, group_normalize(*_by_group(scored), std_epsilon), weight)


@ESTIMATORS.register("drgrpo", EstimatorFacts(by_group=True))
def drgrpo(scored: ScoredTrees, std_epsilon: float) -> Advantages:
    """Center rewards within the group without dividing by the spread; ignores `std_epsilon`."""
    length = candidate_lengths(scored.trees)
    weight = np.full(len(length), 1 / max(1, len(length) * length.max(initial=0)))
    return broadcast_to_steps(scored, group_center(*_by_group(scored)), weight)


@ESTIMATORS.register("leave_one_out", EstimatorFacts(by_group=True))
def leave_one_out(scored: ScoredTrees, std_epsilon: float) -> Advantages:
    """Compare each reward with the mean of the others in the group; ignores `std_epsilon`."""
    size = np.diff(scored.trees.candidate_start)[scored.trees.prompt_of_candidate]
    # R - (sum - R) / (G - 1) = (R - mu) G / (G - 1); in a group of one, R - mu is already 0.
    advantage = group_center(*_by_group(scored)) * size / np.maximum(size - 1, 1)
    return broadcast_to_steps(scored, advantage, mean_weight(scored))


@ESTIMATORS.register("boundary", EstimatorFacts(by_group=True))
def boundary(scored: ScoredTrees, std_epsilon: float) -> Advantages:
    """Compare the strongest positive with the hardest negative; others have no weight (ReCast)."""
    groups = _by_group(scored)
    advantage, chosen = boundary_pairs(groups[0], scored.trees.score, *groups[1:], std_epsilon)
    weight = 1 / np.maximum(1, 2 * len(scored.trees) * candidate_lengths(scored.trees))
    return broadcast_to_steps(scored, advantage, np.where(chosen, weight, 0))


def window(
    scored: ScoredTrees, std_epsilon: float, shares: tuple[float, float] = (0.0, 1.0)
) -> Advantages:
    """Standardize rewards among the positives and a window of the negatives (WPAUC)."""
    groups = _by_group(scored)
    advantage = windowed_advantages(groups[0], scored.trees.score, *groups[1:], std_epsilon, shares)
    return broadcast_to_steps(scored, advantage, mean_weight(scored))


ESTIMATORS.register(
    "window",
    EstimatorFacts(
        by_group=True,
        losses=lambda scored, config: [window(scored, config.std_epsilon, config.window)],
    ),
)(window)


@ESTIMATORS.register("blend")
def blend(scored: ScoredTrees, std_epsilon: float) -> Advantages:
    """Average `group` and the mean of `sibling` over steps; every candidate weighs the same."""
    by_group, by_node = group(scored, std_epsilon), sibling(scored, std_epsilon)
    num_steps = np.maximum(1, (scored.trees.paths() >= 0).sum(1))
    # [C] mean sibling advantage over the steps of each candidate
    mean = by_node.advantage.astype(np.float64).sum(1) / num_steps
    advantage = 0.5 * by_group.advantage[:, 0] + 0.5 * mean
    return broadcast_to_steps(scored, advantage, mean_weight(scored))


def snips(scored: ScoredTrees, std_epsilon: float, clip: float = 10.0) -> Advantages:
    """Weigh logged draws by how likely the policy is to make them (SNIPS)."""
    return broadcast_to_steps(scored, snips_advantages(scored, clip), mean_weight(scored))


ESTIMATORS.register(
    "snips",
    EstimatorFacts(
        compares=False,
        logged=True,
        losses=lambda scored, config: [snips(scored, config.std_epsilon, config.weight_clip)],
    ),
)(snips)
ESTIMATORS.register("sibling", EstimatorFacts(per_candidate=False))(sibling)


def _group_and_sibling(scored: ScoredTrees, config: LearnerConfig) -> list[Advantages]:
    """Return the advantages within the group and, with its weight, those among siblings."""
    credits = [estimate(scored, config.std_epsilon) for estimate in (group, sibling)]
    credits[1] = replace(credits[1], weight=credits[1].weight * np.float32(config.sibling_weight))
    return credits


ESTIMATORS.register(
    "group_sibling", EstimatorFacts(per_candidate=False, losses=_group_and_sibling)
)(group)


def _steps_and_format(scored: ScoredTrees, config: LearnerConfig) -> list[Advantages]:
    """Return the step-aligned credit and, where it has a weight, the credit of the format."""
    credits = [apply_code_switches(scored, sapo(scored, config.std_epsilon), config.sapo)]
    if config.sapo.format_weight:
        assert scored.step_reward is not None
        is_well_formed = scored.trees.well_formed(scored.step_reward.shape[1])
        format_reward = is_well_formed.astype(np.float32)
        credit = group(replace(scored, reward=format_reward), config.std_epsilon)
        credit = apply_code_switches(
            scored, credit, config.sapo.model_copy(update={"sid_token_weight": 1.0})
        )
        format_weight = np.float32(config.sapo.format_weight)
        credits.append(replace(credit, weight=credit.weight * format_weight))
    return credits


ESTIMATORS.register("credit_to_go", EstimatorFacts(per_candidate=False))(credit_to_go)
ESTIMATORS.register("sapo", EstimatorFacts(per_candidate=False, losses=_steps_and_format))(sapo)


def compute_advantages(scored: ScoredTrees, config: LearnerConfig) -> list[Advantages]:
    """Compute a batch's advantages by the configured estimator; the losses of several add up."""
    losses = ESTIMATORS.facts(config.estimator).losses
    if losses is not None:
        return losses(scored, config)
    return [ESTIMATORS[config.estimator](scored, config.std_epsilon)]


def teaching_groups(scored: ScoredTrees, config: LearnerConfig) -> Bool[np.ndarray, " B"]:
    """Mark the groups of a batch with an advantage, without which they have no policy gradient."""
    is_teaching = np.zeros(len(scored.trees), bool)
    for credit in compute_advantages(scored, config):
        has_advantage = (credit.advantage * credit.weight != 0).any(1)
        is_teaching[scored.trees.prompt_of_candidate[has_advantage]] = True
    return is_teaching


def group_statistics(scored: ScoredTrees) -> dict[str, float]:
    """Summarize the groups' rewards and diversity for the log.

    `zero_spread_share`: share of groups whose rewards are all equal, hence without gradient.
    `hit_share`: share of groups that contain their target (where the part "rule" is scored).
    `reward_mean`: mean reward; `mean_NAME`: mean of each part. `distinct_share`: distinct leaves
    per candidate. `probability_mass`: total probability of a group's distinct leaves under the
    behavior policy, averaged over prompts; near 1 the search has found almost all of it.
    """
    trees = scored.trees
    prompt = trees.prompt_of_candidate
    # prompts with candidates; reduceat needs the first candidate of each, without empty groups
    nonempty = np.flatnonzero(np.diff(trees.candidate_start))
    first = trees.candidate_start[nonempty]
    if len(nonempty) == 0:
        return {}
    spread = np.maximum.reduceat(scored.reward, first) - np.minimum.reduceat(scored.reward, first)
    # one candidate of each distinct (prompt, leaf)
    _, distinct = np.unique(np.stack([prompt, trees.leaf]), axis=1, return_index=True)
    mass = np.exp(trees.score[distinct].astype(np.float64)).sum() / len(nonempty)
    statistics = {
        "zero_spread_share": float((spread == 0).mean()),
        "reward_mean": float(scored.reward.mean()),
        "distinct_share": len(distinct) / len(prompt),
        "probability_mass": float(mass),
    }
    if "rule" in scored.parts:
        hit = np.maximum.reduceat(scored.parts["rule"], first) > 0
        statistics["hit_share"] = float(hit.mean())
    return statistics | {f"mean_{name}": float(part.mean()) for name, part in scored.parts.items()}


def _by_group(
    scored: ScoredTrees,
) -> tuple[Float32[np.ndarray, " C"], Int64[np.ndarray, " C"], int]:
    """Return the rewards, the group of each, and the number of groups."""
    return scored.reward, scored.trees.prompt_of_candidate, len(scored.trees)


def mean_weight(scored: ScoredTrees) -> Float64[np.ndarray, " C"]:
    """Return the weight of each candidate's tokens such that they sum to 1 / N."""
    length = candidate_lengths(scored.trees)
    return 1 / np.maximum(1, length * len(length))


def broadcast_to_steps(
    scored: ScoredTrees,
    advantage: Float64[np.ndarray, " C"],
    weight: Float64[np.ndarray, " C"],
) -> Advantages:
    """Assign a candidate's advantage and weight to each of its steps."""
    inside = scored.trees.paths() >= 0
    return Advantages(
        advantage=np.where(inside, advantage[:, None], 0).astype(np.float32),
        weight=np.where(inside, weight[:, None], 0).astype(np.float32),
    )
