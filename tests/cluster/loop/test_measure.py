"""Measures of policies: draws are told from lists, and the estimate is that of the draws."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from cluster.loop.measure import draws_of, measure_policy, realized, reward_per_request
from orchard.feedback.schema import FEEDBACK
from orchard.testing import TinySetup, tiny_setup
from orchard.types import Prompts
from rollout.engine.torch import TorchEngine
from rollout.search.draws import sample
from serve.testing import export_policy

HISTORY = [3, 17, 5]


def feedback(world: TinySetup, number: int) -> pl.DataFrame:
    """Return single draws after one history, with the item id as reward."""
    rows = np.array(HISTORY)
    token, start = world.tokenizer.encode_history(rows, np.array([0, 3]))
    prompts = Prompts(
        id=np.zeros(1, np.int64), target=np.zeros(1, np.int64), history=rows,
        history_start=np.array([0, 3]), token=token, token_start=start,
    )  # fmt: skip
    engine = TorchEngine(world.model, world.tokenizer, world.version)
    found = sample(engine, prompts, count=number, temperature=1.0, seed=0)
    items = world.catalog
    return pl.DataFrame(
        [
            {
                "request_id": str(place), "time": 1.0, "user": "ann", "history": HISTORY,
                "item_id": (item := int(items.item_of_leaf[items.leaf_start[leaf]])), "rank": 1,
                "sid": [0], "logprob": found.logprob[place].tolist(), "decoder": "beam_sample",
                "width": 1, "temperature": 1.0, "restricted": False, "policy": "3-a",
                "catalogue": "0-a", "source": "policy", "reward": float(item), "weight": 1.0,
                "behaviors": [],
            }
            for place, leaf in enumerate(found.leaf.tolist())
        ],
        schema=FEEDBACK,
    )  # fmt: skip


def test_a_policy_is_measured_on_its_own_draws(tmp_path: Path) -> None:
    world = tiny_setup(num_items=40)
    rows = feedback(world, 400)
    measured = measure_policy(export_policy(world, tmp_path / "policy", step=1), rows)
    assert measured is not None
    # All weights are 1, so that every estimator is the mean of what was earned.
    own = realized(rows)
    assert own is not None
    assert measured.effective == pytest.approx(400, rel=1e-3)
    assert measured.reward.mean == pytest.approx(own.mean, rel=0.02)
    assert 0 < measured.entropy <= np.log(5)
    assert measured.coverage == 10  # one history, one list
    assert measured.illegal == 0


def test_a_draw_of_several_items_is_one_decision_and_a_list_is_none() -> None:
    world = tiny_setup(num_items=40)
    rows = feedback(world, 3)
    second = rows[:1].with_columns(rank=pl.lit(2, pl.Int32), reward=pl.lit(100.0))
    changes = [
        {"width": pl.lit(10, pl.Int32)}, {"decoder": pl.lit("beam")}, {"restricted": pl.lit(True)},
        {"temperature": pl.lit(0.5)}, {"source": pl.lit("popularity")},
        {"logprob": pl.lit(None, pl.List(pl.Float64))},
    ]  # fmt: skip
    others = [
        rows[:1].with_columns(request_id=pl.lit(f"other-{n}"), **change)
        for n, change in enumerate(changes)
    ]
    draws = draws_of(pl.concat([second, rows, *others]))
    assert sorted(draws["request_id"]) == ["0", "1", "2"]
    first = draws.filter(pl.col("request_id") == "0")
    assert first["item_id"][0] == rows["item_id"][0]
    assert first["reward"][0] == rows["reward"][0] + 100


def test_rewards_are_means_per_draw_of_a_policy_and_per_request() -> None:
    world = tiny_setup(num_items=40)
    rows = feedback(world, 4)
    found = realized(rows, "3-a")
    assert found is not None
    assert found.mean == pytest.approx(float(rows["reward"].mean()))  # type: ignore[arg-type]
    assert realized(rows, "3-b") is None
    assert reward_per_request(rows[:0]) is None
    doubled = reward_per_request(pl.concat([rows, rows]))
    assert doubled is not None
    assert doubled.mean == pytest.approx(2 * found.mean)
    assert measure_policy(Path("nowhere"), rows[:0]) is None
