"""Reward each step of a candidate by its match with the target (SAPO, arXiv 2605.17648).

A thinking candidate whose number of blocks differs from its number of codes is malformed: all its
matches and its reward are 0.

Shapes:  C candidates   L codes of the longest item
"""

from dataclasses import replace

import numpy as np
from jaxtyping import Float32

from orchard.catalog.catalog import Catalog
from orchard.types import ScoredTrees, SearchTrees


def step_matches(
    trees: SearchTrees, catalog: Catalog, *, prefix: bool = False
) -> Float32[np.ndarray, "C L"]:
    """Return 1 where code k of the candidate is code k of the target, else 0.

    Codes are compared by position: code 2 may match although code 1 does not. With `prefix` a code
    matches only where all codes before it match, since the meaning of a residual code depends on
    its prefix.
    """
    target = catalog.codes[trees.prompts.target[trees.prompt_of_candidate]]
    # [C, L] codes of each candidate; all items of a leaf have the same ones
    codes = catalog.codes[catalog.item_of_leaf[catalog.leaf_start[trees.leaf]]]
    matches = (codes == target) & (target >= 0)
    if trees.prompts.reward is not None:  # in feedback, of a target that nobody wanted
        matches &= (trees.prompts.reward > 0)[trees.prompt_of_candidate, None]
    if prefix:
        matches = np.logical_and.accumulate(matches, axis=1)
    return (matches & trees.well_formed(catalog.trie.depth)[:, None]).astype(np.float32)


def add_step_rewards(scored: ScoredTrees, catalog: Catalog, *, prefix: bool = False) -> ScoredTrees:
    """Add the matches as step rewards and set the reward of malformed candidates to 0."""
    return with_step_rewards(scored, catalog, step_matches(scored.trees, catalog, prefix=prefix))


def with_step_rewards(
    scored: ScoredTrees, catalog: Catalog, step_reward: Float32[np.ndarray, "C L"]
) -> ScoredTrees:
    """Add step rewards, and set those of malformed candidates and their reward to 0."""
    is_well_formed = scored.trees.well_formed(catalog.trie.depth)
    return replace(
        scored,
        reward=np.where(is_well_formed, scored.reward, 0).astype(np.float32),
        step_reward=np.where(is_well_formed[:, None], step_reward, 0).astype(np.float32),
    )


def step_statistics(scored: ScoredTrees, name: str = "match") -> dict[str, float]:
    """Summarize the step rewards, which `name` says the kind of, for the log.

    `match_K`: share of candidates that match at step K, up to 8, or `utility_K`: mean of what code
    K adds to the utility. `step_signal_share`: share of
    groups with a step at which candidates differ; the counterpart for the whole reward is
    1 - `zero_spread_share`.
    """
    match = scored.step_reward
    # prompts with candidates; reduceat needs the first candidate of each, without empty groups
    nonempty = np.flatnonzero(np.diff(scored.trees.candidate_start))
    if match is None or len(nonempty) == 0:
        return {}
    first = scored.trees.candidate_start[nonempty]
    spread = np.maximum.reduceat(match, first) - np.minimum.reduceat(match, first)
    shares = {f"{name}_{k}": float(rate) for k, rate in enumerate(match[:, :8].mean(0), 1)}
    return shares | {"step_signal_share": float((spread > 0).any(1).mean())}
