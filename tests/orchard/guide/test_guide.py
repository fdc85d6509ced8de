"""Values of the guide against dense maxima; its folder."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from orchard.catalog.catalog import Catalog
from orchard.errors import CatalogError, CheckpointError, ConfigError
from orchard.guide import fit
from orchard.guide.guide import ABOUT, MATRICES, Guide, named_digest
from orchard.testing import tiny_catalog, tiny_prompts
from orchard.types import Prompts
from tests.fixtures.guides import random_guide


def all_rewards(guide: Guide, prompts: Prompts) -> np.ndarray:
    leaves = guide.catalog.trie.num_leaves
    prompt = np.repeat(np.arange(len(prompts)), leaves)
    leaf = np.tile(np.arange(leaves), len(prompts))
    return guide.reward(prompts, prompt, leaf).reshape(len(prompts), leaves)


def all_values(guide: Guide, prompts: Prompts) -> np.ndarray:
    nodes = guide.catalog.trie.num_nodes
    evaluate = guide.values(prompts)
    node = torch.arange(nodes).repeat(len(prompts))
    return evaluate(np.repeat(np.arange(len(prompts)), nodes), node).reshape(len(prompts), nodes)


def maxima(catalog: Catalog, reward: np.ndarray) -> np.ndarray:
    """Largest reward below each node, by its definition."""
    trie = catalog.trie
    path = trie.path(trie.leaf_node).numpy()
    value = np.full((len(reward), trie.num_nodes), -np.inf)
    for leaf, nodes in enumerate(path):
        for node in [0, *nodes[nodes >= 0]]:
            value[:, node] = np.maximum(value[:, node], reward[:, leaf])
    return value


def test_the_reward_is_the_sum_of_weights_times_features(catalog: Catalog) -> None:
    guide, prompts = random_guide(catalog, seed=1), tiny_prompts(catalog, (0, 3, 1, 7), seed=1)
    weight = [*(t.weight for t in guide.terms), guide.popularity_weight, guide.seen_weight]
    leaves = catalog.trie.num_leaves
    prompt, leaf = np.repeat(np.arange(4), leaves), np.tile(np.arange(leaves), 4)
    table = fit.features(guide, prompts, prompt, leaf)
    assert np.allclose(table @ weight, guide.reward(prompts, prompt, leaf), atol=1e-5)
    seen = np.zeros((4, leaves))
    for b in range(4):
        history = prompts.history[prompts.history_start[b] : prompts.history_start[b + 1]]
        seen[b, catalog.leaf_of_item[history]] = 1
    known = guide.scores(prompts).known
    assert not known[0]
    assert np.array_equal(table[:, -1].reshape(4, leaves)[known], seen[known])


def test_the_shares_of_a_reward_add_up_to_it(catalog: Catalog) -> None:
    guide, prompts = random_guide(catalog, seed=1), tiny_prompts(catalog, (0, 3, 1, 7), seed=1)
    leaves = catalog.trie.num_leaves
    prompt, leaf = np.repeat(np.arange(4), leaves), np.tile(np.arange(leaves), 4)
    shares = guide.shares(prompts, prompt, leaf)
    assert shares.shape == (4 * leaves, len(guide.summands))
    assert guide.summands[-2:] == ("popularity", "history")
    assert np.allclose(shares.sum(1), guide.reward(prompts, prompt, leaf), atol=1e-5)
    assert not shares[prompt == 0].any()  # nothing is known of an empty history
    assert (shares[prompt > 0] != 0).any(0).all()


@pytest.mark.parametrize("seed", range(6))
def test_values_are_the_largest_rewards_below(catalog: Catalog, seed: int) -> None:
    guide = random_guide(catalog, seed=seed, negative=False)
    prompts = tiny_prompts(catalog, (0, 3, 1, 7, 2), seed=seed)
    assert np.array_equal(all_values(guide, prompts), maxima(catalog, all_rewards(guide, prompts)))


@pytest.mark.parametrize("seed", range(6))
def test_values_bound_rewards_below_and_never_rise(catalog: Catalog, seed: int) -> None:
    guide = random_guide(catalog, seed=seed)
    prompts = tiny_prompts(catalog, (0, 3, 1, 7, 2), seed=seed)
    value, reward, trie = all_values(guide, prompts), all_rewards(guide, prompts), catalog.trie
    assert (value >= maxima(catalog, reward)).all()
    assert np.array_equal(value[:, trie.leaf_node.numpy()], reward)
    node = torch.arange(1, trie.num_nodes)
    assert (value[:, trie.parent(node).numpy()] >= value[:, 1:]).all()


def test_values_do_not_depend_on_the_batch(catalog: Catalog) -> None:
    guide = random_guide(catalog, seed=2)
    prompts = tiny_prompts(catalog, (0, 3, 1, 7, 2, 2), seed=2)
    whole = all_values(guide, prompts)
    for rows in (np.array([4]), np.array([5, 1, 3])):
        assert np.array_equal(all_values(guide, prompts.select(rows)), whole[rows])


def test_a_history_that_no_expert_knows_has_values_of_zero(catalog: Catalog) -> None:
    guide = random_guide(catalog, seed=3)
    prompts = tiny_prompts(catalog, (2, 2), seed=3)
    leaf = int(np.flatnonzero(np.diff(guide.experts[0].start) == 0)[-1])
    unknown = catalog.item_of_leaf[catalog.leaf_start[leaf]]
    assert all(np.diff(expert.start)[leaf] == 0 for expert in guide.experts)
    prompts = replace(prompts, history=np.array([unknown, unknown, *prompts.history[2:]]))
    assert guide.popularity_weight != 0
    assert not all_values(guide, prompts)[0].any()


def test_a_folder_gives_the_same_guide(catalog: Catalog, tmp_path: Path) -> None:
    guide = replace(random_guide(catalog, seed=4), policy="a" * 64)
    prompts = tiny_prompts(catalog, (3, 1), seed=4)
    guide.save(tmp_path / "guide")
    read = Guide.open(tmp_path / "guide", catalog)
    assert read.digest == guide.digest
    assert np.array_equal(all_values(read, prompts), all_values(guide, prompts))
    assert read.exclude_seen == guide.exclude_seen
    assert read.notes(rows=guide.rows, policy="a" * 64) == []
    (rows,) = read.notes(rows="b" * 64, policy="a" * 64)
    assert "training rows" in rows
    (policy,) = read.notes(rows=guide.rows, policy="b" * 64)
    assert "the policy" in policy
    replace(guide, train="c" * 64).save(tmp_path / "guide")
    read = Guide.open(tmp_path / "guide", catalog)
    (split,) = read.notes(train="d" * 64)
    assert "training split" in split
    assert read.notes(train="c" * 64) == []
    assert named_digest(tmp_path / "guide") == read.digest != guide.digest


def test_a_guide_of_another_catalog_and_a_damaged_one_are_refused(tmp_path: Path) -> None:
    catalog, other = tiny_catalog(seed=1), tiny_catalog(seed=2)
    with pytest.raises(ConfigError, match="orchard fit guide"):
        Guide.open(tmp_path, catalog)
    random_guide(catalog, seed=1).save(tmp_path / "guide")
    with pytest.raises(CatalogError, match="was fitted on catalog"):
        Guide.open(tmp_path / "guide", other)
    about = json.loads((tmp_path / "guide" / ABOUT).read_text())
    (tmp_path / "guide" / ABOUT).write_text(json.dumps({"catalog": about["catalog"]}))
    with pytest.raises(CheckpointError, match="damaged"):
        Guide.open(tmp_path / "guide", catalog)
    random_guide(catalog, seed=1).save(tmp_path / "guide")
    about = json.loads((tmp_path / "guide" / ABOUT).read_text())
    (tmp_path / "guide" / ABOUT).write_text(json.dumps(about | {"seen_weight": 7.0}))
    with pytest.raises(CheckpointError, match="its file names"):
        Guide.open(tmp_path / "guide", catalog)
    (tmp_path / "guide" / MATRICES).write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="damaged"):
        Guide.open(tmp_path / "guide", catalog)
