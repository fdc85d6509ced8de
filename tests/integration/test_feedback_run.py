"""A run that learns from feedback through Ray: warm start, an endpoint's log, training on it."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from cluster.training.loop import train
from cluster.training.run import Run, prepare
from cluster.training.run_dir import open_run_dir
from cluster.training.sft import sft
from orchard import config
from orchard.feedback.join import JoinOptions, join
from orchard.feedback.schema import EVENTS, EXPOSURES
from orchard.feedback.write import write_feedback
from orchard.tracking.metrics_log import read_metrics
from tests.fixtures.begun import in_a_controller
from tests.fixtures.runs import TinyRun

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def write_log(run: Run, out: Path) -> None:
    """Write feedback of the training rows: two items shown to each, and the target clicked."""
    rng, catalog, rows = np.random.default_rng(0), run.catalog, run.train
    shown: list[dict[str, object]] = []
    for row in range(len(rows)):
        history = rows.history[rows.history_start[row] : rows.history_start[row + 1]]
        items = [int(rows.target[row]), int(rng.integers(len(catalog)))]
        for rank, item in enumerate(items, 1):
            codes = [int(code) for code in catalog.plain_codes[item] if code >= 0]
            shown.append(
                {
                    "request_id": str(row), "time": float(row), "user": str(rows.user[row]),
                    "shadow": False, "policy": "0-a", "catalogue": f"0-{catalog.digest[:8]}",
                    "source": "policy", "decoder": "beam_sample", "width": 2, "temperature": 1.0,
                    "restricted": False, "history": catalog.item_id[history].tolist(),
                    "rank": rank, "item_id": int(catalog.item_id[item]), "sid": codes,
                    "logprob": [-1.0] * len(codes),
                }
            )  # fmt: skip
    clicks = [
        {"time": one["time"], "request_id": one["request_id"], "item_id": one["item_id"],
         "behavior": "click", "value": 1.0, "user": None, "event_id": None}
        for one in shown[::2]
    ]  # fmt: skip
    joined = join(pl.DataFrame(shown, EXPOSURES), pl.DataFrame(clicks, EVENTS), catalog=catalog)
    write_feedback(out, joined, JoinOptions())


def test_a_run_learns_from_what_was_shown(data: Path, tiny_run: TinyRun, tmp_path: Path) -> None:
    path = tiny_run(
        data={"path": str(data)},
        sft={"epochs": 1, "lr": 5e-3, "valid_rows": 20, "valid_beams": 10},
        rollout={"engine": "torch", "group_size": 6, "batch_size": 4, "threads": 1},
        rewards={"weights": {"utility": 1.0, "rule": 0.0}, "steps": "utility"},
        learner={
            "steps": 2, "prompts_per_step": 8, "threads": 1, "estimator": "credit_to_go",
            "anchor": 0.1,
        },
        evaluate={"every": 0},
    )  # fmt: skip
    start = prepare(config.load(path), "sft")
    open_run_dir(start)
    in_a_controller(sft, start)
    write_log(start, tmp_path / "feedback")
    run = prepare(config.load(path, [f"data.feedback={tmp_path / 'feedback'}"]), "train")
    assert run.feedback is not None
    assert run.rows is run.feedback.requests
    assert run.data["feedback"] == run.rows.digest
    assert run.rows.reward is not None
    assert (run.rows.reward == 1).all()
    in_a_controller(train, run)
    metrics = read_metrics(run.dir / "metrics.jsonl")["train"]
    for name in ("rewards/utility", "rewards/utility_1", "rewards/zero_spread_share"):
        assert np.isfinite(metrics[name].value).all()
    assert (metrics["rewards/zero_spread_share"].value < 0.5).all()  # nearly every group teaches
    assert (run.result / "config.json").is_file()
