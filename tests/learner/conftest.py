"""Fixtures: scored trees of chosen leaves, as a search and the rewards would produce them."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from orchard import ragged
from orchard.catalog.catalog import Catalog
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.testing import tiny_catalog, tiny_policy, tiny_prompts
from orchard.types import Cost, PolicyVersion, ScoredTrees
from rollout.candidates import Candidates
from rollout.search_trees import build_search_trees


@pytest.fixture(scope="session")
def catalog() -> Catalog:
    """Return a catalog of codes of three lengths, with lone children, chains and shared leaves."""
    return tiny_catalog(varying_depth=True)


@pytest.fixture(scope="session")
def policy(catalog: Catalog) -> tuple[PreTrainedModel, ItemTokenizer]:
    """Return a tiny policy, whose weights no test changes."""
    return tiny_policy(catalog)


@pytest.fixture(scope="session")
def score_leaves(
    catalog: Catalog, policy: tuple[PreTrainedModel, ItemTokenizer]
) -> Callable[..., ScoredTrees]:
    """Return a function that builds the trees of chosen leaves, with random log-probabilities.

    Rewards are random unless passed.
    """
    trie = catalog.trie
    forced = trie.num_children(trie.parent(torch.arange(trie.num_nodes))).numpy() == 1

    def score(
        groups: Sequence[Sequence[int]],
        rewards: Sequence[Sequence[float]] | None = None,
        *,
        histories: Sequence[int] = (),
        seed: int = 0,
    ) -> ScoredTrees:
        draw = np.random.default_rng(seed)
        start = ragged.starts(np.array([len(group) for group in groups]))
        leaf = np.array([leaf for group in groups for leaf in group], np.int64)
        node = trie.path(trie.leaf_node[leaf]).numpy()
        node_logprob = np.where(forced, 0, -3 * draw.random((len(groups), trie.num_nodes)))
        logprob = np.where(node >= 0, node_logprob[ragged.row_of(start)[:, None], node], 0)
        candidates = Candidates(
            start=start,
            node=node,
            logprob=logprob.astype(np.float32),
            score=logprob.sum(1).astype(np.float32),
            leaf=leaf,
            cost=Cost(),
        )
        prompts = tiny_prompts(catalog, histories or range(1, len(groups) + 1), seed=seed)
        version = PolicyVersion(step=0, digest="0" * 64)
        reward = draw.normal(size=len(leaf)) if rewards is None else np.concatenate(rewards)
        reward = reward.astype(np.float32)
        return ScoredTrees(
            trees=build_search_trees(prompts, candidates, policy[1], version),
            reward=reward,
            parts={"rule": (reward == 1).astype(np.float32)},
            step_reward=np.repeat(reward[:, None], trie.depth, axis=1),
        )

    return score


@pytest.fixture(scope="session")
def score_random(
    catalog: Catalog, score_leaves: Callable[..., ScoredTrees]
) -> Callable[..., ScoredTrees]:
    """Return a function that builds groups of chosen sizes of random leaves, with repeats."""

    def score(sizes: Sequence[int], *, seed: int = 0) -> ScoredTrees:
        draw = np.random.default_rng(seed)
        groups = [draw.integers(catalog.trie.num_leaves, size=size).tolist() for size in sizes]
        return score_leaves(groups, seed=seed)

    return score


@pytest.fixture(scope="module")
def precise(catalog: Catalog) -> tuple[PreTrainedModel, ItemTokenizer]:
    """Return a float64 policy."""
    model, tokenizer = tiny_policy(catalog)
    return model.double(), tokenizer


@pytest.fixture(scope="module")
def scored(score_random: Callable[..., ScoredTrees]) -> ScoredTrees:
    """Return ragged groups with repeats, with log-probabilities far from the policy's."""
    return score_random([4, 1, 7, 12, 2, 16])
