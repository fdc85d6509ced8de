"""Metrics and evaluations of a run as tables."""

from pathlib import Path

import pytest

import orchard
from orchard.errors import DataError
from orchard.evaluation import ranking
from orchard.testing import make_evaluation
from orchard.tracking.metrics_log import MetricsLogger


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
