"""The ten lines of the README, against the endpoint's own decoder and brute force."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import orchard
from orchard.errors import ConfigError, DataError
from orchard.evaluation import ranking
from orchard.testing import brute_force, make_evaluation, tiny_setup
from orchard.tracking.metrics_log import MetricsLogger
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


def test_metrics_and_evaluations_are_tables(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        orchard.read_metrics(tmp_path)
    with pytest.raises(DataError, match="holds no evaluation"):
        orchard.read_evaluations(tmp_path)
    with MetricsLogger(tmp_path) as metrics_logger:
        metrics_logger.log("sft", 1, {"sft/loss": 2.0})
        metrics_logger.log("train", 1, {"rewards/mean": 0.5})
        metrics_logger.log("train", 2, {"rewards/mean": 0.75})
    table = orchard.read_metrics(tmp_path).select(["phase", "step", "metric", "value"])
    assert table.to_pylist() == [
        {"phase": "sft", "step": 1, "metric": "sft/loss", "value": 2.0},
        {"phase": "train", "step": 1, "metric": "rewards/mean", "value": 0.5},
        {"phase": "train", "step": 2, "metric": "rewards/mean", "value": 0.75},
    ]
    evaluation = make_evaluation(0.25, num_rows=40)
    ranking.write(evaluation, tmp_path / "evaluation" / "trained.json")
    rows = orchard.read_evaluations(tmp_path).to_pylist()
    assert {row["metric"] for row in rows} == set(evaluation.metrics)
    means = {row["metric"]: row["mean"] for row in rows}
    assert means == {name: one.mean for name, one in evaluation.metrics.items()}


def test_importing_the_package_loads_no_torch_and_no_ray() -> None:
    code = "import sys, orchard; dir(orchard); print({'torch', 'ray', 'numpy'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "set()"
