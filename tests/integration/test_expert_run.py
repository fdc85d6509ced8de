"""A run with a guide: warm start, guided training, plain and guided evaluation."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.training.evaluate import GUIDED, UNSEEN, evaluate, evaluation_file
from cluster.training.loop import train
from cluster.training.run import prepare
from cluster.training.run_dir import open_run_dir
from cluster.training.sft import sft
from orchard import config
from orchard.guide import fit
from orchard.policy.store import GUIDE, open_guide
from orchard.tracking.metrics_log import read_metrics
from tests.fixtures.begun import in_a_controller
from tests.fixtures.runs import TinyRun

pytestmark = pytest.mark.slow


def test_a_guide_guides_training_and_evaluation(data: Path, tiny_run: TinyRun) -> None:
    path = tiny_run(
        data={"path": str(data)},
        cluster={"in_process": True},
        sft={"epochs": 2, "lr": 5e-3, "valid_rows": 20, "valid_beams": 10},
        rollout={
            "engine": "torch", "group_size": 6, "batch_size": 4, "threads": 1, "guide": "expert",
        },
        learner={"steps": 2, "prompts_per_step": 8, "threads": 1},
        evaluate={"every": 0, "exclude_seen": True},
    )  # fmt: skip
    settings = config.load(path)
    start = prepare(settings, "sft")
    open_run_dir(start)
    in_a_controller(sft, start)
    # A policy this young has no likelihood that a fit could use; tests of the fit are elsewhere.
    counted = fit.count(start.catalog, start.leaf_rows, exclude_seen=True)
    weights = [0.5] * (len(counted.terms) + 2)
    fit.with_weights(counted, weights).save(start.result / GUIDE)
    run = prepare(settings, "train")
    assert run.guide is not None
    in_a_controller(train, run)
    proved = read_metrics(run.dir / "metrics.jsonl")["train"]["rollout/proved"].value
    assert len(proved) == 2
    assert ((proved >= 0) & (proved <= 1)).all()
    carried = open_guide(run.result, run.catalog)
    assert carried is not None
    assert carried.digest == run.guide.digest
    judged = prepare(settings, "evaluate", policy=run.result)
    found = in_a_controller(
        lambda controller: evaluate(controller, run.result, split="test", beams=12, name="last"),
        replace(judged, config=settings),
    )
    assert set(found) == {"last", f"last{UNSEEN}", f"last{GUIDED}"}
    assert all(evaluation_file(judged, name).is_file() for name in found)
    means = [metric.mean for result in found.values() for metric in result.metrics.values()]
    assert np.isfinite(means).all()
