"""Scored trees of chosen leaves, as a search and the rewards would have handed them over."""

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
    """Sequences of three lengths, with lone children, whole chains and shared leaves."""
    return tiny_catalog(varying_depth=True)


@pytest.fixture(scope="session")
def policy(catalog: Catalog) -> tuple[PreTrainedModel, ItemTokenizer]:
    """A tiny policy; nobody changes its weights."""
    return tiny_policy(catalog)


@pytest.fixture(scope="session")
def score_leaves(
    catalog: Catalog, policy: tuple[PreTrainedModel, ItemTokenizer]
) -> Callable[..., ScoredTrees]:
    """Makes the trees of given leaves; random behaviour and, unless given, random rewards."""
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
        behaviour = np.where(forced, 0, -3 * draw.random((len(groups), trie.num_nodes)))
        logprob = np.where(node >= 0, behaviour[ragged.owners(start)[:, None], node], 0)
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
        flat = draw.normal(size=len(leaf)) if rewards is None else np.concatenate(rewards)
        reward = flat.astype(np.float32)
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
    """Makes groups of the given sizes of random leaves, repeats included."""

    def score(sizes: Sequence[int], *, seed: int = 0) -> ScoredTrees:
        draw = np.random.default_rng(seed)
        groups = [draw.integers(catalog.trie.num_leaves, size=size).tolist() for size in sizes]
        return score_leaves(groups, seed=seed)

    return score


@pytest.fixture(scope="module")
def precise(catalog: Catalog) -> tuple[PreTrainedModel, ItemTokenizer]:
    """A float64 policy."""
    model, vocabulary = tiny_policy(catalog)
    return model.double(), vocabulary


@pytest.fixture(scope="module")
def scored(score_random: Callable[..., ScoredTrees]) -> ScoredTrees:
    """Ragged groups with repeats whose behaviour is far from the policy."""
    return score_random([4, 1, 7, 12, 2, 16])
