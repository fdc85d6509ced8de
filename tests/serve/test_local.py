"""The ten lines of the README, against the endpoint's own decoder and brute force."""

from pathlib import Path

import numpy as np
import pytest

import orchard
from orchard.errors import ConfigError, DataError
from orchard.testing import brute_force, tiny_setup
from serve.testing import export_policy

SETUP = tiny_setup(level_size=(5, 4, 6), num_items=40)
HISTORY = [3, 17, 5]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> orchard.LocalPolicy:
    folder = export_policy(SETUP, tmp_path_factory.mktemp("run") / "policy", step=3)
    return orchard.load(str(folder))


@pytest.fixture(scope="module")
def leaf_logprob() -> np.ndarray:
    rows = SETUP.catalog.rows(np.array(HISTORY))
    token, _ = SETUP.tokenizer.encode_history(rows, np.array([0, len(rows)]))
    return brute_force(SETUP.model, SETUP.tokenizer, token)


def test_recommendations_are_the_best_items_in_order(
    policy: orchard.LocalPolicy, leaf_logprob: np.ndarray
) -> None:
    items = policy.recommend(history=HISTORY, k=40, width=100)
    scores = [item.score for item in items]
    expected = leaf_logprob[SETUP.catalog.leaf_of_item]
    assert sorted(item.item_id for item in items) == sorted(SETUP.catalog.item_id.tolist())
    assert np.allclose(scores, np.sort(expected)[::-1], atol=1e-4)
    unseen = policy.recommend(history=HISTORY, k=40, width=100, exclude_seen=True, exclude=[8])
    assert [item.item_id for item in unseen] == [
        item.item_id for item in items if item.item_id not in {*HISTORY, 8}
    ]
    assert policy.recommend(history=[*HISTORY, 999], k=3) == policy.recommend(HISTORY, k=3)


def test_items_are_scored_as_brute_force_scores_them(
    policy: orchard.LocalPolicy, leaf_logprob: np.ndarray
) -> None:
    ids = SETUP.catalog.item_id[::3]
    expected = leaf_logprob[SETUP.catalog.leaf_of_item[SETUP.catalog.rows(ids)]]
    assert np.allclose(policy.score(HISTORY, ids.tolist()), expected, atol=1e-4)
    assert policy.score(HISTORY, []).shape == (0,)
    with pytest.raises(DataError, match="item 999 is not in the catalog"):
        policy.score(HISTORY, [999])


def test_trees_hold_the_log_probabilities_of_their_candidates(
    policy: orchard.LocalPolicy, leaf_logprob: np.ndarray
) -> None:
    trees = policy.search_trees([HISTORY, [], [1]], width=6)
    assert len(trees) == 3
    first = slice(*trees.candidate_start[:2].tolist())
    assert np.allclose(trees.score[first], leaf_logprob[trees.leaf[first]], atol=1e-4)


def test_what_cannot_be_answered_is_refused(policy: orchard.LocalPolicy, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="k = 0"):
        policy.recommend(HISTORY, k=0)
    with pytest.raises(DataError):
        orchard.load(tmp_path)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = orchard.nothing  # pyright: ignore[reportAttributeAccessIssue]
