"""Trees of chosen leaves, for prompts of chosen targets."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from orchard import ragged
from orchard.catalog.catalog import Catalogue
from orchard.policy.item_tokenizer import compact_tokenizer, of_codes
from orchard.testing import tiny_prompts
from orchard.types import Cost, PolicyVersion, SearchTrees
from rollout.candidates import Candidates
from rollout.search_trees import grow


def trees_of(
    catalogue: Catalogue, groups: Sequence[Sequence[int]], targets: Sequence[int]
) -> SearchTrees:
    """Trees whose candidates are the given leaves, best first, for prompts of the given targets."""
    leaf = np.array([leaf for group in groups for leaf in group], np.int64)
    node = catalogue.trie.path(catalogue.trie.leaf_node[leaf]).numpy()
    candidates = Candidates(
        start=ragged.starts(np.array([len(group) for group in groups])),
        node=node,
        logprob=np.zeros(node.shape, np.float32),
        score=-np.arange(len(leaf)).astype(np.float32),
        leaf=leaf,
        cost=Cost(),
    )
    prompts = replace(tiny_prompts(catalogue, [2] * len(groups)), target=np.array(targets))
    vocabulary = of_codes(compact_tokenizer(catalogue), catalogue)
    return grow(prompts, candidates, catalogue, vocabulary, PolicyVersion(step=0, digest="0" * 64))


@pytest.fixture(scope="session")
def trees_with() -> Callable[..., SearchTrees]:
    """Makes trees of given leaves."""
    return trees_of
