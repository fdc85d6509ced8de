"""A run that learns from feedback: an endpoint's log, joined, and training on it."""

from pathlib import Path

import numpy as np
import pytest

from cluster.training.loop import train
from cluster.training.run import prepare
from orchard import config
from orchard.tracking.metrics_log import read_metrics
from tests.fixtures.begun import in_a_controller, untrained
from tests.fixtures.feedback import write_feedback_of
from tests.fixtures.runs import TinyRun

pytestmark = pytest.mark.slow


def test_a_run_learns_from_what_was_shown(data: Path, tiny_run: TinyRun, tmp_path: Path) -> None:
    path = tiny_run(
        data={"path": str(data)},
        cluster={"in_process": True},
        rollout={"engine": "torch", "group_size": 6, "batch_size": 4, "threads": 1},
        rewards={"weights": {"utility": 1.0, "rule": 0.0}, "steps": "utility"},
        learner={
            "steps": 2, "prompts_per_step": 8, "threads": 1, "estimator": "credit_to_go",
            "anchor": 0.1,
        },
        evaluate={"every": 0, "engine": "torch"},
    )  # fmt: skip
    write_feedback_of(untrained(config.load(path)), tmp_path / "feedback")
    run = prepare(config.load(path, [f"data.feedback={tmp_path / 'feedback'}"]), "train")
    assert run.feedback is not None
    assert run.rows is run.feedback.requests
    in_a_controller(train, run)
    metrics = read_metrics(run.dir / "metrics.jsonl")["train"]
    for name in ("rewards/utility", "rewards/utility_1", "learner/surrogate"):
        assert np.isfinite(metrics[name].value).all()
    assert (metrics["rewards/zero_spread_share"].value < 0.5).all()  # nearly every group teaches
    assert (run.result / "config.json").is_file()
