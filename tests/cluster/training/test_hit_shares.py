"""Shares of prompts whose candidates hold their target."""

from collections.abc import Callable

import numpy as np
import pytest

from cluster.training.hit_shares import hits, warning
from cluster.training.run import prepare
from orchard.data.prompts import make_prompts
from orchard.settings import Config
from rollout.actor import RolloutWorker
from tests.fixtures.begun import untrained

Load = Callable[..., Config]


@pytest.mark.slow
def test_a_share_clearly_above_that_of_held_out_rows_is_warned_of(load: Load) -> None:
    first = untrained(load())
    run = prepare(load(), "train")
    much, little = np.array([500, 2000]), np.array([90, 500])
    text = warning(much, little, run)
    assert text is not None
    assert "25.0 % of the training prompts" in text
    assert "18.0 % of held-out rows" in text
    assert "data.hold_back" in text
    assert warning(np.array([50, 200]), np.array([9, 50]), run) is None  # by chance, perhaps
    assert warning(little, much, run) is None
    assert warning(np.array([0, 0]), little, run) is None
    assert warning(np.array([0, 10]), np.array([0, 10]), run) is None
    fresh = prepare(load("data.fresh=['later.parquet']"), "train")
    assert "lower learner.steps" in (warning(much, little, fresh) or "")
    old = prepare(load("data.fresh=['later.parquet']", "learner.rows=train"), "train")
    assert 'learner.rows = "auto"' in (warning(much, little, old) or "")
    assert first.fresh is None


def test_hits_are_groups_that_hold_their_target(load: Load) -> None:
    untrained(load())
    run = prepare(load(), "train")
    worker = RolloutWorker(run.config.rollout, run.policy, run.tokenizer, 0, None, None)
    trees = worker.search(make_prompts(run.tokenizer, run.valid, np.arange(20)), seed=0)
    target = run.catalog.leaf_of_item[run.valid.target[:20]]
    bounds = trees.candidate_start
    expected = sum(
        target[i] in trees.leaf[bounds[i] : bounds[i + 1]].tolist() for i in range(len(target))
    )
    assert hits(trees, run) == expected > 0
