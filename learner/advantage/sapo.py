r"""Step-aligned credit: step k is thinking block k and code k together (SAPO, arXiv 2605.17648).

A candidate that has its first code right and its second wrong did one thing well. Each step is
judged by its own match with the target and compared with the same step of the rest of the group,

    A(i, k) = (m(i, k) - mean_j m(j, k)) / (std_j m(j, k) + eps),    unbiased standard deviation,

and the verdict goes to the tokens y(i, k) of block k and of code k, and to nothing else. With N
candidates in the batch and K steps each token weighs 1 / (N K |y(i, k)|). The paper leaves the
outer factors and eps open; these follow the other estimators. A policy that does not think has
codes alone, and |y(i, k)| = 1.

|y(i, k)| counts forced tokens, as the lengths of the other estimators do. A thinking candidate with
another number of blocks than codes is malformed: all its matches are 0.

Shapes:  C candidates   L codes of the longest item   P steps of the longest path, blocks included
"""

from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float32, Int64

from learner.advantage.groups import group_normalize
from orchard.catalog.catalog import Catalog
from orchard.settings import SapoConfig
from orchard.types import Advantages, ScoredTrees, SearchTrees


def step_matches(
    trees: SearchTrees, catalog: Catalog, *, prefix: bool = False
) -> Float32[np.ndarray, "C L"]:
    """1 where code k of the candidate is code k of the target, else 0.

    By position: code 2 may match although code 1 does not. With `prefix` it may only where all
    codes before it match, since a residual code means something below its prefix alone.
    """
    target = catalog.codes[trees.prompts.target[trees.prompt_of_candidate]]
    found = catalog.codes[catalog.item_of_leaf[catalog.leaf_start[trees.leaf]]]
    same = (found == target) & (target >= 0)
    if prefix:
        same = np.logical_and.accumulate(same, axis=1)
    return (same & well_formed(trees, catalog.trie.depth)[:, None]).astype(np.float32)


def well_formed(trees: SearchTrees, num_steps: int) -> Bool[np.ndarray, " C"]:
    """Candidates with a thinking block for each of the `num_steps` codes, or that do not think."""
    if not trees.is_reasoning:
        return np.ones(len(trees.candidate), dtype=bool)
    path = trees.paths()
    blocks = ((path >= 0) & (trees.state[path] == SearchTrees.FREE_TEXT)).sum(1)
    return blocks == num_steps


def sapo(scored: ScoredTrees, std_epsilon: float) -> Advantages:
    """Standardised step by step within the group; every step of a candidate weighs the same."""
    assert scored.step_reward is not None, "step credit needs rewards of steps"
    trees, path = scored.trees, scored.trees.paths()
    inside, num_steps = path >= 0, scored.step_reward.shape[1]
    judged = np.zeros((len(path), num_steps))
    for k in range(num_steps):
        judged[:, k] = group_normalize(
            scored.step_reward[:, k], trees.prompt_of_candidate, len(trees), std_epsilon
        )
    tokens = np.where(inside, np.diff(trees.token_start)[path], 0)
    of_step = step_of_column(path.shape[1], num_steps)
    length = np.zeros((len(path), num_steps))
    for column, k in enumerate(of_step):
        length[:, k] += tokens[:, column]
    steps = (length > 0).sum(1, keepdims=True)
    share = 1 / np.maximum(1, len(path) * steps * length)
    return Advantages(
        advantage=np.where(inside, judged[:, of_step], 0).astype(np.float32),
        weight=np.where(inside, share[:, of_step], 0).astype(np.float32),
    )


def step_of_column(width: int, num_steps: int) -> Int64[np.ndarray, " P"]:
    """The 0-based step of each column of `paths`: codes, or blocks and then codes."""
    return np.arange(width) % num_steps


def apply_code_switches(scored: ScoredTrees, credit: Advantages, config: SapoConfig) -> Advantages:
    """The credit of `step` under the switches that concern codes.

    `think_only` takes the advantage away from codes but leaves them their share of the divergence
    from the reference; `sid_token_weight` multiplies their weight.
    """
    assert scored.step_reward is not None
    num_steps = scored.step_reward.shape[1]
    width = credit.advantage.shape[1]
    is_code = np.arange(width) >= (num_steps if scored.trees.is_reasoning else 0)
    keep = np.where(is_code & config.think_only, 0, 1).astype(np.float32)
    weigh = np.where(is_code, config.sid_token_weight, 1).astype(np.float32)
    return replace(credit, advantage=credit.advantage * keep, weight=credit.weight * weigh)


def add_step_rewards(scored: ScoredTrees, catalog: Catalog, *, prefix: bool = False) -> ScoredTrees:
    """With the rewards of steps, and without any reward for candidates that are malformed."""
    formed = well_formed(scored.trees, catalog.trie.depth)
    return replace(
        scored,
        reward=np.where(formed, scored.reward, 0).astype(np.float32),
        step_reward=step_matches(scored.trees, catalog, prefix=prefix),
    )


def step_statistics(scored: ScoredTrees) -> dict[str, float]:
    """What the steps of the groups have to teach, for the log.

    `match_K`: share of candidates that match at step K, up to 8. `step_signal_share`: groups in
    which some step tells candidates apart; 1 - `zero_spread_share` is the same of the reward.
    """
    match = scored.step_reward
    occupied = np.flatnonzero(np.diff(scored.trees.candidate_start))
    if match is None or len(occupied) == 0:
        return {}
    first = scored.trees.candidate_start[occupied]
    spread = np.maximum.reduceat(match, first) - np.minimum.reduceat(match, first)
    shares = {f"match_{k}": float(rate) for k, rate in enumerate(match[:, :8].mean(0), 1)}
    return shares | {"step_signal_share": float((spread > 0).any(1).mean())}
