"""The fit of a guide's weights: what it cannot be fitted to, and who is to blame."""

import numpy as np
import pytest

from orchard import ragged
from orchard.errors import ConfigError, DataError
from orchard.guide import fit
from orchard.guide.guide import Guide
from orchard.testing import tiny_catalog, tiny_prompts
from tests.fixtures.guides import random_rows


def lists_of(guide: Guide, *, with_target: bool, sure: float = 1.0) -> fit.Lists:
    """Return lists of every leaf, or of every leaf but the target; the target is the likeliest."""
    catalog = guide.catalog
    prompts = tiny_prompts(catalog, (1, 3, 2, 4, 5, 2), seed=0)
    target = catalog.leaf_of_item[prompts.target]
    parts = [np.arange(catalog.trie.num_leaves) for _ in target]
    if not with_target:
        parts = [part[part != goal] for part, goal in zip(parts, target, strict=True)]
    leaf = np.concatenate(parts)
    size = np.array([len(part) for part in parts])
    hit = leaf == np.repeat(target, size)
    draw = np.random.default_rng(1).normal(size=len(leaf))
    return fit.Lists(
        prompts=prompts, start=ragged.starts(size), leaf=leaf, score=draw + sure * hit - 5
    )


def test_lists_without_their_targets_fit_no_weights() -> None:
    catalog = tiny_catalog(seed=1)
    guide = fit.count(catalog, random_rows(catalog, seed=1), exclude_seen=False)
    with pytest.raises(DataError, match="no target of 6 validation rows is among its candidates"):
        fit.fit_weights(guide, [lists_of(guide, with_target=False)])


def test_a_likelihood_that_misleads_is_refused() -> None:
    catalog = tiny_catalog(seed=1)
    guide = fit.count(catalog, random_rows(catalog, seed=1), exclude_seen=False)
    with pytest.raises(DataError, match="likelihood of the policy has weight -"):
        fit.fit_weights(guide, [lists_of(guide, with_target=True, sure=-9.0)])


def test_weights_are_relative_to_the_likelihood() -> None:
    catalog = tiny_catalog(seed=1)
    guide = fit.count(catalog, random_rows(catalog, seed=1), exclude_seen=False)
    fitted = fit.fit_weights(guide, [lists_of(guide, with_target=True, sure=2.0)])
    assert fitted.hits == 6
    assert fitted.likelihood_weight > 0


def test_an_expert_that_is_not_registered_is_refused() -> None:
    catalog = tiny_catalog(seed=1)
    with pytest.raises(ConfigError, match=r"guide\.experts"):
        fit.count(catalog, random_rows(catalog, seed=1), ["oracle"])
