"""Settings and rows that a round learns from: clicks, and older requests beside its own."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from cluster.loop.train import add_replay, round_settings, write_clicks
from orchard import config
from orchard.errors import DataError
from orchard.feedback.schema import FEEDBACK, ROWS
from orchard.settings import Config


def write(folder: Path, number: int, rewards: list[float]) -> Path:
    rows: list[dict[str, Any]] = [
        {
            "request_id": f"{number}-{n // 2}", "time": float(n), "user": "ann", "history": [1, 2],
            "item_id": n, "rank": 1 + n % 2, "sid": [1], "logprob": None, "decoder": "beam",
            "width": 2, "temperature": 1.0, "restricted": False, "policy": "1-a",
            "catalogue": "0-a", "source": "policy", "reward": reward, "weight": 1.0,
            "behaviors": [],
        }
        for n, reward in enumerate(rewards)
    ]  # fmt: skip
    path = folder / f"{number:05d}"
    path.mkdir(parents=True)
    pl.DataFrame(rows, schema=FEEDBACK).write_parquet(path / ROWS)
    return path


def settings(**loop: Any) -> Config:
    tree = {"name": "toy", "data": {"path": "data"}, "loop": loop, "seed": 5}
    return config.parse(tree, ["cluster.metrics_port=0", "learner.steps=900"])


def test_a_round_is_a_run_that_starts_from_the_served_policy(tmp_path: Path) -> None:
    own = write(tmp_path / "feedback", 3, [0.0, 1.0])
    made = round_settings(
        settings(learn="clicks", steps=7), 3, policy=Path("served"), feedback=[own],
        folder=tmp_path,
    )  # fmt: skip
    assert (made.name, made.output) == ("round-00003", tmp_path / "training")
    assert made.model.path == Path("served").absolute()
    assert (made.learner.steps, made.learner.rows, made.seed) == (7, "fresh", 8)
    assert made.cluster.metrics_port is None  # the loop's own exporter has the port
    assert made.data.fresh == (str(tmp_path / "clicks" / "00003.parquet"),)
    sft = round_settings(
        settings(learn="sft"), 3, policy=Path("served"), feedback=[own], folder=tmp_path
    )
    assert sft.data.train == made.data.fresh
    assert sft.data.fresh == ()


def test_clicks_are_the_rewarded_rows(tmp_path: Path) -> None:
    own = write(tmp_path / "feedback", 0, [0.0, 1.0, -1.0, 2.0])
    clicks = pl.read_parquet(write_clicks(tmp_path / "clicks.parquet", [own]))
    assert clicks.columns == ["user_id", "history", "target"]
    assert clicks["target"].to_list() == [1, 3]
    with pytest.raises(DataError, match="none of 2 rows"):
        write_clicks(tmp_path / "none", [write(tmp_path / "feedback", 1, [0.0, -1.0])])


def test_a_share_of_older_requests_is_added(tmp_path: Path) -> None:
    older = [write(tmp_path, number, [1.0] * 20) for number in range(2)]
    write(tmp_path, 2, [1.0] * 20)
    assert add_replay(tmp_path, 2, older=older, share=0.0, seed=0) == [tmp_path / "00002"]
    own, replay = add_replay(tmp_path, 2, older=older, share=0.5, seed=0)
    assert own == tmp_path / "00002"
    rows = pl.read_parquet(replay / ROWS)
    assert len(rows) == 20
    assert not any(request.startswith("2-") for request in rows["request_id"])
    again = add_replay(tmp_path, 2, older=older, share=0.5, seed=0)[1]
    assert pl.read_parquet(again / ROWS).equals(rows)
