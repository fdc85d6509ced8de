"""The conditional logit recovers weights; lists without a hit give none."""

from dataclasses import replace

import numpy as np
import pytest

from orchard.catalog.catalog import Catalog
from orchard.errors import ConfigError, DataError
from orchard.guide import fit
from orchard.guide.registry import EXPERTS, ExpertFactory, ExpertFacts
from orchard.registry import Registry
from orchard.testing import tiny_catalog, tiny_prompts
from orchard.types import Prompts
from tests.fixtures.guides import random_rows


def all_leaves(catalog: Catalog, prompts: Prompts, score: np.ndarray) -> fit.Lists:
    leaves = catalog.trie.num_leaves
    return fit.Lists(
        prompts=prompts,
        start=np.arange(len(prompts) + 1) * leaves,
        leaf=np.tile(np.arange(leaves), len(prompts)),
        score=score.ravel(),
    )


def test_weights_of_a_world_that_follows_the_model_are_found() -> None:
    catalog, draw = tiny_catalog(seed=3, num_items=40), np.random.default_rng(0)
    guide = fit.count(catalog, random_rows(catalog, seed=0), ["transitions"], exclude_seen=False)
    true = np.array([0.0, 1.5, 0.5, -1.0])
    prompts = tiny_prompts(catalog, draw.integers(1, 6, 3000).tolist(), seed=5)
    leaves = catalog.trie.num_leaves
    prompt, leaf = np.repeat(np.arange(3000), leaves), np.tile(np.arange(leaves), 3000)
    table = fit.features(guide, prompts, prompt, leaf)
    score = draw.normal(0, 1.5, (3000, leaves))
    utility = 0.5 * (score + (table @ true).reshape(score.shape))
    chosen = (utility + draw.gumbel(size=utility.shape)).argmax(1)
    target = catalog.item_of_leaf[catalog.leaf_start[chosen]]
    lists = all_leaves(catalog, replace(prompts, target=target), score)
    fitted = fit.fit_weights(guide, [lists], ridge=1e-6)
    assert fitted.hits == 3000
    assert abs(fitted.likelihood_weight - 0.5) < 0.05
    found = fit.features(guide, prompts, prompt, leaf) @ [
        *(term.weight for term in fitted.guide.terms),
        fitted.guide.popularity_weight,
        fitted.guide.seen_weight,
    ]
    # Two scales of one expert are nearly collinear: rewards are compared, not single weights.
    assert np.abs(found - table @ true).max() < 0.6
    assert abs(fitted.guide.seen_weight + 1.0) < 0.3


def test_a_guide_that_excludes_the_history_is_fitted_without_it() -> None:
    catalog = tiny_catalog(seed=3, num_items=40)
    prompts = tiny_prompts(catalog, (3, 2, 4, 5) * 20, seed=5)
    score = np.random.default_rng(0).normal(size=(80, catalog.trie.num_leaves))
    for rows in range(80):
        score[rows, catalog.leaf_of_item[prompts.target[rows]]] += 2.0
    guide = fit.count(catalog, random_rows(catalog, seed=0), exclude_seen=True)
    fitted = fit.fit_weights(guide, [all_leaves(catalog, prompts, score)])
    assert fitted.guide.seen_weight == 0.0
    again = sum(
        catalog.leaf_of_item[prompts.target[b]]
        in catalog.leaf_of_item[prompts.history[prompts.history_start[b] :][: (3, 2, 4, 5)[b % 4]]]
        for b in range(80)
    )
    assert again > 0
    assert fitted.hits == 80 - again


def test_lists_without_a_hit_give_no_weights() -> None:
    catalog = tiny_catalog(seed=3)
    guide = fit.count(catalog, random_rows(catalog, seed=0))
    prompts = tiny_prompts(catalog, (3,), seed=5)
    miss = (catalog.leaf_of_item[prompts.target[0]] + 1) % catalog.trie.num_leaves
    lists = fit.Lists(
        prompts=prompts, start=np.array([0, 1]), leaf=np.array([miss]), score=np.zeros(1)
    )
    with pytest.raises(DataError, match="no target of 1 validation rows"):
        fit.fit_weights(guide, [lists])


def test_a_policy_whose_likelihood_misleads_gives_no_weights() -> None:
    catalog = tiny_catalog(seed=3)
    prompts = tiny_prompts(catalog, (3, 2, 4, 5) * 20, seed=5)
    score = np.zeros((80, catalog.trie.num_leaves))
    score[np.arange(80), catalog.leaf_of_item[prompts.target]] = -3.0
    guide = fit.count(catalog, random_rows(catalog, seed=0))
    with pytest.raises(DataError, match="likelihood of the policy has weight"):
        fit.fit_weights(guide, [all_leaves(catalog, prompts, score)])


def test_experts_are_registered_by_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = tiny_catalog(seed=3)
    rows = random_rows(catalog, seed=0)
    with pytest.raises(ConfigError, match=r"guide\.experts names an unknown expert item_nn"):
        fit.count(catalog, rows, ["item_nn"])
    own: Registry[ExpertFactory, ExpertFacts] = Registry("expert", (), ExpertFacts())
    own.register("two_tower", ExpertFacts(scales=(0.5, 2.0)))(EXPERTS["item_knn"])
    monkeypatch.setattr(fit, "EXPERTS", own)
    guide = fit.count(catalog, rows, ["two_tower"])
    assert [(t.expert, t.scale) for t in guide.terms] == [("two_tower", 0.5), ("two_tower", 2.0)]
    assert guide.experts[0].name == "two_tower"
    assert guide.rows == rows.digest
