"""Runs whose prompts are requests, or draws, of feedback, up to the batch that the learner gets."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cluster.training.run import Run, prepare
from learner.batch.pack import make_batch
from orchard.data.prompts import make_prompts
from orchard.errors import ConfigError
from orchard.settings import Config
from orchard.types import ScoredTrees
from rewards.actor import RewardWorker
from rollout.actor import RolloutWorker
from tests.fixtures.begun import untrained
from tests.fixtures.feedback import write_feedback_of

Load = Callable[..., Config]
FEW = "rollout.group_size=4"


def searched(run: Run, number: int) -> ScoredTrees:
    """Search and score the first rows as actors do."""
    worker = RolloutWorker(run.config.rollout, run.policy, run.tokenizer, 0, None, None)
    prompts = make_prompts(run.tokenizer, run.rows, np.arange(number))
    return RewardWorker(run.reward_context).score(worker.search(prompts, 0, 0))


def test_requests_are_rewarded_by_what_others_earned(load: Load, tmp_path: Path) -> None:
    write_feedback_of(untrained(load()), tmp_path / "shown")
    told = (
        f"data.feedback={tmp_path / 'shown'}", "rewards.weights={utility=1.0, rule=0.0}",
        "rewards.steps=utility", "learner.estimator=credit_to_go", "learner.anchor=0.1", FEW,
    )  # fmt: skip
    run = prepare(load(*told), "train")
    assert run.feedback is not None
    assert run.rows is run.feedback.requests
    assert run.data["feedback"] == run.rows.digest
    assert run.rows.reward is not None
    assert (run.rows.reward == 1).all()
    scored = searched(run, 6)
    own = run.reward_context.prefix_utilities.own_request(scored.trees.prompts)
    assert own.tolist() == list(range(6))
    assert scored.step_reward is not None
    np.testing.assert_allclose(scored.step_reward.sum(1), scored.reward, atol=1e-5)
    assert (scored.reward != 0).any()
    batch = make_batch(scored, run.tokenizer, run.config.learner)
    assert (batch.advantage_pos != 0).any()
    assert batch.codes is not None
    old = prepare(load(*told, "learner.rows=train"), "train")
    assert old.rows is old.train
    prompts = make_prompts(old.tokenizer, old.rows, np.arange(6))
    assert (old.reward_context.prefix_utilities.own_request(prompts) == -1).all()


def test_logged_draws_become_trees_of_one_path(load: Load, tmp_path: Path) -> None:
    write_feedback_of(untrained(load()), tmp_path / "shown")
    told = (
        f"data.feedback={tmp_path / 'shown'}", "rollout.search=logged", "learner.estimator=snips",
        "rewards.weights={rule=1.0}", "learner.lists=independent",
    )  # fmt: skip
    run = prepare(load(*told), "train")
    assert run.feedback is not None
    assert run.rows is run.feedback.draws
    scored = searched(run, 8)
    assert np.diff(scored.trees.candidate_start).tolist() == [1] * 8
    assert scored.reward.sum() > 0
    assert run.rows.reward is not None
    np.testing.assert_allclose(scored.reward, run.rows.reward[:8])
    batch = make_batch(scored, run.tokenizer, run.config.learner)
    assert (batch.advantage_pos > 0).any()
    assert (batch.advantage_neg < 0).any()


def test_the_guide_may_count_feedback(load: Load, tmp_path: Path) -> None:
    write_feedback_of(untrained(load()), tmp_path / "shown")
    with pytest.raises(ConfigError, match='guide.counts = "feedback" needs feedback'):
        load("guide.counts=feedback")
    told = f"data.feedback={tmp_path / 'shown'}"
    run = prepare(load(told, "guide.counts=feedback"), "train")
    assert run.feedback is not None
    assert len(run.leaf_rows) == len(run.train) + len(run.feedback.requests)
    assert run.leaf_rows.weight is not None
    assert (run.leaf_rows.weight == 1).all()
    assert prepare(load(told), "train").leaf_rows.weight is None
