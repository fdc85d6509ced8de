r"""Estimate step-aligned advantages (SAPO, arXiv 2605.17648).

Step k is thinking block k and code k together. A candidate with a correct first code and a wrong
second one deserves credit for the first. Each step is scored by its match m(i, k) with the target
and compared with the same step of the rest of the group,

    A(i, k) = (m(i, k) - mean_j m(j, k)) / (std_j m(j, k) + eps),    unbiased standard deviation,

and the advantage applies to the tokens y(i, k) of block k and of code k only. With N candidates in
the batch and K steps, each token weighs 1 / (N K |y(i, k)|). The paper leaves the outer factors and
eps open; these follow the other estimators. A policy that does not think has codes alone, and
|y(i, k)| = 1.

|y(i, k)| counts forced tokens, as the lengths of the other estimators do. A thinking candidate
whose number of blocks differs from its number of codes is malformed: all its matches are 0.

The matches are `ScoredTrees.step_reward` (`rewards.steps`). `credit_to_go` puts the sum of the step
rewards from k on in the place of m(i, k): the credit of HRPO (arXiv 2608.00750), whose step rewards
are what each code adds to the utility of the prefix before it (`rewards.utility`).

Shapes:  C candidates   L codes of the longest item   P steps of the longest path, blocks included
"""

from dataclasses import replace

import numpy as np
from jaxtyping import Int64

from learner.advantage.groups import group_normalize
from orchard.settings import SapoConfig
from orchard.types import Advantages, ScoredTrees


def sapo(scored: ScoredTrees, std_epsilon: float) -> Advantages:
    """Standardize each step within the group; every step of a candidate weighs the same."""
    assert scored.step_reward is not None, "step credit needs rewards of steps"
    trees, path = scored.trees, scored.trees.paths()
    inside, num_steps = path >= 0, scored.step_reward.shape[1]
    # [C, L] advantage of each step
    advantage = np.zeros((len(path), num_steps))
    for k in range(num_steps):
        advantage[:, k] = group_normalize(
            scored.step_reward[:, k], trees.prompt_of_candidate, len(trees), std_epsilon
        )
    # [C, P] number of tokens of each node on the path
    num_tokens = np.where(inside, np.diff(trees.token_start)[path], 0)
    column_step = step_of_column(path.shape[1], num_steps)
    # [C, L] number of tokens of each step, block and code together
    length = np.zeros((len(path), num_steps))
    for column, k in enumerate(column_step):
        length[:, k] += num_tokens[:, column]
    # [C, 1] number of steps that each candidate has
    candidate_steps = (length > 0).sum(1, keepdims=True)
    weight = 1 / np.maximum(1, len(path) * candidate_steps * length)
    return Advantages(
        advantage=np.where(inside, advantage[:, column_step], 0).astype(np.float32),
        weight=np.where(inside, weight[:, column_step], 0).astype(np.float32),
    )


def credit_to_go(scored: ScoredTrees, std_epsilon: float) -> Advantages:
    """Standardize, at each step, what the rewards of it and of later steps add up to (HRPO)."""
    assert scored.step_reward is not None, "step credit needs rewards of steps"
    rewards = scored.step_reward.astype(np.float64)
    to_go = np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1].astype(np.float32)
    return sapo(replace(scored, step_reward=to_go), std_epsilon)


def step_of_column(width: int, num_steps: int) -> Int64[np.ndarray, " P"]:
    """Return the 0-based step of each column of `paths`: codes, or blocks and then codes."""
    return np.arange(width) % num_steps


def apply_code_switches(scored: ScoredTrees, credit: Advantages, config: SapoConfig) -> Advantages:
    """Apply the settings that concern the tokens of codes to step-aligned advantages.

    `think_only` sets the advantage of codes to 0 but keeps their share of the divergence from the
    reference; `sid_token_weight` multiplies their weight.
    """
    assert scored.step_reward is not None
    num_steps = scored.step_reward.shape[1]
    width = credit.advantage.shape[1]
    is_code = np.arange(width) >= (num_steps if scored.trees.is_reasoning else 0)
    keep = np.where(is_code & config.think_only, 0, 1).astype(np.float32)
    factor = np.where(is_code, config.sid_token_weight, 1).astype(np.float32)
    return replace(credit, advantage=credit.advantage * keep, weight=credit.weight * factor)
